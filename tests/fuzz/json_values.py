# SPDX-License-Identifier: Apache-2.0
"""Whatever JSON can hold, and documents that are right but for one thing."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st


def json_values(*words: str, length: int = 20) -> st.SearchStrategy[Any]:
    """Return a strategy of all that JSON can hold.

    Args:
        words: Texts that are to come up often.
        length: Characters of other texts at most.
    """
    plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=length)
    if words:
        plain |= st.sampled_from(words)
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
    """Return a document in which one field is another value or missing.

    Args:
        draw: Hypothesis's.
        document: The document.
        values: What a field may become.
        names: Fields that the change may be about; those in objects within it are, as well.
    """
    document = copy.deepcopy(document)
    place = document
    name = draw(st.sampled_from(names), label="field")
    while isinstance(inner := place.get(name), dict) and inner and draw(st.booleans()):
        place, name = inner, draw(st.sampled_from(sorted(inner)))
    if draw(st.integers(0, 4)) == 0:
        place.pop(name, None)
    else:
        place[name] = draw(values, label="value")
    return document


@st.composite
def damaged(draw: st.DrawFn, text: bytes) -> bytes:
    """Return a text that is cut, or has other bytes in it."""
    place = draw(st.integers(0, len(text)))
    if draw(st.booleans()):
        return text[:place]
    return text[:place] + draw(st.binary(min_size=1, max_size=4)) + text[place:]


def encoded(document: Any) -> bytes:
    """Return a document as a file has it."""
    return json.dumps(document).encode()
