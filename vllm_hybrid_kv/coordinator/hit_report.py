# SPDX-License-Identifier: Apache-2.0
"""Tells what requests hit and why: in counters, in DEBUG lines and in a warning."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from vllm.logger import init_logger

from vllm_hybrid_kv.metrics import counters
from vllm_hybrid_kv.metrics.counters import Counter, CounterFile, Metric, counter_file
from vllm_hybrid_kv.metrics.directory import engine_labels, folder

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_hybrid_kv.coordinator.explanation import Cache, Found

# Below `vllm`, whose handlers vLLM configures.
logger = init_logger("vllm.hybrid_kv")

WATCHED_REQUESTS = 100
"""Requests over which the warning looks."""

WARNING_INTERVAL_S = 600.0
"""Seconds between two warnings."""

_EVENTS = {
    "kept": counters.CHECKPOINTS_KEPT,
    "used": counters.CHECKPOINTS_USED,
    "evicted": counters.CHECKPOINTS_EVICTED,
    "evicted unused": counters.CHECKPOINTS_EVICTED_UNUSED,
}


@runtime_checkable
class CheckpointKeeper(Protocol):
    """A coordinator that keeps checkpoints and counts what becomes of them."""

    def stats(self) -> Mapping[str, int]:
        """Return counts by name: kept, used, evicted, evicted unused, and a kind or none behind.

        They may begin again at 0. Other names are passed over.
        """


class HitReport:
    """What is told of the requests of one scheduler. Preempted ones are counted apart."""

    def __init__(
        self, cache: Cache, log_stats: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Tell of a coordinator's hits.

        Args:
            cache: What there is to know of the coordinator.
            log_stats: Whether vLLM keeps statistics. The warning does not depend on it.
            clock: Tells seconds.
        """
        self._cache = cache
        self._clock = clock
        self._quiet_until = clock()
        self._begin_watch()
        self._counters = _Counters.open(cache) if log_stats else None

    @property
    def wants_alone(self) -> bool:
        """Whether what each kind of group alone could have served is wanted of a request."""
        return self._counters is not None or logger.isEnabledFor(logging.DEBUG)

    def tell(self, request: Request, found: Found) -> None:
        """Tell of a request that was scheduled.

        Args:
            request: The request.
            found: What was found for it.
        """
        preempted = request.num_preemptions > 0
        if self._counters is not None:
            if preempted:
                self._counters.count_preempted(found)
            else:
                self._counters.count(found)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug(
                "%s",
                self._cache.explain(found, request.request_id, found.limit + 1, True, preempted),
            )
        if not preempted:
            self._watch(found)

    def tell_checkpoints(self, stats: Mapping[str, int]) -> None:
        """Bring the counters of checkpoints to what a `CheckpointKeeper` counts."""
        if self._counters is not None:
            self._counters.follow_checkpoints(stats)

    def _begin_watch(self) -> None:
        self._requests = self._reach = 0
        self._lost = [0] * len(self._cache.kinds)

    def _watch(self, found: Found) -> None:
        self._requests += 1
        self._reach += max(self._cache.reach(found.alone), found.hit)
        if any(found.lost):
            for place, lost in enumerate(self._cache.lost_by_kind(found)):
                self._lost[place] += lost
        if self._requests == WATCHED_REQUESTS:
            if 2 * sum(self._lost) > self._reach and self._clock() >= self._quiet_until:
                self._quiet_until = self._clock() + WARNING_INTERVAL_S
                self._warn()
            self._begin_watch()

    def _warn(self) -> None:
        lost = sum(self._lost)
        worst = max(range(len(self._lost)), key=self._lost.__getitem__)
        kind = self._cache.kinds[worst].name
        full = [kind.name for kind in self._cache.kinds if kind.full_attention]
        setting = self._cache.setting_for(kind)
        logger.warning(
            "Of %d prompt tokens that %s could have served from the prefix cache to the last %d "
            "requests, %d (%.0f %%) were computed again, %d because KV groups of kind %s could "
            "not serve them%s",
            self._reach,
            full[0] if full else "one kind of KV group",
            self._requests,
            lost,
            100 * lost / self._reach,
            self._lost[worst],
            kind,
            f"; what may help: {setting}" if setting else "",
        )


class _Counters:
    """The counters of one engine."""

    def __init__(self, cache: Cache, file: CounterFile) -> None:
        self._cache = cache
        self._file = file
        self._labels = engine_labels()
        self._requests = self._counter(counters.REQUESTS)
        self._short = self._counter(counters.SHORT_REQUESTS)
        self._preempted = self._counter(counters.PREEMPTED_REQUESTS)
        self._preempted_queries = self._counter(counters.PREEMPTED_QUERY_TOKENS)
        self._preempted_hits = self._counter(counters.PREEMPTED_HIT_TOKENS)
        kinds = [kind.name for kind in cache.kinds]
        self._hit = [self._counter(counters.HIT_TOKENS, kind) for kind in kinds]
        self._alone = [self._counter(counters.ALONE_TOKENS, kind) for kind in kinds]
        self._limited = [self._counter(counters.LIMITED_REQUESTS, kind) for kind in kinds]
        self._lost = [self._counter(counters.LOST_TOKENS, kind) for kind in kinds]
        self._checkpoints: dict[str, Counter | None] = {}
        self._followed: dict[str, int] = {}

    @classmethod
    def open(cls, cache: Cache) -> _Counters | None:
        """Return counters; None where nobody would show them, or there is no room for them."""
        place = folder()
        if place is None:
            return None
        try:
            return cls(cache, counter_file(place))
        except OSError as error:
            # An engine serves without its metrics; a server's temporary folder may be full.
            logger.warning("No metrics of the prefix cache: %s cannot be written: %s", place, error)
            return None

    def count(self, found: Found) -> None:
        """Count a request that was scheduled for the first time."""
        self._requests.add(1)
        if found.limit < self._cache.unit:
            self._short.add(1)
        for place, alone in enumerate(found.alone):
            self._hit[place].add(found.hit)
            self._alone[place].add(alone or 0)
        if any(found.lost):
            lost = self._cache.lost_by_kind(found)
            for counter, tokens in zip(self._lost, lost, strict=True):
                counter.add(tokens)
            self._limited[max(range(len(lost)), key=lost.__getitem__)].add(1)

    def count_preempted(self, found: Found) -> None:
        """Count a request that came back."""
        self._preempted.add(1)
        self._preempted_queries.add(found.limit + 1)
        self._preempted_hits.add(found.hit)

    def follow_checkpoints(self, stats: Mapping[str, int]) -> None:
        """Add what has come to a coordinator's counts since the last time."""
        for name, count in stats.items():
            before = self._followed.get(name, 0)
            if count == before:
                continue
            self._followed[name] = count
            if name not in self._checkpoints:
                self._checkpoints[name] = self._checkpoint_counter(name)
            counter = self._checkpoints[name]
            if counter is not None:
                counter.add(count - before if count > before else count)

    def _checkpoint_counter(self, name: str) -> Counter | None:
        """Return the counter for one of a coordinator's counts; None for another number."""
        events = [event for event in _EVENTS if f"{name} ".startswith(f"{event} ")]
        if not events:
            return None
        # The longest that fits, for what was evicted unused is no kind that was evicted.
        event = max(events, key=len)
        return self._counter(_EVENTS[event], name[len(event) + 1 :] or None)

    def _counter(self, metric: Metric, kind: str | None = None) -> Counter:
        labels = self._labels if kind is None else {**self._labels, "kind": kind}
        return self._file.counter(metric, labels)
