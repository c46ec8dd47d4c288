# SPDX-License-Identifier: Apache-2.0
"""`--tune`: find the fastest tile sizes on this GPU, and print rows for `tuning.MEASURED`.

For each head size and number of rows (an entry of `MOST_ROWS`), candidates run on the same caches:
first all tile sizes, then, with the best of them, several ways to split the keys. All are compared
with the derived size (`derived_tiling`). A candidate is rejected if it does not compile or launch,
or if its output differs. It gets a row only if it is faster by `WORTHWHILE`.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, astuple, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from benchmarks.gpu.children import share_out
from benchmarks.gpu.contenders import Batch, Ours
from benchmarks.gpu.environment import (
    Budget,
    device_for_kernels,
    interpreted,
    l2_bytes,
    machine,
)
from benchmarks.gpu.measure import Call, alternating, ratio
from benchmarks.gpu.sections import small
from benchmarks.gpu.shapes import Heads, Shape, layers_needed
from vllm_hybrid_kv.kernels.triton.tuning import (
    MOST_ROWS,
    Tiling,
    capability_of,
    derived_tiling,
    row_class,
)

WORTHWHILE = 1.02
"""A size gets a row if its speedup over the derived size is at least this. Less is noise."""

LARGEST_ERROR = 0.01
"""Largest accepted difference of a candidate's output from that of the derived size, relative to
the norm of the latter. Two roundings of bf16 cause as much."""

RESERVED = 5.0
"""Seconds reserved for writing."""


class Task(NamedTuple):
    """One row of the table, and the shapes to measure for this head size and number of rows."""

    rows: int
    heads: Heads
    shapes: tuple[Shape, ...]


def tasks() -> list[Task]:
    """List the tasks, decode first."""
    found = []
    for queries, rows in zip((1, 2048, 2, 4, 8), (8, MOST_ROWS[-1], 16, 32, 64), strict=True):
        for heads in (Heads(32, 8, 128), Heads(16, 2, 256), Heads(16, 2, 64)):
            if queries == 2048:
                shapes = [Shape.equal(heads, 1, 8192 + queries, queries)]
            else:
                # With eight query heads per KV head, several tokens have exactly `rows` rows.
                wide = heads if queries == 1 else Heads(8 * heads.kv, heads.kv, heads.size)
                shapes = [Shape.equal(wide, batch, 32768, queries) for batch in (8, 1)]
            found.append(Task(rows, shapes[0].heads, tuple(shapes)))
    return found


def sizes(rows: int) -> list[Tiling]:
    """List the tile sizes to try for a number of rows.

    They have at most one warp for each 16 keys and 16 rows. The registers of eight warps always
    fit a multiprocessor.
    """
    blocks_m = {8: (8, 16), 16: (8, 16), 32: (16, 32), 64: (16, 32, 64)}.get(
        rows, (16, 32, 64, 128)
    )
    return [
        Tiling(block_m, block_n, warps, stages, min(4, 8 // warps))
        for block_m, block_n, warps, stages in itertools.product(
            blocks_m, (32, 64, 128), (1, 2, 4, 8), (2, 3, 5)
        )
        if warps <= block_n // 16 * max(1, block_m // 16)
    ]


def steps_away(one: Tiling, other: Tiling) -> float:
    """Return by how many halvings and doublings two sizes differ."""
    return sum(abs(math.log2(a / b)) for a, b in zip(astuple(one), astuple(other), strict=True))


def row_of(capability: tuple[int, int] | None, task: Task, winner: Tiling) -> str:
    """Return a row of `tuning.MEASURED` as source code."""
    key = (capability, triton.next_power_of_2(task.heads.size), task.rows)
    return f"    {key}: Tiling{astuple(winner)},"


SMALL = Heads(4, 1, 64)
"""Heads for the interpreter."""


class _Trial:
    """The shapes of a task with their caches, on which candidates run.

    Attributes:
        best: The fastest size yet, at first the derived one.
        speedup: Its speedup over the derived size.
        tried: The result of each candidate, for JSON.
    """

    def __init__(self, task: Task, device: torch.device, budget: Budget) -> None:
        self._device, self._budget = device, budget
        rows = task.shapes[0].most_new * task.heads.query // task.heads.kv
        assert row_class(rows) == task.rows
        self._derived = derived_tiling(rows, task.heads.size, capability_of(device))
        self.best, self.speedup = self._derived, 1.0
        self.tried: list[dict[str, Any]] = []
        self._runners: list[tuple[Ours, int, torch.Tensor]] = []
        for shape in task.shapes:
            layers = layers_needed(shape.read_bytes(Ours.stored), l2_bytes(device))
            ours = Ours(Batch(shape, device), layers)
            wanted = ours.attend(0, ours.plan(self._derived)).float().clone()
            self._runners.append((ours, layers, wanted))

    def run(self, candidates: Sequence[Tiling], until: float) -> None:
        """Try candidates, those nearest to the best size first, until the time `until`."""
        best = self.best
        for candidate in sorted(candidates, key=lambda one: steps_away(one, best)):
            if self._budget.spent > until:
                self.tried.append({"left_out": "time was up", "candidate": asdict(candidate)})
                return
            if candidate == self._derived:
                continue
            try:
                speedup = self._speedup(candidate)
            # Usually a candidate needs too many registers or too much memory.
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error)[:200]}"
                self.tried.append({"candidate": asdict(candidate), "rejected": reason})
                continue
            self.tried.append({"candidate": asdict(candidate), "times_as_fast": speedup})
            if speedup > self.speedup:
                self.best, self.speedup = candidate, speedup

    def _speedup(self, candidate: Tiling) -> float:
        """Measure the speedup over the derived size: the geometric mean over all shapes."""
        speedups = []
        for ours, layers, wanted in self._runners:
            plans = {"derived": ours.plan(self._derived), "candidate": ours.plan(candidate)}
            out = ours.attend(0, plans["candidate"]).float()
            distance = float((out - wanted).norm() / wanted.norm().clamp_min(1e-20))
            if not distance <= LARGEST_ERROR:
                raise ValueError(f"output {distance:.1e} away from the derived size's")
            calls: dict[str, list[Call]] = {
                f"ours, {name}": [partial(ours.attend, layer, plan) for layer in range(layers)]
                for name, plan in plans.items()
            }
            times = alternating(calls, self._device, 0.0 if interpreted() else 0.1, {})
            speedups.append(ratio(times["ours, derived"], times["ours, candidate"])["median"])
        return statistics.geometric_mean(speedups)


def _compile(shape: Shape, tiling: Tiling) -> None:
    """Fill Triton's cache on disk. A candidate that fails here is rejected when it is tried."""
    ours = Ours(Batch(small(shape), device_for_kernels()), 1)
    ours.attend(0, ours.plan(tiling))


def tune(folder: Path, seconds: float) -> int:
    """Try the candidates, print the rows for `MEASURED` and write `gpu_tuning.json`; return 0.

    Args:
        folder: For the file.
        seconds: The time, which the rows share evenly.
    """
    budget, device = Budget(seconds), device_for_kernels()
    # The interpreter tries only a few candidates, for a single task.
    capability = capability_of(device)
    wanted = [Task(8, SMALL, (Shape.equal(SMALL, 1, 40),))] if interpreted() else tasks()
    rows: list[str] = []
    log: list[dict[str, Any]] = []
    for place, task in enumerate(wanted):
        start = budget.spent
        share = (budget.seconds - RESERVED - start) / (len(wanted) - place)
        entry: dict[str, Any] = {"head_size": task.heads.size, "rows": task.rows}
        log.append(entry)
        try:
            trial = _Trial(task, device, budget)
        except torch.OutOfMemoryError as error:
            entry["left_out"] = str(error)
            continue
        candidates = sizes(task.rows)[: 2 if interpreted() else None]
        compile_one = partial(_compile, task.shapes[0])
        share_out(compile_one, candidates, 0.4 * (start + share - budget.spent))
        trial.run(candidates, budget.spent + 0.7 * (start + share - budget.spent))
        divisions = [
            replace(trial.best, programs_per_processor=programs, min_split_tiles=tiles)
            for programs, tiles in itertools.product((1, 2, 3, 4, 6), (2, 4, 8, 16))
        ]
        trial.run(divisions[: 1 if interpreted() else None], start + share)
        best, speedup = trial.best, trial.speedup
        entry |= {
            "tried": trial.tried, "winner": asdict(best), "times_as_fast_as_derived": speedup,
        }  # fmt: skip
        if speedup >= WORTHWHILE and capability is not None and not interpreted():
            rows.append(f"    # {speedup:.2f} times as fast as the derived size.")
            rows.append(row_of(capability, task, best))
        print(f"{budget.spent:5.0f} s: {task.heads}, {task.rows} rows: {best}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    everything = {"machine": machine(), "tasks": log, "rows": rows}
    (folder / "gpu_tuning.json").write_text(json.dumps(everything, indent=1, default=str) + "\n")
    print("Rows for MEASURED in kernels/triton/tuning.py:", *(rows or ["none"]), sep="\n")
    return 0
