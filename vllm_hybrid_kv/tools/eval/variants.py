# SPDX-License-Identifier: Apache-2.0
"""The caches that `eval` compares: each is a cache dtype of vLLM with settings of the plugin."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_hybrid_kv.tools.output import ToolError

_COMMA_OUTSIDE_BRACKETS = re.compile(r",(?![^\[]*\])")
_VARIANT = re.compile(r"([\w.-]+)(?:\[([^\[\]]*)\])?")


@dataclass(frozen=True)
class CacheVariant:
    """One cache to compare.

    Attributes:
        kv_cache_dtype: A value of vLLM's `--kv-cache-dtype`.
        settings: Settings of the plugin; they override the environment.
    """

    kv_cache_dtype: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The cache as on the command line: `fp8`, `turboquant_k8v4[boundary_layers=0]`."""
        if not self.settings:
            return self.kv_cache_dtype
        pairs = (
            f"{name}={value if isinstance(value, str) else json.dumps(value)}"
            for name, value in self.settings.items()
        )
        return f"{self.kv_cache_dtype}[{','.join(pairs)}]"


def parse(text: str, reference: str) -> list[CacheVariant]:
    """Return the caches of a comma-separated list, the reference first.

    Args:
        text: Cache dtypes separated by commas, each with optional settings in brackets.
        reference: The cache that all others are compared with. The list may omit it.

    Raises:
        ToolError: The text is not such a list, or contains only the reference.
    """
    variants = [_variant(reference)]
    for part in _COMMA_OUTSIDE_BRACKETS.split(text):
        if (variant := _variant(part.strip())) not in variants:
            variants.append(variant)
    if len(variants) == 1:
        raise ToolError(
            f"--kv-cache-dtype: {text!r} has nothing to compare with {reference}; "
            "add another cache, like fp8,turboquant_k8v4"
        )
    return variants


def _variant(text: str) -> CacheVariant:
    match = _VARIANT.fullmatch(text)
    if match is None:
        raise ToolError(
            f"--kv-cache-dtype: {text!r} is not a cache dtype; separate dtypes with commas and "
            "put settings in brackets, like fp8,turboquant_k8v4[boundary_layers=0]"
        )
    settings: dict[str, Any] = {}
    for pair in filter(None, (match[2] or "").split(",")):
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise ToolError(f"--kv-cache-dtype: {text}: write NAME=VALUE, not {pair!r}")
        settings[name] = _value(value)
    return CacheVariant(match[1], dict(sorted(settings.items())))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
