# SPDX-License-Identifier: Apache-2.0
"""The caches to compare: a dtype of vLLM's, with settings of the plugin where they matter."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_hybrid_kv.tools.eval.errors import EvaluationError

_BETWEEN = re.compile(r",(?![^\[]*\])")
_SUBJECT = re.compile(r"([\w.-]+)(?:\[([^\[\]]*)\])?")


@dataclass(frozen=True)
class Subject:
    """One cache.

    Attributes:
        kv_cache_dtype: As vLLM's `--kv-cache-dtype`.
        settings: The plugin's, which win over the environment's.
    """

    kv_cache_dtype: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """How it is written: `fp8`, `turboquant_k8v4[boundary_layers=0]`."""
        if not self.settings:
            return self.kv_cache_dtype
        given = ",".join(f"{name}={_written(value)}" for name, value in self.settings.items())
        return f"{self.kv_cache_dtype}[{given}]"


def parse(text: str, reference: str) -> list[Subject]:
    """Return the caches of a list, the reference first.

    Args:
        text: Dtypes between commas; settings of one stand behind it in brackets.
        reference: The one that all are compared with; it need not be in the list.

    Raises:
        EvaluationError: It is no such list.
    """
    subjects = [_subject(reference)]
    for part in _BETWEEN.split(text):
        subject = _subject(part.strip())
        if subject not in subjects:
            subjects.append(subject)
    if len(subjects) == 1:
        raise EvaluationError(
            f"--kv-cache-dtype: {text!r} has nothing to compare with {reference}; "
            "give another, like fp8,turboquant_k8v4"
        )
    return subjects


def _subject(text: str) -> Subject:
    match = _SUBJECT.fullmatch(text)
    if match is None:
        raise EvaluationError(
            f"--kv-cache-dtype: {text!r} is no dtype of a cache; write dtypes between commas and "
            "settings in brackets, like fp8,turboquant_k8v4[boundary_layers=0]"
        )
    settings: dict[str, Any] = {}
    for pair in filter(None, (match[2] or "").split(",")):
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise EvaluationError(f"--kv-cache-dtype: {text}: write NAME=VALUE, not {pair!r}")
        settings[name] = _value(value)
    return Subject(match[1], dict(sorted(settings.items())))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
