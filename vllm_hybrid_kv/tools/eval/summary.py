# SPDX-License-Identifier: Apache-2.0
"""Scores as the numbers that people ask for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy

from vllm_hybrid_kv.tools.eval.folder import Scored

FIRST_RANGE = 16
"""Tokens of context that the first range ends before; each further one is twice as long."""


@dataclass(frozen=True)
class Range:
    """Predictions from about as many tokens.

    Attributes:
        first: The fewest tokens before the one that is predicted.
        last: The most.
        positions: How many predictions.
        perplexity: Theirs.
        divergence_mean: Mean KL divergence from the reference, nats.
        divergence_p99: Its 99th percentile.
        agreement: The share, from 0 to 1, in which the most probable token is the reference's.
    """

    first: int
    last: int
    positions: int
    perplexity: float
    divergence_mean: float
    divergence_p99: float
    agreement: float


@dataclass(frozen=True)
class Summary:
    """What one cache came to. Divergences are KL divergences from the reference, in nats.

    Attributes:
        positions: Predictions.
        perplexity: exp of the mean negative log-probability of the tokens that came.
        divergence_mean: Their mean.
        divergence_error: The mean's standard error, by what sequences differ; None for fewer
            than two.
        divergence_p99: The 99th percentile.
        divergence_p999: The 99.9th percentile.
        divergence_max: The largest.
        agreement: The share, from 0 to 1, in which the most probable token is the reference's.
        by_position: The same by tokens of context.
    """

    positions: int
    perplexity: float
    divergence_mean: float
    divergence_error: float | None
    divergence_p99: float
    divergence_p999: float
    divergence_max: float
    agreement: float
    by_position: tuple[Range, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON has it; what is no number there is None."""
        plain: dict[str, Any] = _finite(asdict(self))
        return plain


def summarise(scored: Sequence[Scored]) -> Summary:
    """Summarise the scores of one cache.

    Args:
        scored: By sequence; there is at least one, with at least one position.
    """
    logprobs = numpy.concatenate([one.logprobs for one in scored])
    divergences = numpy.concatenate([one.divergences for one in scored])
    agreements = numpy.concatenate([one.agreements for one in scored])
    contexts = numpy.concatenate([1 + numpy.arange(len(one.logprobs)) for one in scored])
    ranges = []
    for first, end in _ranges(int(contexts.max())):
        chosen = (contexts >= first) & (contexts < end)
        if chosen.any():
            ranges.append(
                Range(
                    first=first,
                    last=min(end - 1, int(contexts.max())),
                    positions=int(chosen.sum()),
                    perplexity=_perplexity(logprobs[chosen]),
                    divergence_mean=float(divergences[chosen].mean()),
                    divergence_p99=_percentile(divergences[chosen], 99),
                    agreement=float(agreements[chosen].mean()),
                )
            )
    return Summary(
        positions=len(logprobs),
        perplexity=_perplexity(logprobs),
        divergence_mean=float(divergences.mean()),
        divergence_error=_error_of_mean([one.divergences for one in scored]),
        divergence_p99=_percentile(divergences, 99),
        divergence_p999=_percentile(divergences, 99.9),
        divergence_max=float(divergences.max()),
        agreement=float(agreements.mean()),
        by_position=tuple(ranges),
    )


def _perplexity(logprobs: numpy.ndarray) -> float:
    with numpy.errstate(over="ignore"):
        return float(numpy.exp(-logprobs.mean()))


def _percentile(values: numpy.ndarray, percent: float) -> float:
    # Beside an infinity it is none, which is no number.
    with numpy.errstate(invalid="ignore"):
        return float(numpy.percentile(values, percent))


def _error_of_mean(by_sequence: Sequence[numpy.ndarray]) -> float | None:
    """Return the standard error of the mean over all positions, whose sequences are the samples.

    Positions of one sequence depend on each other. Sequences of different lengths weigh as long as
    they are: the error is that of a ratio, of sums to lengths.
    """
    count = len(by_sequence)
    if count < 2:
        return None
    sums = numpy.array([part.sum() for part in by_sequence])
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
