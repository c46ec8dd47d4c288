# SPDX-License-Identifier: Apache-2.0
"""Time prefix cache lookups, compared with vLLM's own coordinator.

    python -m benchmarks.coordinator [--out DIR]

The coordinators and block pools are real, and no model runs. Prompts have 131,072 tokens. Calls of
both coordinators alternate in one process. Both pools hold the same blocks: those of four prompts,
which are looked up in turn, and those of other requests. Each call is a request's first lookup: its
hashes are new objects, whose hash values Python has not cached. Times are medians. Ratios are
computed in each round, because a shared machine changes its speed, and their median is reported.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator
from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)

from benchmarks import markdown
from testing.coordinator.contents import coordinator_of, full, insert, layout_of, mamba, window
from testing.machine import host
from vllm_hybrid_kv.coordinator.longest_hit import FixedPointCoordinator

TOKENS = 131_072
PROMPTS = 4
"""How many prompts are looked up in turn."""


@dataclass(frozen=True)
class Model:
    """The KV groups of a model, and its hash unit in tokens."""

    name: str
    specs: tuple[KVCacheSpec, ...]
    unit: int


@dataclass(frozen=True)
class Contents:
    """Which parts of every prompt are cached.

    Attributes:
        name: The name in tables.
        attention: The full-attention blocks in this first share of the prompt are cached.
        others: States and windows are cached only where this share ends; 1 means everywhere.
    """

    name: str
    attention: float
    others: float


EVERYTHING = Contents("all of it", 1.0, 1.0)
CONTENTS = (
    EVERYTHING,
    Contents("states and windows at half of it only", 1.0, 0.5),
    Contents("no states or windows", 1.0, 0.0),
    Contents("none of it", 0.0, 0.0),
)

_STATES_2768 = (full(2768), *[mamba(2768)] * 3)
MODELS = (
    Model("full attention, 3 Mamba, blocks of 2768 (Qwen3.6-35B-A3B, k8v4)", _STATES_2768, 2768),
    Model("the same", _STATES_2768, 16),
    Model("full attention, 3 Mamba, blocks of 528", (full(528), *[mamba(528)] * 3), 16),
    Model(
        "full attention, 3 sliding windows of 1024, blocks of 16 (as Gemma 3)",
        (full(16), *[window(16, 1024)] * 3),
        16,
    ),
    Model(
        "full attention, sliding windows of 512, 1024 and 4096, blocks of 16",
        (full(16), window(16, 512), window(16, 1024), window(16, 4096)),
        16,
    ),
)


def prompt_hashes(model: Model, seed: int) -> list[BlockHash]:
    """Make random block hashes of a prompt. A lookup only compares hashes, so any will do."""
    source = random.Random(f"{model.name} {model.unit} {seed}")
    return [BlockHash(source.randbytes(32)) for _ in range(TOKENS // model.unit)]


def make_coordinator(
    coordinator_class: type[HybridKVCacheCoordinator], model: Model
) -> HybridKVCacheCoordinator:
    """Make a coordinator whose pool has room for twice as many prompts as are looked up."""
    blocks = 2 * PROMPTS * sum(TOKENS // spec.block_size + 3 for spec in model.specs)
    return coordinator_of(layout_of(*model.specs, unit=model.unit), coordinator_class, blocks)


def cached_ends(model: Model, contents: Contents, spec: KVCacheSpec) -> Iterable[int]:
    """List the prompt lengths (in tokens) at which the cached blocks of a group end."""
    size = spec.block_size
    ends = range(size, TOKENS + 1, size)
    if isinstance(spec, FullAttentionSpec):
        return [end for end in ends if end <= contents.attention * TOKENS]
    if contents.others == 1:
        # With a fine match unit, the state at the prompt's end is inside a block.
        last = [(TOKENS - 1) // model.unit * model.unit] if isinstance(spec, MambaSpec) else []
        return [*ends, *last]
    at = [end for end in ends if end <= contents.others * TOKENS]
    if isinstance(spec, SlidingWindowSpec):
        return at[len(at) - cdiv(spec.sliding_window - 1, size) :] if at else []
    return at[-1:]


def fill(
    coordinator: HybridKVCacheCoordinator,
    model: Model,
    contents: Contents,
    prompts: list[list[BlockHash]],
) -> None:
    """Cache the `contents` of every prompt, and all blocks of equally many other prompts."""
    free = iter(coordinator.block_pool.blocks[1:])
    others = [prompt_hashes(model, -1 - index) for index in range(len(prompts))]
    for hashes, cached in [
        *((hashes, EVERYTHING) for hashes in others),
        *((hashes, contents) for hashes in prompts),
    ]:
        for group, spec in enumerate(model.specs):
            for end in cached_ends(model, cached, spec):
                insert(coordinator.block_pool, hashes, group, end, next(free))


ROUNDS = 200
COORDINATORS = {"vLLM": HybridKVCacheCoordinator, "fixed_point": FixedPointCoordinator}


def measure(model: Model, contents: Contents) -> dict[str, Any]:
    """Time the lookups of both coordinators, and check that their hits are equal."""
    prompts = [prompt_hashes(model, number) for number in range(PROMPTS)]
    sides = {name: make_coordinator(kind, model) for name, kind in COORDINATORS.items()}
    for coordinator in sides.values():
        fill(coordinator, model, contents, prompts)
    times: dict[str, list[float]] = {name: [] for name in sides}
    hits: dict[str, set[int]] = {name: set() for name in sides}
    # Hold the hashes of the last two requests, so that no timed call frees them.
    held: dict[str, deque[list[BlockHash]]] = {name: deque(maxlen=2) for name in sides}
    gc.collect()
    gc.disable()
    for number in range(ROUNDS + 1):
        for name, coordinator in sides.items():
            hashes = [BlockHash(bytes(bytearray(one))) for one in prompts[number % PROMPTS]]
            held[name].append(hashes)
            start = time.perf_counter()
            _, length, _ = coordinator.find_longest_cache_hit(hashes, TOKENS - 1)
            taken = 1e3 * (time.perf_counter() - start)
            hits[name].add(length)
            # The first round warms the CPU caches.
            if number:
                times[name].append(taken)
    gc.enable()
    assert hits["vLLM"] == hits["fixed_point"], hits
    return {
        "model": model.name,
        "unit": model.unit,
        "contents": contents.name,
        "hit": hits["fixed_point"].pop(),
        "ms": {name: statistics.median(of_one) for name, of_one in times.items()},
        "ms_90_percent": {
            name: statistics.quantiles(of_one, n=10)[-1] for name, of_one in times.items()
        },
        "times_faster": statistics.median(
            stock / ours for stock, ours in zip(times["vLLM"], times["fixed_point"], strict=True)
        ),
    }


def report(lookups: list[dict[str, Any]], load: float) -> str:
    rows = []
    for row in lookups:
        times = [
            f"{row['ms'][name]:.3f} ({row['ms_90_percent'][name]:.3f})" for name in COORDINATORS
        ]
        where = [row["model"], str(row["unit"]), row["contents"], f"{row['hit']:,}"]
        rows.append([*where, *times, f"{row['times_faster']:.1f}"])
    columns = ["KV groups", "match unit", "cached", "hit, tokens", *COORDINATORS, "times faster"]
    lines = [
        "# Prefix cache lookups in four KV groups, compared with vLLM's own coordinator",
        "",
        f"{markdown.machine(host())}; load average {load:.1f} at the start. "
        f"Prompts of {TOKENS:,} tokens.",
        "",
        "Median milliseconds of alternating calls in one process, with the 90th percentile in "
        "brackets. Last column: times faster, the median over rounds.",
        "",
        *markdown.table(columns, rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, write, and return 1 if a lookup is slower than vLLM's."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.coordinator",
        description="Measure prefix cache lookups, compared with vLLM's own coordinator.",
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    out = parser.parse_args().out
    load = os.getloadavg()[0]
    lookups = []
    for model, contents in product(MODELS, CONTENTS):
        row = measure(model, contents)
        print(row["model"], row["unit"], row["contents"], row["hit"], row["ms"], flush=True)
        lookups.append(row)
    out.mkdir(parents=True, exist_ok=True)
    text = report(lookups, load)
    (out / "coordinator.md").write_text(text)
    print(text)
    return int(any(row["times_faster"] < 1 for row in lookups))


if __name__ == "__main__":
    raise SystemExit(main())
