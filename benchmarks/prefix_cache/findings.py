# SPDX-License-Identifier: Apache-2.0
"""What the rows say: the goals, and every place where a strategy is below stock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.prefix_cache.cases import (
    ATTENTION_ONLY,
    FIXED_POINT,
    HYBRID_AWARE,
    MAIN_DTYPE,
    MAIN_MODEL,
    OVERHEAD,
    PUBLIC,
    STOCK,
)

Row = Mapping[str, Any]

OURS = (FIXED_POINT, HYBRID_AWARE)
MAIN_REQUESTS = 3000
"""Requests of the public trace that the goals are about."""
HIT_GOALS = {20: (0.06, 0.08), 200: (0.29, 0.31)}
"""Hit rates by GiB: what is wanted at least, and what would be better."""
OVERHEAD_GOAL = 1.10
"""Scheduler time by request, of stock's."""

SETTING = ("model", "kv_cache_dtype", "trace", "requests", "memory")
"""What runs that are compared have in common."""


@dataclass(frozen=True)
class Goal:
    """A goal and what was measured.

    Attributes:
        what: The goal.
        measured: What was measured, or why nothing was.
        met: Whether it is met; None where nothing was measured.
    """

    what: str
    measured: str
    met: bool | None


@dataclass(frozen=True)
class Comparison:
    """A row of ours beside stock's of the same setting."""

    ours: Row
    stock: Row

    @property
    def below(self) -> bool:
        """Whether fewer tokens are hit than stock hits; a cache that does not fit hits none."""
        return hit_tokens(self.ours) < hit_tokens(self.stock)

    @property
    def same(self) -> bool:
        """Whether every single request hits as many tokens as with stock."""
        digests = [row["hits_digest"] if row["fits"] else "" for row in (self.ours, self.stock)]
        return digests[0] == digests[1]

    def __str__(self) -> str:
        ours, stock = (rate(row) for row in (self.ours, self.stock))
        names = self.ours["strategy"], self.stock["strategy"]
        return f"{setting_of(self.ours)}: {names[0]} {ours}, {names[1]} {stock}"


def hit_tokens(row: Row) -> int:
    """Return the tokens that a row hit: none where the memory did not do."""
    return int(row["hit_tokens"]) if row["fits"] else 0


def rate(row: Row) -> str:
    """Write a row's hit rate."""
    return f"{row['hit_rate']:.2%}" if row["fits"] else "does not fit"


def setting_of(row: Row) -> str:
    """Write what a row was measured with, but the strategy."""
    return (
        f"{row['model']}, {row['kv_cache_dtype']}, {row['requests']:,} requests of "
        f"{row['trace']}, {row['memory']:g} GiB"
    )


def comparisons(rows: Iterable[Row], reference: str = STOCK) -> list[Comparison]:
    """Pair every row of ours with the reference's of the same setting.

    Where neither fits the memory there is nothing to compare.
    """
    rows = list(rows)
    by_setting = {
        tuple(row[name] for name in SETTING): row for row in rows if row["strategy"] == reference
    }
    pairs = []
    for row in rows:
        stock = by_setting.get(tuple(row[name] for name in SETTING))
        if row["strategy"] in OURS and stock is not None and (row["fits"] or stock["fits"]):
            pairs.append(Comparison(row, stock))
    return pairs


def runs(result: Mapping[str, Any]) -> list[Row]:
    """Return the rows of all parts but that of the scheduler's time.

    Args:
        result: As the JSON file has it.
    """
    parts = result["parts"].items()
    return [row for part, found in parts if part != OVERHEAD for row in found["rows"]]


def goals(result: Mapping[str, Any]) -> list[Goal]:
    """Hold what was measured against the goals.

    Args:
        result: As the JSON file has it.
    """
    rows = runs(result)
    medians = result["parts"].get(OVERHEAD, {"medians": []})["medians"]
    compared = comparisons(rows)
    policy = [pair for pair in compared if pair.ours["strategy"] == HYBRID_AWARE]
    below = [pair for pair in policy if pair.below]
    alike = [pair for pair in compared if pair.ours["model"] == ATTENTION_ONLY]
    different = [pair for pair in alike if not pair.same]
    return [
        *(_hit_goal(rows, memory, *wanted) for memory, wanted in HIT_GOALS.items()),
        Goal(
            "hybrid_aware at every memory size never below stock",
            _count(below, policy, "below stock"),
            not below if policy else None,
        ),
        Goal(
            "models of attention only exactly as stock, request by request",
            _count(different, alike, "different"),
            not different if alike else None,
        ),
        _overhead_goal(medians),
    ]


def overhead(medians: Iterable[Row], measure: str, strategy: str, reference: str) -> float:
    """Return a strategy's time divided by the reference's.

    Args:
        medians: What the medians of each strategy's steps over the rounds come to.
        measure: `step_ms` or `request_ms`.
        strategy: Whose time.
        reference: Beside whose.
    """
    times = {row["strategy"]: float(row[measure]) for row in medians}
    return times[strategy] / times[reference]


def _hit_goal(rows: Iterable[Row], memory: float, least: float, better: float) -> Goal:
    what = f"{memory:g} GiB, public trace: at least {least:.0%}, better {better:.0%}"
    wanted = (MAIN_MODEL, MAIN_DTYPE, PUBLIC, MAIN_REQUESTS, memory)
    for row in rows:
        if row["strategy"] == HYBRID_AWARE and tuple(row[name] for name in SETTING) == wanted:
            met = row["fits"] and row["hit_rate"] >= least
            return Goal(what, rate(row), met)
    return Goal(what, f"not measured with {MAIN_REQUESTS:,} requests", None)


def _overhead_goal(medians: Sequence[Row]) -> Goal:
    what = f"scheduler time by request at most {OVERHEAD_GOAL - 1:.0%} over stock"
    if not medians:
        return Goal(what, "not measured", None)
    ratio = overhead(medians, "request_ms", HYBRID_AWARE, STOCK)
    return Goal(what, f"{ratio - 1:+.1%}", ratio <= OVERHEAD_GOAL)


def _count(bad: Sequence[object], of: Sequence[object], what: str) -> str:
    return f"{len(bad)} of {len(of)} comparisons {what}" if of else "not measured"
