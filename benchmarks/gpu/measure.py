# SPDX-License-Identifier: Apache-2.0
"""Times of calls on a device: CUDA graphs, alternating rounds, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]

ROUNDS = (5, 100)
"""Rounds at least and at most."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    lower: float
    upper: float
    count: int


def spread(numbers: Sequence[float]) -> Spread:
    """Return median and quartiles; all three are the number where there is only one."""
    if len(numbers) == 1:
        return Spread(numbers[0], numbers[0], numbers[0], 1)
    lower, median, upper = statistics.quantiles(numbers, n=4, method="inclusive")
    return Spread(median, lower, upper, len(numbers))


def ratio(slower: Sequence[float], faster: Sequence[float]) -> Spread:
    """Return how many times as long the first took, from the ratio of each round.

    A device changes its clocks; two calls of one round saw nearly the same.
    """
    return spread([a / b for a, b in zip(slower, faster, strict=True)])


class Replay:
    """Calls that are repeated as one: a captured CUDA graph.

    Where there is no GPU the calls run once, and their time means nothing.

    Attributes:
        result: What the last of the calls returned; a replay writes it again.
    """

    def __init__(self, calls: Sequence[Call], device: torch.device) -> None:
        self._count = len(calls)
        self._graph: torch.cuda.CUDAGraph | None = None
        self.result: object = None
        if device.type != "cuda":
            start = time.perf_counter()
            self._run(calls)
            self._milliseconds = 1e3 * (time.perf_counter() - start)
            return
        # The first call compiles and allocates, which no graph can hold.
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._run(calls)
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._run(calls)

    def _run(self, calls: Sequence[Call]) -> None:
        for call in calls:
            self.result = call()

    @property
    def captured(self) -> bool:
        """Whether a graph is replayed."""
        return self._graph is not None

    def milliseconds(self) -> float:
        """Replay and return the time of one call."""
        if self._graph is None:
            return self._milliseconds / self._count
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / self._count


def rounds_for(seconds: float, milliseconds_of_a_round: float) -> int:
    """Return the rounds that take about `seconds`, within bounds."""
    fewest, most = ROUNDS
    wanted = int(1e3 * seconds / max(milliseconds_of_a_round, 1e-6))
    return max(fewest, min(most, wanted))


def alternating(replays: Mapping[str, Replay], seconds: float) -> dict[str, list[float]]:
    """Return milliseconds of a call of each, in rounds in which each is replayed once.

    Without a GPU there is one round.

    Args:
        replays: What is measured.
        seconds: Time that all rounds take, about.
    """
    if not all(replay.captured for replay in replays.values()):
        return {name: [replay.milliseconds()] for name, replay in replays.items()}
    start = time.perf_counter()
    for replay in replays.values():
        replay.milliseconds()
    rounds = rounds_for(seconds, 1e3 * (time.perf_counter() - start))
    times: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(rounds):
        for name, replay in replays.items():
            times[name].append(replay.milliseconds())
    return times
