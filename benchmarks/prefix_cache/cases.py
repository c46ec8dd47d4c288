# SPDX-License-Identifier: Apache-2.0
"""The strategies, models, traces and grids of the benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from benchmarks.prefix_cache.traces import agents, short_prompts
from vllm_hybrid_kv.tools.replay.trace import TracedRequest, read_trace

GIB = 1 << 30
SHAPES = Path(__file__).with_name("shapes")
"""Models by their public `config.json`, reduced to what the sizes of layers depend on."""

MEMORY, BY_MODEL, CONTROL, TRAFFIC, OVERHEAD = "memory", "models", "control", "made", "overhead"
PARTS = (MEMORY, BY_MODEL, CONTROL, TRAFFIC, OVERHEAD)
"""The benchmark's parts."""

PUBLIC = "public"
MADE: dict[str, Callable[[int], list[TracedRequest]]] = {
    "agents": agents,
    "short prompts": short_prompts,
}
"""Synthetic traces by name."""

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
"""The plugin's settings, by name in tables and plots."""

MAIN_MODEL = "qwen3.6-35b-a3b"
MODELS = (MAIN_MODEL, "nemotron-nano-9b-v2", "jamba-1.5-mini")
ATTENTION_ONLY = "llama-3.1-8b"
CONTROLS = (ATTENTION_ONLY, "gpt-oss-20b")
"""Models without states: attention only, and attention with sliding windows."""
MAIN_DTYPE = "turboquant_k8v4"
DTYPES = ("auto", "fp8", MAIN_DTYPE)

CONCURRENCY = 32
"""Requests in flight."""


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        part: A member of `PARTS`.
        model: A folder in `SHAPES`.
        kv_cache_dtype: vLLM's setting.
        trace: `PUBLIC`, or a key of `MADE`.
        requests: How many requests of the trace are sent.
        memory: GiB of KV cache.
        strategy: A key of `STRATEGIES`.
    """

    part: str
    model: str
    kv_cache_dtype: str
    trace: str
    requests: int
    memory: float
    strategy: str

    @property
    def trace_key(self) -> str:
        return f"{self.trace} {self.requests}"


def grid(
    part: str,
    models: Sequence[str],
    dtypes: Sequence[str],
    traces: Sequence[str],
    requests: int,
    memory: Sequence[float],
    strategies: Sequence[str],
) -> list[Case]:
    """Return the cases of one part: every combination."""
    return [
        Case(part, model, dtype, trace, requests, size, strategy)
        for model, dtype, trace, size, strategy in product(
            models, dtypes, traces, memory, strategies
        )
    ]


def requests_of(trace: str, limit: int, public: Path | None) -> list[TracedRequest]:
    """Return the first requests of a trace.

    Args:
        trace: `PUBLIC`, or a key of `MADE`.
        limit: How many.
        public: The file of the public trace, if it is available.

    Raises:
        TraceError: The public trace has another format.
        ValueError: It has fewer requests, or is not available.
    """
    if trace in MADE:
        return MADE[trace](limit)
    if public is None:
        raise ValueError("the public trace is needed: pass --trace")
    requests = read_trace(public, limit)
    if len(requests) < limit:
        raise ValueError(f"{public} has {len(requests):,} requests, not {limit:,}")
    return requests
