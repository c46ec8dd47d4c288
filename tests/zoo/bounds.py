# SPDX-License-Identifier: Apache-2.0
"""Judge the outputs of small engines, by the same bounds as the end-to-end tests."""

from __future__ import annotations

from typing import Any

from testing.output_comparison import exceeded_bounds

CACHED_APART = 0.15
"""How far a prefix cache hit may move log-probabilities of a bfloat16 model."""

STATES_APART = 1.0
"""The same bound for models with states, which are rounded to bfloat16 after each prompt chunk."""


def verdict(row: dict[str, Any], states: bool) -> list[str]:
    """Compare the outputs of an architecture's engines; return one line for each error.

    Args:
        row: A row of `tests.zoo.runner` in which both dtypes ran.
        states: Whether the model has recurrent states.
    """
    wrong = [f"difference from auto: {text}" for text in exceeded_bounds(row["errors"])]
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
