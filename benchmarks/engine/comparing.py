# SPDX-License-Identifier: Apache-2.0
"""When outputs are the same, and how far a k8v4 cache may be from an unquantised one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from testing.models import SCORE_SIZE
from testing.requests import Output


@dataclass(frozen=True)
class Bounds:
    """How far rounding alone may move a log-probability.

    Attributes:
        rounding: But for one in twenty.
        farthest: Any; `rounding` if None.
    """

    rounding: float
    farthest: float | None = None

    @property
    def limit(self) -> float:
        """What no difference may exceed."""
        return self.rounding if self.farthest is None else self.farthest


@dataclass(frozen=True)
class Comparison:
    """What came of comparing outputs.

    Attributes:
        prompts: How many were compared.
        tokens: How many tokens of them, all of which had to be equal.
        apart: The largest difference of a log-probability.
        different: What is not the same, a sentence each.
    """

    prompts: int
    tokens: int
    apart: float
    different: list[str]


def decisive(output: Output, bounds: Bounds) -> int:
    """Return how many tokens from the first on were no close choice.

    Two ways to compute the same thing differ by rounding. Where the two best tokens are closer
    than twice that, either is right, and what follows depends on which it was.
    """
    close = (i for i, margin in enumerate(output.margins) if margin <= 2 * bounds.rounding)
    return next(close, len(output.margins))


def compare(outputs: Sequence[Output], expected: Sequence[Output], bounds: Bounds) -> Comparison:
    """Compare the decisive tokens of `expected` and their log-probabilities."""
    tokens, different = 0, []
    differences: list[float] = []
    for i, (output, wanted) in enumerate(zip(outputs, expected, strict=True)):
        count = decisive(wanted, bounds)
        tokens += count
        pairs = zip(output.tokens[:count], wanted.tokens[:count], strict=False)
        unequal = [at for at, (got, want) in enumerate(pairs) if got != want]
        if len(output.tokens) < count:
            different.append(f"prompt {i}: {len(output.tokens)} tokens of {count}")
        elif unequal:
            at = unequal[0]
            different.append(
                f"prompt {i}: token {at} is {output.tokens[at]}, not {wanted.tokens[at]}, "
                f"which was {wanted.margins[at]:.2f} ahead"
            )
        else:
            logprobs = zip(output.logprobs[:count], wanted.logprobs[:count], strict=True)
            differences += [abs(a - b) for a, b in logprobs]
    apart = max(differences, default=0.0)
    # Not `>`: no comparison with NaN is true.
    if not all(difference <= bounds.limit for difference in differences):
        different.append(f"log-probabilities up to {apart:.3f} apart, {bounds.limit} allowed")
    far = sum(not difference <= bounds.rounding for difference in differences)
    # The first may be the one in twenty.
    if far > max(1, len(differences) / 20):
        different.append(
            f"{far} of {len(differences)} log-probabilities more than {bounds.rounding} apart"
        )
    return Comparison(len(outputs), tokens, apart, different)


def choose(
    outputs: Sequence[Output], prompts: Sequence[list[int]], count: int, bounds: Bounds
) -> list[int]:
    """Return the indices of prompts to compare.

    Half are the longest prompts, so that many pages are read; the others those with the most
    decisive tokens. All have two, or one where there are too few of those.
    """
    lengths = [decisive(output, bounds) for output in outputs]
    usable = [i for i, length in enumerate(lengths) if length >= 2]
    if len(usable) < count:
        usable = [i for i, length in enumerate(lengths) if length >= 1]
    long = sorted(usable, key=lambda i: len(prompts[i]))[-(count // 2) :]
    rest = sorted(set(usable) - set(long), key=lambda i: lengths[i])
    return sorted(long + rest[-(count - len(long)) :])


def format_error(head_size: int) -> float:
    """Return how far k8v4 moves one layer's attention, as a share of its size.

    A value is rounded to one of 16 levels, which D normal numbers' range of 2 sqrt(2 ln D) is cut
    into. An e4m3 key is off by 0.0265 of its element on average, and a score by as much of the
    scores' standard deviation. `tests/e2e/test_prompt_log_probabilities.py` derives both.
    """
    value_error = 2 * math.sqrt(2 * math.log(head_size)) / (15 * math.sqrt(12))
    key_error = 2**-3 / math.sqrt(12) * math.sqrt(3 / (8 * math.log(2)))
    return math.hypot(value_error, key_error * SCORE_SIZE)


def far_from_unquantised(
    measured: Sequence[float], unquantised: Sequence[float], head_size: int, spread: float
) -> tuple[float, list[str]]:
    """Say how far log-probabilities with a k8v4 cache are from those without.

    Args:
        measured: With a k8v4 cache.
        unquantised: Of the same tokens in the same texts, with a cache of the model's dtype.
        head_size: Elements of a head.
        spread: Standard deviation of an unquantised engine's log-probabilities.

    Returns:
        The mean difference, and which of the bounds that follow from the format are broken.
    """
    unit = format_error(head_size) * spread
    errors = sorted(abs(a - b) for a, b in zip(measured, unquantised, strict=True))
    found = {
        "mean": (statistics.fmean(errors), math.sqrt(2 / math.pi) * unit),
        "99 of 100": (errors[int(0.99 * len(errors))], 3.26 * unit),
        "greatest": (errors[-1], 8 * unit),
    }
    broken = [
        f"{name} {e:.3f} > {bound:.3f}" for name, (e, bound) in found.items() if not e <= bound
    ]
    return found["mean"][0], broken
