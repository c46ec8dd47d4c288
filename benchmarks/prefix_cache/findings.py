# SPDX-License-Identifier: Apache-2.0
"""Compares rows with the goals and with vLLM's own strategy."""

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
"""Requests of the public trace that the goals refer to."""
HIT_GOALS = {20: (0.06, 0.08), 200: (0.29, 0.31)}
"""By GiB, the minimum hit rate and a better one."""
OVERHEAD_GOAL = 1.10
"""The scheduler's time per request, as a multiple of stock's."""

SETTING = ("model", "kv_cache_dtype", "trace", "requests", "memory")
"""The fields that are equal for runs that are compared."""


@dataclass(frozen=True)
class Goal:
    """A goal, the measurement, and whether the goal is met (None without a measurement)."""

    what: str
    measured: str
    met: bool | None


@dataclass(frozen=True)
class Comparison:
    """A row of ours and stock's row of the same setting."""

    ours: Row
    stock: Row

    @property
    def below(self) -> bool:
        """Whether ours hits fewer tokens. A cache that does not fit hits none."""
        return hit_tokens(self.ours) < hit_tokens(self.stock)

    @property
    def same(self) -> bool:
        """Whether every request hits as many tokens as with stock."""
        digests = [row["hits_digest"] if row["fits"] else "" for row in (self.ours, self.stock)]
        return digests[0] == digests[1]

    def __str__(self) -> str:
        ours, stock = (rate(row) for row in (self.ours, self.stock))
        names = self.ours["strategy"], self.stock["strategy"]
        return f"{setting_of(self.ours)}: {names[0]} {ours}, {names[1]} {stock}"


def hit_tokens(row: Row) -> int:
    """Return the hit tokens of a row, 0 if the cache does not fit."""
    return int(row["hit_tokens"]) if row["fits"] else 0


def rate(row: Row) -> str:
    return f"{row['hit_rate']:.2%}" if row["fits"] else "does not fit"


def setting_of(row: Row) -> str:
    return (
        f"{row['model']}, {row['kv_cache_dtype']}, {row['requests']:,} requests of "
        f"{row['trace']}, {row['memory']:g} GiB"
    )


def comparisons(rows: Iterable[Row], reference: str = STOCK) -> list[Comparison]:
    """Pair every row of ours with the reference's row of the same setting, if either fits."""
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
    """Return the rows of all parts of a result, except those of the scheduler's time."""
    parts = result["parts"].items()
    return [row for part, found in parts if part != OVERHEAD for row in found["rows"]]


def goals(result: Mapping[str, Any]) -> list[Goal]:
    """Return the goals, compared with a result."""
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
        medians: The rows of `overhead.measure` under `medians`.
        measure: `step_ms` or `request_ms`.
        strategy: The strategy.
        reference: The strategy to divide by.
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
    what = f"scheduler time per request at most {OVERHEAD_GOAL - 1:.0%} over stock"
    if not medians:
        return Goal(what, "not measured", None)
    ratio = overhead(medians, "request_ms", HYBRID_AWARE, STOCK)
    return Goal(what, f"{ratio - 1:+.1%}", ratio <= OVERHEAD_GOAL)


def _count(bad: Sequence[object], of: Sequence[object], what: str) -> str:
    return f"{len(bad)} of {len(of)} comparisons {what}" if of else "not measured"
