# SPDX-License-Identifier: Apache-2.0
"""Times of calls on a device: CUDA graphs in alternating rounds, medians and quartiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from triton.testing import do_bench_cudagraph

Call = Callable[[], object]

MOST_ROUNDS = 10

GRAPH_MS = 3
"""Milliseconds that one replay of a graph takes, unless one call takes longer."""


def spread(numbers: Sequence[float]) -> dict[str, float]:
    """Return median, quartiles and count; a single number is all three of them."""
    several = numbers if len(numbers) > 1 else [*numbers, *numbers]
    lower, median, upper = statistics.quantiles(several, n=4, method="inclusive")
    return {"median": median, "lower": lower, "upper": upper, "count": len(numbers)}


def ratio(slower: Sequence[float], faster: Sequence[float]) -> dict[str, float]:
    """Return the spread of the ratios of the samples of two contenders, pair by pair.

    A device changes its clocks; the samples of one round saw nearly the same.
    """
    return spread([a / b for a, b in zip(slower, faster, strict=True)])


def _samples(calls: Sequence[Call], device: torch.device) -> list[float]:
    """Return milliseconds of one call: ten replays of a graph, or one run without a GPU."""

    def run() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return [1e3 * (time.perf_counter() - start) / len(calls)]
    samples = do_bench_cudagraph(run, rep=GRAPH_MS, return_mode="all")
    return [milliseconds / len(calls) for milliseconds in samples]


def alternating(
    calls: Mapping[str, Sequence[Call]], device: torch.device, seconds: float
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Measure contenders in turn, in rounds.

    Args:
        calls: The calls of each contender, which run one after another. They have run once, so
            that nothing compiles.
        device: Where.
        seconds: No round starts after this time; at least one round runs.

    Returns:
        Milliseconds of one call in each sample, and the error of each contender that failed.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    errors: dict[str, Exception] = {}
    start = time.monotonic()
    for _ in range(MOST_ROUNDS if device.type == "cuda" else 1):
        for name in list(times):
            try:
                times[name] += _samples(calls[name], device)
            except Exception as error:
                del times[name]
                errors[name] = error
        if time.monotonic() - start > seconds:
            break
    return times, errors
