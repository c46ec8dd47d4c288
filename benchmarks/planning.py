# SPDX-License-Identifier: Apache-2.0
"""How long does it take to plan the pages of 200 layers?

    python -m benchmarks.planning [--out DIR] [--rounds N]

Every strategy plans the same layers, made of vLLM's own specs, in turn in one process. Times are
medians over rounds, of the processor's time for this thread, because planning waits for nothing and
the machine may be shared; each round plans new spec objects, as the first plan of an engine does.
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
from fractions import Fraction
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

from testing.machine import host
from vllm_hybrid_kv.planning.lcm import unify_by_lcm
from vllm_hybrid_kv.planning.min_waste import REFERENCE_REQUEST, unify_with_least_waste, waste

LAYERS = 200
LIMIT_MS = 10.0
"""What a plan may take at most."""

Specs = dict[str, KVCacheSpec]
STRATEGIES: dict[str, Callable[[Any], Mapping[str, KVCacheSpec]]] = {
    "stock": unify_kv_cache_spec_page_size,
    "lcm": unify_by_lcm,
    "min_waste": unify_with_least_waste,
    "min_waste, match unit weighed": partial(
        unify_with_least_waste, reference=Fraction(REFERENCE_REQUEST)
    ),
}


def _attention(cls: Any, slot: int, **fields: Any) -> KVCacheSpec:
    fields = {"block_size": 16, "num_kv_heads": 2, "head_size": 256, "dtype": torch.uint8, **fields}
    return cls(state_content_bytes=slot, **fields)


def _k8v4() -> KVCacheSpec:
    return _attention(FullAttentionSpec, 388)


def _bf16() -> KVCacheSpec:
    return _attention(FullAttentionSpec, 1_024)


def _window() -> KVCacheSpec:
    return _attention(SlidingWindowSpec, 584, sliding_window=1_024)


def _chunked() -> KVCacheSpec:
    return _attention(ChunkedLocalAttentionSpec, 196, num_kv_heads=7, attention_chunk_size=8_192)


def _draft() -> KVCacheSpec:
    return _attention(FullAttentionSpec, 512, num_kv_heads=4, block_stride_alignment=MultipleOf(64))


def _mla() -> KVCacheSpec:
    return MLAAttentionSpec(block_size=64, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)


def _state() -> KVCacheSpec:
    return MambaSpec(block_size=16, shapes=((2_146_304,),), dtypes=(torch.uint8,))


MIXTURES: dict[str, list[Callable[[], KVCacheSpec]]] = {
    "k8v4, states": [_k8v4, _state, _state, _state],
    "k8v4, bf16, sliding window": [_k8v4, _bf16, _window],
    "k8v4, bf16, sliding window, chunked local": [_k8v4, _bf16, _window, _chunked],
    "MLA, sliding window, draft": [_mla, _mla, _window, _draft],
    "all seven": [_k8v4, _bf16, _window, _chunked, _draft, _mla, _state],
}


def layers(mixture: str) -> Specs:
    """Return the specs of a model's layers, every one an object of its own."""
    makers = MIXTURES[mixture]
    return {f"model.layers.{index}": makers[index % len(makers)]() for index in range(LAYERS)}


class Row(NamedTuple):
    """What planning with a strategy took, and its plan: a page in bytes, a match unit in tokens."""

    ms: float
    page: int
    waste: float
    match_unit: int


Rows = dict[str, Row | None]


def measure(mixture: str, rounds: int) -> Rows:
    """Return a row for each strategy; None if it has no plan."""
    found: Rows = {}
    for name, strategy in STRATEGIES.items():
        times = []
        try:
            for _ in range(rounds):
                specs = layers(mixture)
                gc.collect(0)
                start = time.thread_time()
                plan = strategy(dict(specs))
                times.append(1e3 * (time.thread_time() - start))
        except NotImplementedError:
            found[name] = None
            continue
        (page,) = {spec.page_size_bytes for spec in plan.values()}
        unit = math.lcm(*(spec.block_size for spec in plan.values()))
        found[name] = Row(statistics.median(times), page, float(waste(specs, plan)), unit)
    return found


def table(results: Mapping[str, Rows], load: float) -> str:
    """Write the results as Markdown."""
    where = host()
    lines = [
        f"# Planning the pages of {LAYERS} layers",
        "",
        f"{where['cpu']}, {where['cpus']} CPUs; Python {where['python']}, vLLM {where['vllm']}; "
        f"load average {load:.1f} at the start. `python -m benchmarks.planning`.",
        "",
        "Milliseconds of processor time are medians. The page is in bytes, padding is the share of "
        "the pool, and the match unit is the least common multiple of all blocks, in tokens.",
        "",
        "| layers, in equal parts or as listed | strategy | ms | page | padding | match unit |",
        "|---|---|---|---|---|---|",
    ]
    for mixture, found in results.items():
        for name, row in found.items():
            cells = (
                f"{row.ms:.2f} | {row.page:,} | {100 * row.waste:.2f} % | {row.match_unit:,}"
                if row
                else "no plan | | | "
            )
            lines.append(f"| {mixture} | `{name}` | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, write, and return 1 if planning takes too long."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.planning", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--rounds", type=int, default=101)
    arguments = parser.parse_args()
    logging.getLogger("vllm").setLevel(logging.WARNING)
    load = os.getloadavg()[0]
    results = {mixture: measure(mixture, arguments.rounds) for mixture in MIXTURES}
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = table(results, load)
    (arguments.out / "planning.md").write_text(text)
    print(text)
    slow = [
        f"goal missed: {mixture}, {name}: {row.ms:.1f} ms, not below {LIMIT_MS}"
        for mixture, found in results.items()
        for name, row in found.items()
        if name.startswith("min_waste") and row is not None and row.ms >= LIMIT_MS
    ]
    print(*slow, sep="\n", end="\n" if slow else "")
    return 1 if slow else 0


if __name__ == "__main__":
    raise SystemExit(main())
