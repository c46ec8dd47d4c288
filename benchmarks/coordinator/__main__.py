# SPDX-License-Identifier: Apache-2.0
"""The command `python -m benchmarks.coordinator`."""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections import deque
from itertools import product
from pathlib import Path
from typing import Any

from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator
from vllm.v1.core.kv_cache_utils import BlockHash

from benchmarks import markdown
from benchmarks.coordinator.contents import (
    CONTENTS,
    MODELS,
    PROMPTS,
    TOKENS,
    Contents,
    Model,
    fill,
    make_coordinator,
    prompt_hashes,
)
from testing.machine import host
from vllm_hybrid_kv.coordinator.longest_hit import FixedPointCoordinator

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
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
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
