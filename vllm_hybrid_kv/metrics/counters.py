# SPDX-License-Identifier: Apache-2.0
"""The counters, and the file that one process keeps them in."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.mmap_dict import MmapedDict, mmap_key

from vllm_hybrid_kv.state import STATE

PREFIX = "vllm_hybrid_kv:"

FILE_BYTES = 1 << 16
"""What prometheus_client begins a file with: room for more counters than there are."""


@dataclass(frozen=True)
class Metric:
    """A counter.

    Attributes:
        name: Without the prefix and without the `_total` at the end.
        help: What /metrics says of it.
    """

    name: str
    help: str


REQUESTS = Metric(
    "prefix_cache_requests",
    "Requests that looked into the prefix cache, each counted once, when it was first scheduled.",
)
SHORT_REQUESTS = Metric(
    "prefix_cache_short_requests",
    "Requests that could not hit whatever was cached: shorter than the unit that hits end at.",
)
HIT_TOKENS = Metric(
    "prefix_cache_hit_tokens",
    "Prompt tokens taken from the prefix cache. All kinds of KV groups hit the same tokens.",
)
ALONE_TOKENS = Metric(
    "prefix_cache_alone_tokens",
    "Prompt tokens that the KV groups of this kind could have served, had there been no others.",
)
LIMITED_REQUESTS = Metric(
    "prefix_cache_limited_requests",
    "Requests that hit less than was cached, by the kind of KV group that lost most tokens.",
)
LOST_TOKENS = Metric(
    "prefix_cache_lost_tokens",
    "Prompt tokens that full attention could serve and that were computed again because the KV "
    "groups of this kind could not.",
)
PREEMPTED_REQUESTS = Metric(
    "prefix_cache_preempted_requests",
    "Requests that looked into the prefix cache again after a preemption. In none of the others.",
)
PREEMPTED_QUERY_TOKENS = Metric(
    "prefix_cache_preempted_query_tokens",
    "Tokens of requests that came back after a preemption, prompts and answers up to then.",
)
PREEMPTED_HIT_TOKENS = Metric(
    "prefix_cache_preempted_hit_tokens",
    "Those of them that were taken from the prefix cache.",
)
CHECKPOINTS_KEPT = Metric("checkpoints_kept", "States that were kept for later requests.")
CHECKPOINTS_USED = Metric("checkpoints_used", "Requests that resumed at a state that was kept.")
CHECKPOINTS_EVICTED = Metric("checkpoints_evicted", "Kept states that were given up for others.")
CHECKPOINTS_EVICTED_UNUSED = Metric(
    "checkpoints_evicted_unused", "Kept states that were given up before any request resumed there."
)


class Counter:
    """One counter with its labels."""

    def __init__(self, file: MmapedDict, key: str) -> None:
        """Go on where the file is, or start at 0.

        Args:
            file: The process's.
            key: Of the counter in it.
        """
        self._file = file
        self._key = key
        self._value: float = file.read_value(key)[0]

    def add(self, amount: int) -> None:
        """Add to the counter."""
        if amount:
            self._value += amount
            self._file.write_value(self._key, self._value, 0.0)


class CounterFile:
    """The counters of this process."""

    def __init__(self, folder: Path) -> None:
        """Make the file, and the folder where it is not there.

        Args:
            folder: Where the process that shows the counters looks for them.

        Raises:
            OSError: There is no room for it, or no permission.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # vLLM's own counters of this process may lie beside it, under the name without ours. What
        # is in front of the first underscore is the type.
        path = folder / f"counter_hybrid-kv-{os.getpid()}.db"
        # Written to as memory later: without the room the process would be killed then.
        with path.open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, FILE_BYTES)
        self._file = MmapedDict(str(path))
        self._counters: dict[str, Counter] = {}

    def counter(self, metric: Metric, labels: dict[str, str]) -> Counter:
        """Return the counter of a metric and labels, the same one for the same."""
        name = PREFIX + metric.name
        key = mmap_key(name, f"{name}_total", list(labels), list(labels.values()), metric.help)
        if key not in self._counters:
            self._counters[key] = Counter(self._file, key)
        return self._counters[key]


def counter_file(folder: Path) -> CounterFile:
    """Return this process's file in a folder. Engines that it runs one after the other share it.

    Raises:
        OSError: It cannot be made.
    """
    place = (os.getpid(), folder)
    if place not in STATE.counter_files:
        STATE.counter_files[place] = CounterFile(folder)
    return STATE.counter_files[place]
