# SPDX-License-Identifier: Apache-2.0
"""Measures the scheduler's time with each strategy, compared with vLLM's own.

One process replays the same requests with each strategy in turn. Every other round has the reverse
order, because a shared machine changes its speed. Only `schedule` and `update_from_output` are
timed. A strategy takes the same steps in every round, so the median of each step over the rounds
counts: it removes interruptions, and keeps what the strategy does every 64 requests.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.prefix_cache.cases import (
    CONCURRENCY,
    GIB,
    HYBRID_AWARE,
    STOCK,
    STOCK_16,
    STRATEGIES,
    Case,
    requests_of,
)
from benchmarks.prefix_cache.runs import describe

TIMED = (STOCK, STOCK_16, HYBRID_AWARE)


def measure(case: Case, public: Path | None, rounds: int) -> dict[str, Any]:
    """Time every strategy in every round, after a short warm-up of each.

    Args:
        case: What is replayed, with each of `TIMED` instead of its strategy.
        public: The file of the public trace, if it is available.
        rounds: Timed rounds.

    Returns:
        `rows` has for each round and strategy the scheduler's milliseconds per step (median) and
        per request (all steps together). `medians` has the same of the steps' medians.
    """
    from vllm_hybrid_kv.tools.replay.scheduler import Replay

    requests = requests_of(case.trace, case.requests, public)
    model = describe(case.model, case.kv_cache_dtype)
    times: dict[str, list[list[float]]] = {strategy: [] for strategy in TIMED}
    rows = []
    for number in range(rounds + 1):
        for strategy in TIMED if number % 2 else reversed(TIMED):
            sent = requests if number else requests[: 2 * CONCURRENCY]
            settings = dict(STRATEGIES[strategy])
            replay = Replay(model.engine(int(case.memory * GIB), settings), sent, CONCURRENCY)
            # As vLLM's engine does after start-up.
            gc.collect()
            gc.freeze()
            tally = replay.run()
            gc.unfreeze()
            if number:
                steps = [1e3 * seconds for seconds in tally.schedule_seconds]
                times[strategy].append(steps)
                summary = summarise(strategy, steps, tally.requests)
                rows.append({**summary, "round": number, "hit_rate": tally.hit_rate})
    return {
        "rows": rows,
        "medians": [
            summarise(strategy, medians(of_one), len(requests))
            for strategy, of_one in times.items()
        ],
    }


def summarise(strategy: str, times: Sequence[float], requests: int) -> dict[str, Any]:
    """Return a row of a strategy from its milliseconds per step."""
    return {
        "strategy": strategy,
        "step_ms": statistics.median(times),
        "request_ms": sum(times) / requests,
        "steps": len(times),
    }


def medians(rounds: Sequence[Sequence[float]]) -> list[float]:
    """Return the median of each step over the rounds of one strategy.

    Raises:
        ValueError: The rounds have different numbers of steps.
    """
    if len({len(times) for times in rounds}) != 1:
        counts = ", ".join(str(len(times)) for times in rounds)
        raise ValueError(f"the same requests took different numbers of steps: {counts}")
    return [statistics.median(step) for step in zip(*rounds, strict=True)]
