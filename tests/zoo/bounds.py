# SPDX-License-Identifier: Apache-2.0
"""Bounds for the outputs of small engines, the same as in the end-to-end tests."""

from __future__ import annotations

import math
import statistics
from typing import Any

from testing.output_comparison import format_error

CACHED_APART = 0.15
"""Bound on the difference of fresh and cached log-probabilities of bfloat16 models."""

STATES_APART = 1.0
"""The same bound if a model rounds states to bfloat16 after each chunk of a prompt."""


def errors_of(auto: list[float], k8v4: list[float], head_size: int) -> dict[str, list[float]]:
    """Return differences of log-probabilities by name, each as [measured, bound]."""
    unit = format_error(head_size) * statistics.pstdev(auto)
    apart = sorted(abs(a - b) for a, b in zip(auto, k8v4, strict=True))
    return {
        "mean": [statistics.fmean(apart), math.sqrt(2 / math.pi) * unit],
        "99 of 100": [apart[int(0.99 * len(apart))], 3.26 * unit],
        "greatest": [apart[-1], 8 * unit],
    }


def verdict(row: dict[str, Any], states: bool) -> list[str]:
    """Return the errors in the outputs of an architecture's engines, one line for each.

    Args:
        row: A row of `tests.zoo.runner` in which both dtypes ran.
        states: Whether the model has recurrent states.
    """
    # `not <=` instead of `>`, because NaN is out of bounds too.
    wrong = [
        f"{name} difference from auto {measured:.3f}, bound {bound:.3f}"
        for name, (measured, bound) in row["errors"].items()
        if not measured <= bound
    ]
    ran = row["turboquant_k8v4"]
    limit = STATES_APART if states else CACHED_APART
    if not ran["apart"] <= limit:
        wrong.append(f"cached and fresh log-probabilities {ran['apart']:.3f} apart, bound {limit}")
    missed = [
        length
        for length, cached in zip(row["lengths"], ran["cached"], strict=True)
        if length >= ran["smallest_hit"] and not cached
    ]
    if missed:
        wrong.append(f"prompts of {missed} tokens did not hit; hits need {ran['smallest_hit']}")
    return wrong
