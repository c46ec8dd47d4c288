# SPDX-License-Identifier: Apache-2.0
"""Replay cases, and time the scheduler, in processes of their own."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.prefix_cache.cases import (
    CONCURRENCY,
    ENGINE_ARGUMENTS,
    SHAPES,
    STRATEGIES,
    Case,
    requests_of,
)
from vllm_hybrid_kv.settings import ENVIRONMENT_PREFIX
from vllm_hybrid_kv.tools.replay.peers import PEERS

if TYPE_CHECKING:
    from vllm_hybrid_kv.tools.plan.engine import Model
    from vllm_hybrid_kv.tools.replay.scheduler import Tally
    from vllm_hybrid_kv.tools.replay.trace import TracedRequest

Row = dict[str, Any]

GIB = 1 << 30

CASES_PER_PROCESS = 8
"""A process builds its model once for all its cases. With more cases per process, some processes
would end long before others."""

ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_PLUGINS": "hybrid_kv",
    "HF_HUB_OFFLINE": "1",
    # A scheduler is one thread.
    "OMP_NUM_THREADS": "1",
}


def processes(jobs: int) -> ProcessPoolExecutor:
    """Return an executor that runs each call in a new process with `ENVIRONMENT`."""
    return ProcessPoolExecutor(jobs, get_context("spawn"), _prepare, max_tasks_per_child=1)


def _prepare() -> None:
    # The plugin's variables would override the settings that are compared here.
    for name in [name for name in os.environ if name.startswith(ENVIRONMENT_PREFIX)]:
        del os.environ[name]
    os.environ.update(ENVIRONMENT)
    # Send what vLLM and torch print to stderr, because stdout holds the report.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())


def describe(case: Case) -> Model:
    """Return the model of a case, with the default settings of `vllm-hybrid-kv replay`."""
    from vllm_hybrid_kv.tools.plan.vllm_import import import_vllm

    import_vllm()
    from vllm_hybrid_kv.tools.plan.engine import Model

    return Model(
        {
            "model": str(SHAPES / case.model),
            "kv_cache_dtype": case.dtype,
            "block_size": 16,
            "max_num_seqs": CONCURRENCY,
            "max_num_batched_tokens": 8192,
            "enable_prefix_caching": True,
            "gpu_memory_utilization": 0.1,
            **ENGINE_ARGUMENTS.get(case.strategy, {}),
        }
    )


def run_batch(cases: Sequence[Case], public: Path | None, skip: int = 0) -> list[Row]:
    """Replay cases of one model, dtype, trace and engine, and return a row for each.

    The first `skip` requests are replayed, but their tokens are not counted.
    """
    from vllm_hybrid_kv.errors import HybridKVError
    from vllm_hybrid_kv.tools.replay.scheduler import Replay

    requests = requests_of(cases[0].trace, cases[0].requests, public)
    model = describe(cases[0])
    rows = []
    for case in cases:
        if case.strategy in PEERS:
            rows.append(_simulate(case, model, requests, skip))
            continue
        try:
            engine = model.engine(int(case.memory * GIB), dict(STRATEGIES[case.strategy]))
        except HybridKVError:
            raise
        except ValueError as error:
            # vLLM's planner raises this if a request of `max_model_len` does not fit.
            reason = str(error).strip().split("\n")[0]
            rows.append({**asdict(case), "fits": False, "hit_tokens": 0, "reason": reason})
            continue
        tally = Replay(engine, requests, CONCURRENCY).run()
        rows.append(
            {
                **asdict(case),
                "fits": True,
                "blocks": engine.kv_cache_config.num_blocks,
                "block_tokens": engine.scheduler_block_size,
                "match_tokens": engine.hash_block_size,
                **_counts(tally, requests, skip),
            }
        )
    return rows


def _counts(tally: Tally, requests: Sequence[TracedRequest], skip: int) -> Row:
    prompt_tokens = sum(request.input_length for request in requests[skip:])
    hit_tokens = sum(tally.hits[skip:])
    return {
        "prompt_tokens": prompt_tokens,
        "hit_tokens": hit_tokens,
        "hit_rate": hit_tokens / prompt_tokens,
        # Two runs have equal digests if each request hit the same number of tokens.
        "hits_digest": hashlib.sha256(json.dumps(tally.hits).encode()).hexdigest()[:16],
        "recomputed_tokens": tally.recomputed_tokens,
        "preemptions": tally.preemptions,
        "steps": tally.steps,
    }


def _simulate(case: Case, model: Model, requests: Sequence[TracedRequest], skip: int) -> Row:
    from vllm_hybrid_kv.tools.replay.peers.loop import sizes
    from vllm_hybrid_kv.tools.replay.peers.registry import best_run

    peer = best_run(
        case.strategy,
        sizes(model.specs, int(case.memory * GIB), model.text_config),
        lambda peer: peer.run(requests, CONCURRENCY, model.max_num_batched_tokens),
    )
    return {
        **asdict(case),
        "fits": True,
        "match_tokens": peer.unit,
        **_counts(peer.tally, requests, skip),
    }


def batches(cases: Iterable[Case]) -> list[list[Case]]:
    """Split cases by model, dtype, trace and engine, at most `CASES_PER_PROCESS` each."""
    alike: dict[tuple[Any, ...], list[Case]] = {}
    for case in cases:
        arguments = str(ENGINE_ARGUMENTS.get(case.strategy))
        key = (case.model, case.dtype, case.trace, case.requests, arguments)
        alike.setdefault(key, []).append(case)
    return [
        some[start : start + CASES_PER_PROCESS]
        for some in alike.values()
        for start in range(0, len(some), CASES_PER_PROCESS)
    ]


def sweep(cases: Sequence[Case], public: Path | None, jobs: int, skip: int = 0) -> Iterator[Row]:
    """Run cases in `jobs` processes at a time, and yield a row for each (see `run_batch`).

    Raises:
        Exception: The error of a process. Processes that have not started are cancelled.
    """
    some = batches(cases)
    with processes(jobs) as pool:
        for rows in pool.map(partial(run_batch, public=public, skip=skip), some):
            yield from rows


def measure_overhead(cases: Sequence[Case], public: Path | None, rounds: int) -> list[Row]:
    """Time the scheduler once per case. The cases may differ only in their strategy.

    One process replays the same requests with each strategy in turn, after a short warm-up. Every
    other round has the reverse order, because a shared machine changes its speed. Only `schedule`
    and `update_from_output` are timed. A strategy takes the same steps in every round. Each step's
    median over the rounds is reported: it removes interruptions, but keeps work that a strategy
    does only every 64 requests.

    Returns:
        A row for each case, with milliseconds per step (median) and per request (all steps), and
        milliseconds per request of each round.
    """
    from vllm_hybrid_kv.tools.replay.scheduler import Replay

    requests = requests_of(cases[0].trace, cases[0].requests, public)
    model = describe(cases[0])
    times: dict[Case, list[list[float]]] = {case: [] for case in cases}
    for number in range(rounds + 1):
        for case in cases if number % 2 else reversed(cases):
            sent = requests if number else requests[: 2 * CONCURRENCY]
            engine = model.engine(int(case.memory * GIB), dict(STRATEGIES[case.strategy]))
            replay = Replay(engine, sent, CONCURRENCY)
            # vLLM's engine does this after start-up too.
            gc.collect()
            gc.freeze()
            tally = replay.run()
            gc.unfreeze()
            if number:
                times[case].append([1e3 * seconds for seconds in tally.schedule_seconds])
    rows = []
    for case, of_rounds in times.items():
        steps = medians(of_rounds)
        rows.append(
            {
                **asdict(case),
                "steps": len(steps),
                "step_ms": statistics.median(steps),
                "request_ms": sum(steps) / len(requests),
                "rounds_ms": [sum(of_round) / len(requests) for of_round in of_rounds],
            }
        )
    return rows


def medians(rounds: Sequence[Sequence[float]]) -> list[float]:
    """Return each step's median time. `rounds` has the times of all steps, for each round.

    Raises:
        ValueError: The rounds have different numbers of steps.
    """
    if len({len(times) for times in rounds}) != 1:
        counts = ", ".join(str(len(times)) for times in rounds)
        raise ValueError(f"the same requests took different numbers of steps: {counts}")
    return [statistics.median(step) for step in zip(*rounds, strict=True)]
