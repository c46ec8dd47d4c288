# SPDX-License-Identifier: Apache-2.0
"""Statistics over the scores of one cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy

from vllm_hybrid_kv.tools.eval.scores import Scores

FIRST_RANGE = 16
"""End of the first range of context, in tokens; each further range is twice as long."""


@dataclass(frozen=True)
class Statistics:
    """Statistics over some predictions. Divergences are from the reference, in nats.

    Attributes:
        positions: Number of predictions.
        perplexity: exp of the mean negative log-probability of the actual tokens.
        divergence_mean: Mean KL divergence.
        divergence_p99: 99th percentile.
        agreement: Share, from 0 to 1, with the reference's most probable token.
    """

    positions: int
    perplexity: float
    divergence_mean: float
    divergence_p99: float
    agreement: float


@dataclass(frozen=True)
class Range(Statistics):
    """Statistics over predictions with `first` to `last` tokens of context."""

    first: int
    last: int


@dataclass(frozen=True)
class Summary(Statistics):
    """Statistics over all predictions with one cache.

    Attributes:
        divergence_error: Standard error of the mean over sequences; None for one sequence.
        divergence_p999: 99.9th percentile.
        divergence_max: Maximum.
        by_position: Ranges of context.
    """

    divergence_error: float | None
    divergence_p999: float
    divergence_max: float
    by_position: tuple[Range, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON, with None for infinities and NaN."""
        finite: dict[str, Any] = _finite(asdict(self))
        return finite


def summarise(scored: Sequence[Scores]) -> Summary:
    """Summarise the scores of one cache, one or more sequences with one or more positions."""
    logprobs = numpy.concatenate([one.logprobs for one in scored])
    divergences = numpy.concatenate([one.divergences for one in scored])
    agreements = numpy.concatenate([one.agreements for one in scored])
    contexts = numpy.concatenate([1 + numpy.arange(len(one)) for one in scored])
    longest = int(contexts.max())

    def statistics(chosen: numpy.ndarray) -> dict[str, Any]:
        with numpy.errstate(over="ignore"):
            perplexity = float(numpy.exp(-logprobs[chosen].mean()))
        return {
            "positions": int(chosen.sum()),
            "perplexity": perplexity,
            "divergence_mean": float(divergences[chosen].mean()),
            "divergence_p99": _percentile(divergences[chosen], 99),
            "agreement": float(agreements[chosen].mean()),
        }

    # A sequence of full length has positions in every range.
    ranges = (
        Range(
            **statistics((contexts >= first) & (contexts < end)),
            first=first,
            last=min(end - 1, longest),
        )
        for first, end in _ranges(longest)
    )
    return Summary(
        **statistics(contexts > 0),
        divergence_error=_error_of_mean([one.divergences for one in scored]),
        divergence_p999=_percentile(divergences, 99.9),
        divergence_max=float(divergences.max()),
        by_position=tuple(ranges),
    )


def _percentile(values: numpy.ndarray, percent: float) -> float:
    # Interpolation next to an infinity gives NaN.
    with numpy.errstate(invalid="ignore"):
        return float(numpy.percentile(values, percent))


def _error_of_mean(by_sequence: Sequence[Sequence[float]]) -> float | None:
    """Return the standard error of the mean over all positions, with sequences as the samples.

    Positions of one sequence depend on each other. The mean is a ratio, of sums to lengths,
    because sequences of different lengths have different weights.
    """
    count = len(by_sequence)
    if count < 2:
        return None
    sums = numpy.array([sum(part) for part in by_sequence])
    lengths = numpy.array([len(part) for part in by_sequence])
    residuals = sums - sums.sum() / lengths.sum() * lengths
    variance = (residuals**2).sum() / (count - 1) / count
    return float(math.sqrt(variance) / lengths.mean())


def _ranges(longest: int) -> Iterator[tuple[int, int]]:
    first, end = 1, FIRST_RANGE
    while first <= longest:
        yield first, end
        first, end = end, 2 * end


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
