# SPDX-License-Identifier: Apache-2.0
"""What is replayed: the strategies, the models, the traffic and the grids of runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.prefix_cache.traces import agents, short_prompts
from vllm_hybrid_kv.tools.replay.trace import TracedRequest, read_trace

GIB = 1 << 30
SHAPES = Path(__file__).with_name("shapes")
"""Models by their public `config.json`, less what no layer's size depends on."""

MEMORY, BY_MODEL, CONTROL, TRAFFIC, OVERHEAD = "memory", "models", "control", "made", "overhead"
PARTS = (MEMORY, BY_MODEL, CONTROL, TRAFFIC, OVERHEAD)
"""The benchmark's parts."""

PUBLIC = "public"
MADE: dict[str, Callable[[int], list[TracedRequest]]] = {
    "agents": agents,
    "short prompts": short_prompts,
}
"""Traces that are made here, by name."""

STOCK = "stock"
STOCK_16 = "stock, unit 16"
FIXED_POINT = "fixed_point"
HYBRID_AWARE = "hybrid_aware"
STRATEGIES = {
    STOCK: {"coordinator": "stock", "prefix_match_unit": "stock"},
    # `auto` is 16 tokens for every model here.
    STOCK_16: {"coordinator": "stock", "prefix_match_unit": "auto"},
    FIXED_POINT: {"coordinator": "fixed_point", "prefix_match_unit": "auto"},
    HYBRID_AWARE: {"coordinator": "hybrid_aware", "prefix_match_unit": "auto"},
}
"""The plugin's settings, by the name of the line in tables and plots."""

MAIN_MODEL = "qwen3.6-35b-a3b"
MODELS = (MAIN_MODEL, "nemotron-nano-9b-v2", "jamba-1.5-mini")
ATTENTION_ONLY = "llama-3.1-8b"
CONTROLS = (ATTENTION_ONLY, "gpt-oss-20b")
"""Models with no states: attention only, and sliding windows beside it."""
MAIN_DTYPE = "turboquant_k8v4"
DTYPES = ("auto", "fp8", MAIN_DTYPE)

CONCURRENCY = 32
"""Requests in flight."""


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        part: The part of the benchmark that it is of.
        model: The name of a shape.
        kv_cache_dtype: vLLM's.
        trace: `PUBLIC`, or a name of `MADE`.
        requests: The number of its requests that are sent.
        memory: GiB of KV cache.
        strategy: A name of `STRATEGIES`.
    """

    part: str
    model: str
    kv_cache_dtype: str
    trace: str
    requests: int
    memory: float
    strategy: str

    @property
    def setting(self) -> tuple[str, str, str, int, float]:
        """All but the strategy: what runs that are compared have in common."""
        return self.model, self.kv_cache_dtype, self.trace, self.requests, self.memory

    @property
    def title(self) -> str:
        return (
            f"{self.model}, {self.kv_cache_dtype}, {self.requests:,} requests of {self.trace}, "
            f"{self.memory:g} GiB, {self.strategy}"
        )


@dataclass(frozen=True)
class Grid:
    """The runs of one part: every combination.

    Attributes:
        part: Its name.
        models: Names of shapes.
        dtypes: vLLM's `kv_cache_dtype`.
        traces: `PUBLIC` or names of `MADE`.
        requests: The number of requests of a trace.
        memory: Sizes of the KV cache in GiB.
        strategies: Names of `STRATEGIES`.
    """

    part: str
    models: Sequence[str]
    dtypes: Sequence[str]
    traces: Sequence[str]
    requests: int
    memory: Sequence[float]
    strategies: Sequence[str]

    def cases(self) -> Iterator[Case]:
        for model in self.models:
            for dtype in self.dtypes:
                for trace in self.traces:
                    for memory in self.memory:
                        for strategy in self.strategies:
                            yield Case(
                                self.part, model, dtype, trace, self.requests, memory, strategy
                            )


@dataclass(frozen=True)
class Sources:
    """Where the requests come from.

    Attributes:
        public: The file of the public trace; None where it is not at hand.
    """

    public: Path | None

    def requests(self, trace: str, limit: int) -> list[TracedRequest]:
        """Return a trace's first requests.

        Raises:
            TraceError: The public trace is not in the format.
            ValueError: It has fewer requests, or is not there.
        """
        if trace in MADE:
            return MADE[trace](limit)
        if self.public is None:
            raise ValueError("the public trace was not named")
        found = read_trace(self.public, limit)
        if len(found) < limit:
            raise ValueError(f"{self.public} has {len(found):,} requests, not {limit:,}")
        return found


def fingerprint(requests: Sequence[TracedRequest]) -> str:
    """Return what tells a trace's requests from any other's."""
    text = json.dumps([asdict(request) for request in requests])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
