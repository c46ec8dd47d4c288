# SPDX-License-Identifier: Apache-2.0
"""Run several processes on one GPU, for checks, and to compile before anything is timed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from benchmarks.gpu import checks
from benchmarks.gpu.checks import Check, CheckResult
from benchmarks.gpu.contenders import Batch, Ours
from benchmarks.gpu.environment import device_for_kernels
from benchmarks.gpu.sections import CONTENDERS, build
from benchmarks.gpu.shapes import Job, Shape
from vllm_hybrid_kv.kernels.triton.tuning import Tiling

MOST_PROCESSES = 12
"""The limit, because each process has its own CUDA context of about half a GiB."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def share_out(
    function: Callable[[Item], Result], items: Sequence[Item], seconds: float
) -> list[Result | None]:
    """Run a function on items in several processes, all of which have ended on return.

    Args:
        function: A function of an importable module.
        items: The arguments, one for each call.
        seconds: The time limit.

    Returns:
        The results in order; None for items that were not done in time.
    """
    count = max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) - 1))
    deadline = time.monotonic() + seconds
    results: list[Result | None] = []
    # Each process has one torch thread. Leaving the pool ends them all, before anything is timed.
    pools = multiprocessing.get_context("spawn")
    with pools.Pool(count, torch.set_num_threads, (1,)) as pool:
        pending = [pool.apply_async(function, (item,)) for item in items]
        for task in pending:
            try:
                results.append(task.get(max(0.0, deadline - time.monotonic())))
            except multiprocessing.TimeoutError:
                results.append(None)
    return results


def run_checks(wanted: Mapping[str, Check], seconds: float) -> list[CheckResult]:
    """Run checks. Those that are not done in time have the outcome 'not run'."""
    items = list(wanted.items())
    if device_for_kernels().type != "cuda":
        return [checks.run(item) for item in items]
    return [
        result or CheckResult(name, "not run", "no time was left", 0.0)
        for (name, _), result in zip(items, share_out(checks.run, items, seconds), strict=True)
    ]


def _small(shape: Shape) -> Shape:
    """Return a shape with few tokens that uses the same kernels."""
    new = min(shape.queries, 512)
    context = 0 if shape.queries == shape.length else 256
    return replace(shape, length=context + new, queries=new)


def _compile(job: Job) -> None:
    """Compile the kernels of a job: every contender attends once, to few tokens."""
    # A contender that fails here fails again when it is measured, and is reported then.
    with contextlib.suppress(Exception):
        batch = Batch(_small(job.shape), device_for_kernels())
        built, _ = build(CONTENDERS[job.section], batch, 1)
        for contender in built.values():
            with contextlib.suppress(Exception):
                contender.attend(0)
    torch.cuda.synchronize()


def compile_ahead(jobs: Sequence[Job], seconds: float) -> None:
    """Fill Triton's cache on disk with the kernels of jobs, in several processes.

    This only saves time: a missing kernel is compiled when it is measured.
    """
    # Jobs with the same section and heads share most kernels, so compile for one of them.
    first = {
        (job.section, job.shape.heads): job for job in reversed(jobs) if job.section in CONTENDERS
    }
    share_out(_compile, list(first.values()), seconds)


def _compile_tiling(shape: Shape, tiling: Tiling) -> None:
    # A candidate that cannot be compiled is rejected when it is tried.
    with contextlib.suppress(Exception):
        ours = Ours(Batch(_small(shape), device_for_kernels()), 1)
        ours.attend(0, ours.plan(tiling))
        torch.cuda.synchronize()


def compile_tilings(shape: Shape, tilings: Sequence[Tiling], seconds: float) -> None:
    """Fill Triton's cache on disk with our kernel in several tile sizes."""
    share_out(partial(_compile_tiling, shape), tilings, seconds)
