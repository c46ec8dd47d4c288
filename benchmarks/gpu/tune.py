# SPDX-License-Identifier: Apache-2.0
"""`--tune`: which size of program is fastest on this GPU, as rows for `tuning.MEASURED`.

For each class of head sizes and of rows the candidates run in turn on the same caches as CUDA
graphs: first all sizes of program, then, with the best of them, how finely keys are divided. What
does not compile, launch or agree with the derived size is left out. The derived size stays where
nothing is faster than it by `WORTHWHILE`.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.contenders import Batch
from benchmarks.gpu.contenders.ours import Ours
from benchmarks.gpu.environment import Budget, free_bytes, l2_bytes, machine
from benchmarks.gpu.measure import Replay, alternating, ratio
from benchmarks.gpu.processes import compile_tilings
from benchmarks.gpu.sections import SHARE_OF_MEMORY
from benchmarks.gpu.shapes import SMALLEST, Heads, Preset, Shape, k8v4_bytes, layers_needed
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
"""Times as fast as the derived size that a row of the table must be: less is noise."""

LARGEST_ERROR = 0.01
"""||out - derived|| / ||derived|| that a candidate may have: two roundings of bf16."""

RESERVED = 5.0
"""Seconds that are kept for writing."""


@dataclass(frozen=True)
class Task:
    """One row of the table: shapes that stand for a class of rows of a head size."""

    rows: Rows
    shapes: tuple[Shape, ...]

    @property
    def head_size(self) -> int:
        """D of all its shapes."""
        return self.shapes[0].heads.size


def tasks(preset: Preset) -> list[Task]:
    """Return what is tuned, decode first.

    Args:
        preset: `SMALLEST` for the interpreter; anything else tunes all.
    """
    if preset is SMALLEST:
        return [Task(Rows.UP_TO_16, (Shape(Heads(4, 1, 64), 1, 70),))]
    found = []
    for queries, rows in ((1, Rows.UP_TO_16), (2048, Rows.MORE), (4, Rows.UP_TO_32),
                          (8, Rows.UP_TO_64)):  # fmt: skip
        for heads in (Heads(32, 8, 128), Heads(16, 2, 256), Heads(16, 2, 64)):
            # Eight query heads to a KV head, so that tokens to verify make rows of their class.
            wide = heads if queries in (1, 2048) else Heads(8 * heads.kv, heads.kv, heads.size)
            if queries == 2048:
                shapes = [Shape(wide, 1, 8192 + queries, queries)]
            else:
                shapes = [Shape(wide, batch, 32768, queries) for batch in (8, 1)]
            found.append(Task(rows, tuple(shapes)))
    return found


def sizes(rows: Rows) -> list[Tiling]:
    """Return the sizes of program that are tried for a class of rows.

    Warps never outnumber the pieces of 16 keys and 32 rows that they share.
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
    """Return the ways of dividing keys that are tried with the best size."""
    return [
        replace(best, programs_per_processor=programs, min_split_tiles=tiles)
        for programs, tiles in itertools.product((1, 2, 4, 8, 16), (2, 4, 8, 16))
        if (programs, tiles) != (PROGRAMS_PER_PROCESSOR, MIN_SPLIT_TILES)
    ]


def geometric_mean(numbers: Iterable[float]) -> float:
    """Return the geometric mean, which counts a loss on one shape like a gain on another."""
    return statistics.geometric_mean(numbers)


def row_of(capability: tuple[int, int], task: Task, winner: Tiling) -> str:
    """Return a row of `tuning.MEASURED` as source."""
    numbers = ", ".join(map(str, asdict(winner).values()))
    key = f"({capability}, {head_class(task.head_size)}, Rows.{task.rows.name})"
    return f"    {key}: Tiling({numbers}),"


class _Course:
    """The shapes of a task with their caches, on which candidates run."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self._device = device
        self._runners: list[tuple[Ours, int, torch.Tensor]] = []
        capability = capability_of(device)
        for shape in task.shapes:
            assert row_class(shape.queries * shape.heads.group) is task.rows
            cache_bytes = shape.cache_bytes(k8v4_bytes(shape.heads.size))
            layers = layers_needed(cache_bytes, l2_bytes(device))
            if layers * cache_bytes > SHARE_OF_MEMORY * free_bytes(device):
                continue
            derived = derived_tiling(
                shape.queries * shape.heads.group,
                shape.heads.size,
                has_tensor_memory(capability),
            )
            runner = Ours(Batch(shape, device), layers, derived)
            self._runners.append((runner, layers, runner.attend(0).float().clone()))
            self.derived = derived
        if not self._runners:
            raise MemoryError("no shape of the task fits")

    def refused(self, candidate: Tiling) -> str | None:
        """Return why a candidate cannot be taken, or None."""
        for runner, _, wanted in self._runners:
            try:
                runner.use(candidate)
                out = runner.attend(0).float()
            # What does not compile or launch, for want of registers or memory, is no candidate.
            except Exception as error:
                return f"{type(error).__name__}: {str(error)[:200]}"
            distance = float((out - wanted).norm() / wanted.norm().clamp_min(1e-20))
            if not distance <= LARGEST_ERROR:
                return f"output {distance:.1e} away from the derived size's"
        return None

    def speedup(self, candidate: Tiling, seconds: float) -> float:
        """Return times as fast as the derived size, over all shapes."""
        ratios = []
        for runner, layers, _ in self._runners:
            replays = {}
            for name, tiling in (("derived", self.derived), ("candidate", candidate)):
                runner.use(tiling)
                calls = [partial(runner.attend, layer) for layer in range(layers)]
                replays[name] = Replay(calls, self._device)
                # A graph goes on reading the plan that it was captured with.
                runner.keep_plan()
            times = alternating(replays, seconds)
            ratios.append(ratio(times["derived"], times["candidate"]).median)
            runner.forget_plans()
        return geometric_mean(ratios)


def _best(
    course: _Course, candidates: Sequence[Tiling], start: Tiling, budget: Budget, until: float,
    seconds: float, log: list[dict[str, Any]],
) -> tuple[Tiling, float]:  # fmt: skip
    """Return the fastest candidate, `start` if none is faster, and times as fast as derived."""
    best, speed = start, 1.0 if start == course.derived else course.speedup(start, seconds)
    # The nearest first, for the time may be up before the last.
    for candidate in sorted(candidates, key=lambda one: steps_away(one, start)):
        if budget.spent > until:
            log.append({"left_out": "time was up", "candidate": asdict(candidate)})
            break
        if candidate == course.derived:
            continue
        reason = course.refused(candidate)
        if reason is not None:
            log.append({"candidate": asdict(candidate), "refused": reason})
            continue
        times = course.speedup(candidate, seconds)
        log.append({"candidate": asdict(candidate), "times_as_fast": times})
        if times > speed:
            best, speed = candidate, times
    return best, speed


def tune(folder: Path, device: torch.device, preset: Preset, budget: Budget) -> int:
    """Try the candidates, and write what was found to `gpu_tuning.json` and `gpu_tuning.md`.

    Args:
        folder: Where to.
        device: The GPU.
        preset: `SMALLEST` for the interpreter.
        budget: Time, shared out evenly among the rows.

    Returns:
        0.
    """
    capability = capability_of(device)
    smallest = preset is SMALLEST
    seconds = 0.0 if smallest else 0.1
    rows: list[str] = []
    log: list[dict[str, Any]] = []
    wanted = tasks(preset)
    for place, task in enumerate(wanted):
        share = (budget.left - RESERVED) / (len(wanted) - place)
        end = budget.spent + share
        tried: list[dict[str, Any]] = []
        entry = {"head_size": task.head_size, "rows": task.rows.name, "tried": tried}
        log.append(entry)
        try:
            course = _Course(task, device)
        except (MemoryError, torch.OutOfMemoryError) as error:
            entry["left_out"] = str(error)
            continue
        candidates = sizes(task.rows)[:2] if smallest else sizes(task.rows)
        if device.type == "cuda":
            compile_tilings(task.shapes[0], candidates, 0.4 * (end - budget.spent))
        middle = budget.spent + 0.7 * (end - budget.spent)
        best, _ = _best(course, candidates, course.derived, budget, middle, seconds, tried)
        finer = divisions(best)[:1] if smallest else divisions(best)
        best, speed = _best(course, finer, best, budget, end, seconds, tried)
        entry |= {"winner": asdict(best), "times_as_fast_as_derived": speed}
        worth = speed >= WORTHWHILE
        if worth and capability is not None:
            rows.append(f"    # {speed:.2f} times as fast as the derived size.")
            rows.append(row_of(capability, task, best))
        print(f"{budget.spent:5.0f} s: {task.rows.name}, head size {task.head_size}: {best}",
              flush=True)  # fmt: skip
    found = machine(device)
    folder.mkdir(parents=True, exist_ok=True)
    everything = {"machine": found, "before": origin(capability), "tasks": log, "rows": rows}
    (folder / "gpu_tuning.json").write_text(json.dumps(everything, indent=1, default=str) + "\n")
    (folder / "gpu_tuning.md").write_text(_markdown(found, rows))
    print((folder / "gpu_tuning.md").read_text())
    return 0


def _markdown(found: dict[str, Any], rows: Sequence[str]) -> str:
    title = found.get("gpu", "Triton's interpreter, where no time means anything")
    lines = [
        f"# Sizes of program for {title}",
        "",
        f"torch {found['torch']}, Triton {found['triton']}. "
        + ("Rows for `MEASURED` in `kernels/triton/tuning.py`:" if rows else
           "Nothing was faster than the derived sizes: no rows for `MEASURED`."),
    ]  # fmt: skip
    if rows:
        lines += ["", "```python", f"    # {title}, Triton {found['triton']}.", *rows, "```"]
    return "\n".join(lines) + "\n"
