# SPDX-License-Identifier: Apache-2.0
"""What was found: rows of the report, and the verdict over all of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum


class Verdict(str, Enum):
    """What a row says."""

    EQUAL = "equal"
    DIFFERENT = "DIFFERENT"
    FAILED = "FAILED"
    NOTHING_SHOWN = "nothing shown"
    CANNOT = "vLLM cannot"
    LEFT_OUT = "left out"


@dataclass(frozen=True)
class Check:
    """One comparison of an engine with the reference of its model, or why there is none.

    Attributes:
        model: Name of the model.
        configuration: Name of the engine's configuration.
        check: What was compared; empty if the engine did not get so far.
        verdict: What came of it.
        detail: What is different, or why it could not be tried.
        prompts: Prompts that were compared.
        tokens: Tokens that were compared.
        apart: Largest difference of a log-probability, but for comparisons with an unquantised
            cache, where it is the mean.
    """

    model: str
    configuration: str
    check: str
    verdict: Verdict
    detail: str = ""
    prompts: int = 0
    tokens: int = 0
    apart: float | None = None


@dataclass(frozen=True)
class Speed:
    """How fast the engines of one mode decode one batch.

    Attributes:
        model: Name of the model.
        mode: Name of the mode.
        batch: Requests.
        length: Tokens of each request's context.
        milliseconds: By name of the cache and round: a request's time for a token.
    """

    model: str
    mode: str
    batch: int
    length: int
    milliseconds: dict[str, list[float]]

    def ms_per_token(self, cache: str) -> float:
        """Return the median over rounds."""
        return statistics.median(self.milliseconds[cache])

    def tokens_per_s(self, cache: str) -> float:
        """Return the tokens of all requests together in a second."""
        return 1e3 * self.batch / self.ms_per_token(cache)

    def times_faster(self, ours: str, cache: str) -> float:
        """Return how many times faster ours is: the median of one round's ratios.

        A machine changes its speed from one second to the next.
        """
        pairs = zip(self.milliseconds[cache], self.milliseconds[ours], strict=True)
        return statistics.median(theirs / mine for theirs, mine in pairs)


@dataclass(frozen=True)
class Gap:
    """A speed that was not measured.

    Attributes:
        model: Name of the model.
        mode: Name of the mode, or what was left out of all.
        cache: Name of the cache; empty for all.
        verdict: Why there is none, in a word.
        reason: Why, as the engine said it.
        cell: Batch and context length; None for all.
    """

    model: str
    mode: str
    cache: str
    verdict: Verdict
    reason: str
    cell: tuple[int, int] | None = None


@dataclass
class Results:
    """Everything that was found."""

    checks: list[Check] = field(default_factory=list)
    engines: list[dict[str, object]] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)

    @property
    def failures(self) -> list[Check | Gap]:
        """Rows that make the command fail: unequal outputs, and engines of ours that fail."""
        rows: Sequence[Check | Gap] = [*self.checks, *self.gaps]
        return [row for row in rows if row.verdict in (Verdict.DIFFERENT, Verdict.FAILED)]
