# SPDX-License-Identifier: Apache-2.0
"""Time calls on a device, as CUDA graphs in alternating rounds. Compute medians and quartiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from triton.testing import do_bench_cudagraph

from benchmarks.gpu.children import FAILED, announce, synchronize
from benchmarks.gpu.environment import Unavailable
from benchmarks.gpu.goals import OURS

Call = Callable[[], object]

MOST_ROUNDS = 10

GRAPH_MS = 3
"""Milliseconds that one replay of a graph takes, unless one call takes longer."""


def spread(numbers: Sequence[float]) -> dict[str, float]:
    """Return median, quartiles and count. A single number is its own median and quartiles."""
    several = numbers if len(numbers) > 1 else [*numbers, *numbers]
    lower, median, upper = statistics.quantiles(several, n=4, method="inclusive")
    return {"median": median, "lower": lower, "upper": upper, "count": len(numbers)}


def ratio(slower: Sequence[float], faster: Sequence[float]) -> dict[str, float]:
    """Divide the samples of two contenders pair by pair, and return the spread of the ratios.

    Clock rates change, but the two samples of a round ran at nearly the same rate.
    """
    return spread([a / b for a, b in zip(slower, faster, strict=True)])


def _samples(calls: Sequence[Call], device: torch.device) -> list[float]:
    """Time a call in milliseconds: ten replays of a graph, or one run without a GPU."""

    def run() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return [1e3 * (time.perf_counter() - start) / len(calls)]
    samples = do_bench_cudagraph(run, rep=GRAPH_MS, return_mode="all")
    return [milliseconds / len(calls) for milliseconds in samples]


@contextmanager
def leaving_out(name: str, left_out: dict[str, str]) -> Iterator[None]:
    """Record the reason if a contender fails, and go on. `OURS` may fail only for lack of memory.

    Raises:
        RuntimeError: The contender broke the CUDA context, so nothing else can run in this process.
    """
    announce(name)
    try:
        yield
    except Unavailable as error:
        left_out[name] = str(error)
    except Exception as error:
        if name == OURS and not isinstance(error, torch.OutOfMemoryError):
            raise
        ours = name.startswith(OURS) and not isinstance(error, torch.OutOfMemoryError)
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        left_out[name] = f"{FAILED}: {reason}" if ours else reason
        synchronize()


def alternating(
    calls: Mapping[str, Sequence[Call]],
    device: torch.device,
    seconds: float,
    left_out: dict[str, str],
) -> dict[str, list[float]]:
    """Measure contenders in turn, in rounds.

    Args:
        calls: The calls of each contender, which run one after another. They have run once, so
            that nothing compiles.
        device: The calls' device.
        seconds: No round starts after this time; at least one round runs.
        left_out: Gets the reason of each contender that fails, see `leaving_out`.

    Returns:
        For each contender that did not fail: milliseconds of one call, in each sample.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.monotonic()
    for _ in range(MOST_ROUNDS if device.type == "cuda" else 1):
        for name in [name for name in times if name not in left_out]:
            with leaving_out(name, left_out):
                times[name] += _samples(calls[name], device)
        if time.monotonic() - start > seconds:
            break
    return {name: of for name, of in times.items() if name not in left_out}
