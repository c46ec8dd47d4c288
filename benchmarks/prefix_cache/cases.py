# SPDX-License-Identifier: Apache-2.0
"""Define the parts, strategies, models and traces of the benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.prefix_cache.traces import agents, short_prompts
from vllm_hybrid_kv.tools.replay.peers import PEERS
from vllm_hybrid_kv.tools.replay.trace import TracedRequest, read_trace

SHAPES = Path(__file__).with_name("shapes")
"""Folders of models with a public `config.json`, reduced to fields that change layer sizes."""

PUBLIC = "public"
SYNTHETIC: dict[str, Callable[[int], list[TracedRequest]]] = {
    "agents": agents,
    "short prompts": short_prompts,
}
"""Synthetic traces by name."""

STOCK = "stock"
STOCK_16 = "stock, unit 16"
FIXED_POINT = "fixed_point"
HYBRID_AWARE = "hybrid_aware"
STOCK_SHARED = "stock, unit 16, shared prefixes"
STOCK_DENSE = "stock, unit 16, all blocks"
SGLANG, MARCONI = PEERS
STRATEGIES = {
    STOCK: {"coordinator": "stock", "prefix_match_unit": "stock"},
    # For every model here, `auto` picks a match unit of 16 tokens.
    STOCK_16: {"coordinator": "stock", "prefix_match_unit": "auto"},
    FIXED_POINT: {"coordinator": "fixed_point", "prefix_match_unit": "auto"},
    HYBRID_AWARE: {"coordinator": "hybrid_aware", "prefix_match_unit": "auto"},
    STOCK_SHARED: {"coordinator": "stock", "prefix_match_unit": "stock"},
    STOCK_DENSE: {"coordinator": "stock", "prefix_match_unit": "stock"},
    # Peers are simulated, so they have no settings.
    SGLANG: {},
    MARCONI: {},
}
"""The plugin's settings of each strategy, by the strategy's name in tables and plots."""

_UNIT_16 = {
    # On vLLM 0.33 `auto` chooses whole blocks for the main model if the coordinator is `stock`.
    "prefix_match_unit": 16,
    # vLLM ignores it without draft tokens.
    "enable_mamba_shared_prefix_checkpoint": True,
}
ENGINE_ARGUMENTS: dict[str, dict[str, Any]] = {
    STOCK_SHARED: _UNIT_16,
    # Cache the state of every block. By default vLLM caches those where prompts end or branch.
    STOCK_DENSE: {**_UNIT_16, "prefix_cache_retention_interval": None},
}
"""Further arguments of vLLM's engine, by strategy."""

MAIN_MODEL = "qwen3.6-35b-a3b"
ATTENTION_ONLY = "llama-3.1-8b"
MAIN_DTYPE = "turboquant_k8v4"

CONCURRENCY = 32
"""Requests in flight."""


@dataclass(frozen=True)
class Part:
    """A part of the benchmark, which runs every combination of its values.

    Attributes:
        title: The heading of its table.
        strategies: Keys of `STRATEGIES`.
        requests: How many requests of each trace are sent.
        memory: Sizes of the KV cache in GiB.
        models: Folders in `SHAPES`.
        dtypes: vLLM's `kv_cache_dtype`.
        traces: `PUBLIC`, or keys of `SYNTHETIC`.
    """

    title: str
    strategies: Sequence[str]
    requests: int
    memory: Sequence[float]
    models: Sequence[str] = (MAIN_MODEL,)
    dtypes: Sequence[str] = (MAIN_DTYPE,)
    traces: Sequence[str] = (PUBLIC,)


PARTS = {
    "memory": Part(
        "The public trace, by memory",
        (STOCK, STOCK_16, FIXED_POINT, HYBRID_AWARE),
        3000,
        (4, 20, 80, 200, 400),
    ),
    "peers": Part(
        "Other systems",
        (STOCK, STOCK_SHARED, STOCK_DENSE, SGLANG, MARCONI, HYBRID_AWARE),
        3000,
        (4, 20, 80),
    ),
    "models": Part(
        "Models and KV cache dtypes",
        (STOCK, HYBRID_AWARE),
        300,
        (4, 20, 80, 400),
        models=(MAIN_MODEL, "nemotron-nano-9b-v2", "jamba-1.5-mini"),
        dtypes=("auto", "fp8", MAIN_DTYPE),
    ),
    "control": Part(
        "Models without states",
        (STOCK, FIXED_POINT, HYBRID_AWARE),
        200,
        (4, 20, 80, 400),
        models=(ATTENTION_ONLY, "gpt-oss-20b"),
        dtypes=("auto",),
    ),
    "synthetic": Part(
        "Synthetic traffic",
        (STOCK, STOCK_16, HYBRID_AWARE),
        600,
        (4, 8, 20, 40),
        traces=tuple(SYNTHETIC),
    ),
    "overhead": Part("Time in the scheduler", (STOCK, STOCK_16, HYBRID_AWARE), 300, (20,)),
}


@dataclass(frozen=True)
class Case:
    """One run, with one combination of the values of a part."""

    part: str
    model: str
    dtype: str
    trace: str
    requests: int
    memory: float
    strategy: str


def cases_of(name: str, part: Part) -> list[Case]:
    return [
        Case(name, model, dtype, trace, part.requests, memory, strategy)
        for model, dtype, trace, memory, strategy in product(
            part.models, part.dtypes, part.traces, part.memory, part.strategies
        )
    ]


def requests_of(trace: str, limit: int, public: Path | None) -> list[TracedRequest]:
    """Return the first requests of a trace.

    Args:
        trace: `PUBLIC`, or a key of `SYNTHETIC`.
        limit: How many requests.
        public: The file of the public trace, if it is available.

    Raises:
        TraceError: The public trace has another format.
        ValueError: The public trace has fewer requests, or is not available.
    """
    if trace in SYNTHETIC:
        return SYNTHETIC[trace](limit)
    if public is None:
        raise ValueError("the public trace is needed: pass --trace")
    requests = read_trace(public, limit)
    if len(requests) < limit:
        raise ValueError(f"{public} has {len(requests):,} requests, not {limit:,}")
    return requests
