# SPDX-License-Identifier: Apache-2.0
"""Describe steps of an engine, and call scenarios in another process. Does not import vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Step:
    """One step of an engine.

    Attributes:
        lengths: Tokens of each request, including its new ones.
        queries: New tokens of each request.
        bound: How much the host's lengths exceed the exact lengths. With asynchronous
            speculation the host counts every draft token as accepted.
        layer: Parameters of the layer.
        key_size: Standard deviation of the keys. vLLM's backend clips keys to 1.75 on GPUs that
            cannot convert to fp8.
    """

    lengths: tuple[int, ...]
    queries: tuple[int, ...]
    bound: int = 0
    layer: dict[str, Any] = field(default_factory=dict)
    key_size: float = 0.5


def call(function: str, *arguments: Any) -> Any:
    """Call a function of `scenarios`, in a process that runs Triton's interpreter."""
    from testing.attention import scenarios

    return getattr(scenarios, function)(*arguments)
