# SPDX-License-Identifier: Apache-2.0
"""Several processes on one GPU: for checks, and to compile before anything is timed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from benchmarks.gpu import correctness
from benchmarks.gpu.contenders import Batch
from benchmarks.gpu.contenders.ours import Ours
from benchmarks.gpu.correctness import Check, Finding
from benchmarks.gpu.environment import device_for_kernels
from benchmarks.gpu.sections import COMPETITORS, build
from benchmarks.gpu.shapes import Heads, Job, Shape
from vllm_hybrid_kv.kernels.triton.tuning import Tiling

MOST_PROCESSES = 12
"""Each has a CUDA context of its own, about half a GiB."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def _one_thread() -> None:
    """The reference's sums on the CPU gain nothing from more threads than there are cores."""
    torch.set_num_threads(1)


def share_out(
    function: Callable[[Item], Result], items: Sequence[Item], seconds: float
) -> list[Result | None]:
    """Run a function on items in several processes, which have all ended when this returns.

    Args:
        function: Of an importable module.
        items: What it is given.
        seconds: When to stop.

    Returns:
        Its results in order; None for what was not done in time.
    """
    count = max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) - 1))
    deadline = time.monotonic() + seconds
    results: list[Result | None] = []
    # Leaving the pool ends what still runs, which would disturb the timing that follows.
    with multiprocessing.get_context("spawn").Pool(count, _one_thread) as pool:
        pending = [pool.apply_async(function, (item,)) for item in items]
        for task in pending:
            try:
                results.append(task.get(max(0.0, deadline - time.monotonic())))
            except multiprocessing.TimeoutError:
                results.append(None)
    return results


def run_checks(checks: Sequence[Check], seconds: float) -> list[Finding]:
    """Make the checks; what is not reached in time is reported as not run.

    Args:
        checks: What to check.
        seconds: Until when.
    """
    if device_for_kernels().type != "cuda":
        return [correctness.run(check) for check in checks]
    findings = share_out(correctness.run, checks, seconds)
    return [
        finding or Finding(check.name, "not run", "no time was left", 0.0)
        for check, finding in zip(checks, findings, strict=True)
    ]


def _small(shape: Shape) -> Shape:
    """Return a shape of few tokens that takes the same kernels."""
    new = min(shape.queries, 512)
    context = 0 if shape.queries == shape.length else 256
    return replace(shape, length=context + new, queries=new)


def _compile(jobs: Sequence[Job]) -> None:
    """Let every contender of jobs attend once, to few tokens, and forget it."""
    for job in jobs:
        assert job.shape is not None
        # Who fails here fails again when it is measured, and is reported then.
        with contextlib.suppress(Exception):
            batch = Batch(_small(job.shape), device_for_kernels())
            built, _ = build(COMPETITORS[job.section], batch, 1)
            for contender in built.values():
                with contextlib.suppress(Exception):
                    contender.attend(0)
    torch.cuda.synchronize()


def compile_ahead(jobs: Sequence[Job], seconds: float) -> None:
    """Fill Triton's cache on disk with the kernels of jobs, in several processes at a time.

    Only time is saved: a kernel that is missed is compiled when it is measured.

    Args:
        jobs: What will be measured.
        seconds: When to stop.
    """
    # Batches of one section and shape of heads share most kernels, hence one process.
    groups: dict[tuple[str, Heads], dict[int, Job]] = {}
    for job in jobs:
        if job.shape is not None and job.section in COMPETITORS:
            of_group = groups.setdefault((job.section, job.shape.heads), {})
            of_group.setdefault(job.shape.batch, job)
    share_out(_compile, [list(group.values()) for group in groups.values()], seconds)


def _compile_tiling(task: tuple[Shape, Tiling]) -> None:
    shape, tiling = task
    # A candidate that cannot be compiled is found out again, and refused, by who tries it.
    with contextlib.suppress(Exception):
        Ours(Batch(_small(shape), device_for_kernels()), 1, tiling).attend(0)
        torch.cuda.synchronize()


def compile_tilings(shape: Shape, tilings: Sequence[Tiling], seconds: float) -> None:
    """Fill Triton's cache on disk with our kernel in several sizes of program.

    Args:
        shape: What it will be tried on.
        tilings: The sizes.
        seconds: When to stop.
    """
    share_out(_compile_tiling, [(shape, tiling) for tiling in tilings], seconds)
