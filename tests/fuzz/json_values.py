# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies for arbitrary JSON values, and for valid documents with one change."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st


def json_values(*words: str, length: int = 20) -> st.SearchStrategy[Any]:
    """Return a hypothesis strategy that draws JSON values of any type.

    Args:
        words: Texts to draw often, such as values that the parser knows.
        length: The maximum number of characters of other texts.
    """
    plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=length)
    plain |= st.sampled_from(("", *words))
    return st.recursive(
        plain,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
        ),
        max_leaves=6,
    )


@st.composite
def with_a_change(
    draw: st.DrawFn, document: dict[str, Any], values: st.SearchStrategy[Any], names: Sequence[str]
) -> dict[str, Any]:
    """Draw a copy of `document` in which one field is missing or has another value.

    Args:
        draw: Comes from hypothesis.
        document: The valid document.
        values: A strategy for the new value.
        names: The fields to choose from. If a field is an object, a field inside it may change.
    """
    document = copy.deepcopy(document)
    parent = document
    name = draw(st.sampled_from(names), label="field")
    while isinstance(inner := parent.get(name), dict) and inner and draw(st.booleans()):
        parent, name = inner, draw(st.sampled_from(sorted(inner)))
    if draw(st.integers(0, 4)) == 0:
        parent.pop(name, None)
    else:
        parent[name] = draw(values, label="value")
    return document


@st.composite
def damaged(draw: st.DrawFn, text: bytes) -> bytes:
    """Draw a damaged copy of `text`: cut off, or with bytes inserted."""
    index = draw(st.integers(0, len(text)))
    if draw(st.booleans()):
        return text[:index]
    return text[:index] + draw(st.binary(min_size=1, max_size=4)) + text[index:]


def encoded(document: Any) -> bytes:
    return json.dumps(document).encode()
