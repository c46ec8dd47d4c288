# SPDX-License-Identifier: Apache-2.0
"""Measure the time to plan the pages of 200 layers.

    python -m benchmarks.planning [--out DIR]

Every strategy plans the same layers in turn in one process. Times are medians of this thread's CPU
time, which excludes other processes of the machine. Planning never waits, so this is its latency
on an idle CPU. Each round plans new spec objects, like the start of an engine.
"""

from __future__ import annotations

import argparse
import gc
import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.core.kv_cache_utils import unify_kv_cache_spec_page_size
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from benchmarks import markdown
from testing.machine import host
from vllm_hybrid_kv.planning.lcm import unify_by_lcm
from vllm_hybrid_kv.planning.min_waste import (
    LONGEST_SEQUENCE,
    REFERENCE_REQUEST,
    unify_with_least_waste,
)
from vllm_hybrid_kv.planning.page_kinds import layer_kind

LAYERS, ROUNDS = 200, 101
LIMIT_MS = 10.0
"""The goal: a plan of `min_waste` takes less than this."""

Specs = dict[str, KVCacheSpec]
STRATEGIES: dict[str, Callable[[Any], Mapping[str, KVCacheSpec]]] = {
    "stock": unify_kv_cache_spec_page_size,
    "lcm": unify_by_lcm,
    "min_waste": unify_with_least_waste,
    "min_waste, match unit weighed": partial(unify_with_least_waste, reference=REFERENCE_REQUEST),
}


def _attention(slot: int, cls: Any = FullAttentionSpec, **fields: Any) -> Callable[[], KVCacheSpec]:
    shape = {"block_size": 16, "num_kv_heads": 2, "head_size": 256, "dtype": torch.uint8}
    return partial(cls, state_content_bytes=slot, **{**shape, **fields})


K8V4, BF16 = _attention(388), _attention(1_024)
WINDOW = _attention(584, SlidingWindowSpec, sliding_window=1_024)
CHUNKED = _attention(196, ChunkedLocalAttentionSpec, num_kv_heads=7, attention_chunk_size=8_192)
DRAFT = _attention(512, num_kv_heads=4, block_stride_alignment=MultipleOf(64))
MLA = partial(MLAAttentionSpec, block_size=64, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
STATE = partial(MambaSpec, block_size=16, shapes=((2_146_304,),), dtypes=(torch.uint8,))

MIXTURES: dict[str, list[Callable[[], KVCacheSpec]]] = {
    "k8v4, states": [K8V4, STATE, STATE, STATE],
    "k8v4, bf16, sliding window": [K8V4, BF16, WINDOW],
    "k8v4, bf16, sliding window, chunked local": [K8V4, BF16, WINDOW, CHUNKED],
    "MLA, sliding window, draft": [MLA, MLA, WINDOW, DRAFT],
    "all seven": [K8V4, BF16, WINDOW, CHUNKED, DRAFT, MLA, STATE],
}


def layers(mixture: str) -> Specs:
    """Make the specs of a model's layers, by name. Each layer has its own object."""
    makers = MIXTURES[mixture]
    return {f"model.layers.{index}": makers[index % len(makers)]() for index in range(LAYERS)}


class Row(NamedTuple):
    """What one strategy plans: time, page in bytes, share of padding, match unit in tokens."""

    ms: float
    page: int
    waste: float
    match_unit: int

    def cells(self) -> tuple[str, ...]:
        waste = f"{100 * self.waste:.2f} %"
        return f"{self.ms:.2f}", f"{self.page:,}", waste, f"{self.match_unit:,}"


Rows = dict[str, Row | None]


def measure(mixture: str) -> Rows:
    """Measure each strategy. Its row is None if the strategy finds no plan."""
    rows: Rows = {}
    for name, strategy in STRATEGIES.items():
        times = []
        try:
            for _ in range(ROUNDS):
                specs = layers(mixture)
                gc.collect(0)
                start = time.thread_time()
                plan = strategy(dict(specs))
                times.append(1e3 * (time.thread_time() - start))
        except NotImplementedError:
            rows[name] = None
            continue
        (page,) = {spec.page_size_bytes for spec in plan.values()}
        unit = math.lcm(*(spec.block_size for spec in plan.values()))
        rows[name] = Row(statistics.median(times), page, _padding(specs, plan), unit)
    return rows


def _padding(before: Specs, plan: Mapping[str, KVCacheSpec]) -> float:
    """Return the share of padding in the pages, for one sequence of `LONGEST_SEQUENCE` tokens."""
    used = sum(
        layer_kind(spec, LONGEST_SEQUENCE).used_in(plan[name]) for name, spec in before.items()
    )
    return 1 - used / sum(spec.page_size_bytes for spec in plan.values())


def table(results: Mapping[str, Rows], load: float) -> str:
    columns = ("layers, in equal parts or as listed", "strategy", "ms", "page", "padding")
    cells = [
        (mixture, f"`{name}`", *(row.cells() if row else ("no plan", "", "", "")))
        for mixture, rows in results.items()
        for name, row in rows.items()
    ]
    lines = [
        f"# Planning the pages of {LAYERS} layers",
        "",
        f"{markdown.machine(host())}; load average {load:.1f} at the start. "
        "`python -m benchmarks.planning`.",
        "",
        "Times are medians of CPU time in ms. Pages are in bytes, padding is a share of the pool. "
        "The match unit is the least common multiple of all blocks, in tokens.",
        "",
        *markdown.table([*columns, "match unit"], cells),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, write the table, and return 1 if a plan misses the goal."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.planning", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    logging.getLogger("vllm").setLevel(logging.WARNING)
    load = os.getloadavg()[0]
    results = {mixture: measure(mixture) for mixture in MIXTURES}
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = table(results, load)
    (arguments.out / "planning.md").write_text(text)
    print(text)
    slow = [
        f"goal missed: {mixture}, {name}: {row.ms:.1f} ms, not below {LIMIT_MS}"
        for mixture, rows in results.items()
        for name, row in rows.items()
        if name.startswith("min_waste") and row is not None and row.ms >= LIMIT_MS
    ]
    print(*slow, sep="\n", end="\n" if slow else "")
    return 1 if slow else 0


if __name__ == "__main__":
    raise SystemExit(main())
