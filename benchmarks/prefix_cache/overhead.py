# SPDX-License-Identifier: Apache-2.0
"""What does a strategy cost in the scheduler, beside stock?

One process replays the same requests with each strategy in turn, round after round, every other
round the other way about, for a shared machine changes its speed. Only `schedule` and
`update_from_output` are timed; what the replay itself does between them is not.

A strategy takes the same steps in every round, so each step counts with its median over the rounds:
what comes between in one of them does not, what the strategy does every 64 requests does.
"""

from __future__ import annotations

import gc
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.prefix_cache.cases import (
    CONCURRENCY,
    GIB,
    HYBRID_AWARE,
    STOCK,
    STOCK_16,
    STRATEGIES,
    Sources,
)
from benchmarks.prefix_cache.processes import serve
from benchmarks.prefix_cache.worker import describe

TIMED = (STOCK, STOCK_16, HYBRID_AWARE)


@dataclass(frozen=True)
class Timing:
    """What is timed.

    Attributes:
        model: The name of a shape.
        kv_cache_dtype: vLLM's.
        trace: The name of a trace.
        public: The file of the public trace, if there is one.
        requests: The number of its requests that are sent.
        memory: GiB of KV cache.
        rounds: How often each strategy has its turn.
    """

    model: str
    kv_cache_dtype: str
    trace: str
    public: str | None
    requests: int
    memory: float
    rounds: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def measure(timing: Timing) -> Iterator[dict[str, Any]]:
    """Time every turn, after a short one of each that is not counted.

    Yields:
        For each turn the strategy, the round, milliseconds in the scheduler by step (median) and by
        request (all steps together), and what the turn came to. After the last, for each strategy
        the same of its steps' medians over the rounds, without a round.
    """
    from vllm_hybrid_kv.tools.replay.scheduler import Replay

    sources = Sources(Path(timing.public) if timing.public else None)
    requests = sources.requests(timing.trace, timing.requests)
    model = describe(timing.model, timing.kv_cache_dtype)
    rounds: dict[str, list[list[float]]] = {strategy: [] for strategy in TIMED}
    for number in range(timing.rounds + 1):
        for strategy in TIMED if number % 2 else reversed(TIMED):
            sent = requests if number else requests[: 2 * CONCURRENCY]
            settings = dict(STRATEGIES[strategy])
            replay = Replay(model.engine(int(timing.memory * GIB), settings), sent, CONCURRENCY)
            # As vLLM's engine does once it is up.
            gc.collect()
            gc.freeze()
            tally = replay.run()
            gc.unfreeze()
            times = [1e3 * seconds for seconds in tally.schedule_seconds]
            if number:
                rounds[strategy].append(times)
                found = came_to(strategy, times, tally.requests)
                yield {**found, "round": number, "hit_rate": tally.hit_rate}
    for strategy, turns in rounds.items():
        yield came_to(strategy, medians(turns), len(requests))


def came_to(strategy: str, times: Sequence[float], requests: int) -> dict[str, Any]:
    """Return what the milliseconds of a strategy's steps come to."""
    return {
        "strategy": strategy,
        "step_ms": statistics.median(times),
        "request_ms": sum(times) / requests,
        "steps": len(times),
    }


def medians(turns: Sequence[Sequence[float]]) -> list[float]:
    """Return each step's median over the turns of one strategy.

    Raises:
        ValueError: They did not take the same steps.
    """
    if len({len(times) for times in turns}) != 1:
        taken = ", ".join(str(len(times)) for times in turns)
        raise ValueError(f"the same requests took different numbers of steps: {taken}")
    return [statistics.median(step) for step in zip(*turns, strict=True)]


if __name__ == "__main__":
    serve(lambda text: measure(Timing(**json.loads(text))))
