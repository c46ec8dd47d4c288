# SPDX-License-Identifier: Apache-2.0
"""`--tune`: the fastest tile sizes on this GPU, as rows for `tuning.MEASURED`.

For each class of head sizes and of rows the candidates run in turn on the same caches: first all
tile sizes, then, with the best of them, how finely keys are split. A candidate that does not
compile, launch or agree with the derived size is rejected. The derived size stays unless another
is faster by `WORTHWHILE`.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.contenders import Batch
from benchmarks.gpu.contenders.ours import Ours
from benchmarks.gpu.environment import Budget, free_bytes, l2_bytes, machine
from benchmarks.gpu.measure import Call, alternating, ratio
from benchmarks.gpu.processes import compile_tilings
from benchmarks.gpu.sections import SHARE_OF_MEMORY
from benchmarks.gpu.shapes import SMALLEST, Heads, Preset, Shape, layers_needed
from vllm_hybrid_kv.kernels.triton.tuning import (
    MIN_SPLIT_TILES,
    PROGRAMS_PER_PROCESSOR,
    Rows,
    Tiling,
    capability_of,
    derived_tiling,
    has_tensor_memory,
    head_class,
    origin,
    row_class,
)

WORTHWHILE = 1.02
"""Smallest speedup over the derived size that makes a row: less is noise."""

LARGEST_ERROR = 0.01
"""Largest ||out - derived|| / ||derived|| of a candidate: two roundings of bf16."""

RESERVED = 5.0
"""Seconds reserved for writing."""


@dataclass(frozen=True)
class Task:
    """One row of the table: shapes that stand for a class of rows of a head size."""

    rows: Rows
    shapes: tuple[Shape, ...]

    @property
    def head_size(self) -> int:
        return self.shapes[0].heads.size


def tasks(preset: Preset) -> list[Task]:
    """Return what is tuned, decode first; all rows unless the preset is `SMALLEST`."""
    if preset is SMALLEST:
        return [Task(Rows.UP_TO_16, (Shape(Heads(4, 1, 64), 1, 70),))]
    found = []
    for queries, rows in ((1, Rows.UP_TO_16), (2048, Rows.MORE), (4, Rows.UP_TO_32),
                          (8, Rows.UP_TO_64)):  # fmt: skip
        for heads in (Heads(32, 8, 128), Heads(16, 2, 256), Heads(16, 2, 64)):
            if queries == 2048:
                found.append(Task(rows, (Shape(heads, 1, 8192 + queries, queries),)))
                continue
            # Eight query heads to a KV head make the rows of several tokens fit their class.
            wide = heads if queries == 1 else Heads(8 * heads.kv, heads.kv, heads.size)
            found.append(Task(rows, tuple(Shape(wide, batch, 32768, queries) for batch in (8, 1))))
    return found


def sizes(rows: Rows) -> list[Tiling]:
    """Return the tile sizes that are tried for a class of rows.

    There is at most one warp for each 16 keys and 32 rows.
    """
    blocks_m = {
        Rows.UP_TO_16: (16,), Rows.UP_TO_32: (16, 32), Rows.UP_TO_64: (32, 64),
        Rows.MORE: (32, 64, 128),
    }[rows]  # fmt: skip
    return [
        Tiling(block_m, block_n, warps, stages)
        for block_m, block_n, warps, stages in itertools.product(
            blocks_m, (32, 64, 128), (1, 2, 4, 8), (2, 3, 4)
        )
        if warps <= block_n // 16 * max(1, block_m // 32)
    ]


def steps_away(one: Tiling, other: Tiling) -> float:
    """Return by how many halvings and doublings two sizes differ."""
    pairs = zip(asdict(one).values(), asdict(other).values(), strict=True)
    return sum(abs(math.log2(a / b)) for a, b in pairs)


def divisions(best: Tiling) -> list[Tiling]:
    """Return the ways of splitting keys that are tried with the best size."""
    return [
        replace(best, programs_per_processor=programs, min_split_tiles=tiles)
        for programs, tiles in itertools.product((1, 2, 4, 8, 16), (2, 4, 8, 16))
        if (programs, tiles) != (PROGRAMS_PER_PROCESSOR, MIN_SPLIT_TILES)
    ]


def row_of(capability: tuple[int, int], task: Task, winner: Tiling) -> str:
    """Return a row of `tuning.MEASURED` as source."""
    numbers = ", ".join(map(str, asdict(winner).values()))
    key = f"({capability}, {head_class(task.head_size)}, Rows.{task.rows.name})"
    return f"    {key}: Tiling({numbers}),"


class _Trial:
    """The shapes of a task with their caches, on which candidates run."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self._device = device
        self._runners: list[tuple[Ours, int, torch.Tensor]] = []
        tensor_memory = has_tensor_memory(capability_of(device))
        for shape in task.shapes:
            rows = shape.queries * shape.heads.group
            assert row_class(rows) is task.rows
            cache_bytes = shape.cache_bytes(Ours.stored)
            layers = layers_needed(cache_bytes, l2_bytes(device))
            if layers * cache_bytes > SHARE_OF_MEMORY * free_bytes(device):
                continue
            self.derived = derived_tiling(rows, shape.heads.size, tensor_memory)
            ours = Ours(Batch(shape, device), layers)
            wanted = ours.attend(0, ours.plan(self.derived)).float().clone()
            self._runners.append((ours, layers, wanted))
        if not self._runners:
            raise MemoryError("no shape of the task fits")

    def rejection(self, candidate: Tiling) -> str | None:
        """Return why a candidate is rejected, or None."""
        for ours, _, wanted in self._runners:
            try:
                out = ours.attend(0, ours.plan(candidate)).float()
            # It does not compile or launch, because it needs too many registers or memory.
            except Exception as error:
                return f"{type(error).__name__}: {str(error)[:200]}"
            distance = float((out - wanted).norm() / wanted.norm().clamp_min(1e-20))
            if not distance <= LARGEST_ERROR:
                return f"output {distance:.1e} away from the derived size's"
        return None

    def speedup(self, candidate: Tiling, seconds: float) -> float:
        """Return the speedup over the derived size, the geometric mean over all shapes."""
        speedups = []
        for ours, layers, _ in self._runners:
            calls: dict[str, list[Call]] = {}
            for name, tiling in (("derived", self.derived), ("candidate", candidate)):
                plan = ours.plan(tiling)
                calls[name] = [partial(ours.attend, layer, plan) for layer in range(layers)]
            times, errors = alternating(calls, self._device, seconds)
            for error in errors.values():
                raise error
            speedups.append(ratio(times["derived"], times["candidate"]).median)
        return statistics.geometric_mean(speedups)


def _best(
    trial: _Trial, candidates: Sequence[Tiling], start: Tiling, budget: Budget, until: float,
    seconds: float, log: list[dict[str, Any]],
) -> tuple[Tiling, float]:  # fmt: skip
    """Return the fastest candidate, or `start`, and its speedup over the derived size."""
    best, best_speedup = start, 1.0
    if start != trial.derived:
        best_speedup = trial.speedup(start, seconds)
    # The nearest first, because the time may be up before the last.
    for candidate in sorted(candidates, key=lambda one: steps_away(one, start)):
        if budget.spent > until:
            log.append({"left_out": "time was up", "candidate": asdict(candidate)})
            break
        if candidate == trial.derived:
            continue
        reason = trial.rejection(candidate)
        if reason is not None:
            log.append({"candidate": asdict(candidate), "rejected": reason})
            continue
        speedup = trial.speedup(candidate, seconds)
        log.append({"candidate": asdict(candidate), "times_as_fast": speedup})
        if speedup > best_speedup:
            best, best_speedup = candidate, speedup
    return best, best_speedup


def tune(folder: Path, device: torch.device, preset: Preset, budget: Budget) -> int:
    """Try the candidates, and write `gpu_tuning.json` and `gpu_tuning.md`; return 0.

    Args:
        folder: For the files.
        device: The GPU.
        preset: `SMALLEST` for the interpreter.
        budget: Time, shared evenly among the rows.
    """
    capability = capability_of(device)
    smallest = preset is SMALLEST
    seconds = 0.0 if smallest else 0.1
    rows: list[str] = []
    log: list[dict[str, Any]] = []
    wanted = tasks(preset)
    for place, task in enumerate(wanted):
        start = budget.spent
        share = (budget.left - RESERVED) / (len(wanted) - place)
        tried: list[dict[str, Any]] = []
        entry = {"head_size": task.head_size, "rows": task.rows.name, "tried": tried}
        log.append(entry)
        try:
            trial = _Trial(task, device)
        except (MemoryError, torch.OutOfMemoryError) as error:
            entry["left_out"] = str(error)
            continue
        candidates = sizes(task.rows)[:2] if smallest else sizes(task.rows)
        if device.type == "cuda":
            compile_tilings(task.shapes[0], candidates, 0.4 * (start + share - budget.spent))
        middle = budget.spent + 0.7 * (start + share - budget.spent)
        best, _ = _best(trial, candidates, trial.derived, budget, middle, seconds, tried)
        finer = divisions(best)[:1] if smallest else divisions(best)
        best, speedup = _best(trial, finer, best, budget, start + share, seconds, tried)
        entry |= {"winner": asdict(best), "times_as_fast_as_derived": speedup}
        if speedup >= WORTHWHILE and capability is not None:
            rows.append(f"    # {speedup:.2f} times as fast as the derived size.")
            rows.append(row_of(capability, task, best))
        print(f"{budget.spent:5.0f} s: {task.rows.name}, head size {task.head_size}: {best}",
              flush=True)  # fmt: skip
    versions = machine(device)
    folder.mkdir(parents=True, exist_ok=True)
    everything = {"machine": versions, "before": origin(capability), "tasks": log, "rows": rows}
    (folder / "gpu_tuning.json").write_text(json.dumps(everything, indent=1, default=str) + "\n")
    (folder / "gpu_tuning.md").write_text(_markdown(versions, rows))
    print((folder / "gpu_tuning.md").read_text())
    return 0


def _markdown(versions: dict[str, Any], rows: Sequence[str]) -> str:
    title = versions.get("gpu", "Triton's interpreter, whose times mean nothing")
    result = "No size is faster than the derived one: no rows for `MEASURED`."
    if rows:
        header = f"    # {title}, Triton {versions['triton']}."
        block = "\n".join(["```python", header, *rows, "```"])
        result = f"Rows for `MEASURED` in `kernels/triton/tuning.py`:\n\n{block}"
    return (
        f"# Tile sizes for {title}\n\n"
        f"torch {versions['torch']}, Triton {versions['triton']}. {result}\n"
    )
