# SPDX-License-Identifier: Apache-2.0
"""Reports hits of the prefix cache: explanations, counters, DEBUG lines and a warning."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from vllm_hybrid_kv.coordinator.explanation import CacheDescription, Explanation, HitRecord
from vllm_hybrid_kv.metrics import Counters, engine_labels, folder

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import BlockHash
    from vllm.v1.request import Request

    from vllm_hybrid_kv.coordinator.longest_hit import FixedPointCoordinator, Reconciliation

# A child of `vllm`, whose handlers vLLM configures.
logger = init_logger("vllm.hybrid_kv")

WARNING_REQUESTS = 100
"""Requests over which the warning measures losses."""

WARNING_INTERVAL_S = 600.0
"""Minimum seconds between two warnings."""

_STATISTIC = re.compile(r"(kept|used|evicted unused|evicted)(?: (.+))?")
"""A name in `FixedPointCoordinator.stats`: an event, and optionally a kind of checkpoint."""

REQUEST_COUNTERS = (
    "prefix_cache_requests",
    "prefix_cache_short_requests",
    "prefix_cache_preempted_requests",
    "prefix_cache_preempted_query_tokens",
    "prefix_cache_preempted_hit_tokens",
)
KIND_COUNTERS = (
    "prefix_cache_hit_tokens",
    "prefix_cache_alone_tokens",
    "prefix_cache_limited_requests",
    "prefix_cache_lost_tokens",
)


class HitObserver:
    """Observes the lookups of one coordinator.

    vLLM looks a request up by its hashes, then allocates blocks by its id, and only then passes
    the request itself, to cache it. `last_lookup`, `scheduled` and `cached` follow these calls.
    vLLM schedules a request directly after its lookup, but a request that does not read the cache
    has no lookup, and a lookup may be of a request for which there is no room. `cached` detects
    both by comparing the hashes.

    Attributes:
        cache: The properties of the coordinator.
        last_lookup: The latest lookup, until its request is scheduled.
    """

    def __init__(self, coordinator: FixedPointCoordinator, strategy: str) -> None:
        self._coordinator = coordinator
        self.cache = CacheDescription.of(coordinator, strategy)
        self._counters: HitCounters | None = None
        self._warning = LossWarning(self.cache)
        self.last_lookup: Reconciliation | None = None
        # By id, for requests that hold blocks. None for those that do not read the cache.
        self._records: dict[str, HitRecord | None] = {}
        # The hashes that were looked up, of requests that were not reported yet.
        self._unreported: dict[str, Sequence[BlockHash]] = {}

    def start_counting(self) -> None:
        """Open the counters, if some process exports them."""
        self._counters = HitCounters.open(self.cache)

    def scheduled(self, request_id: str, hit: int) -> None:
        """Record the lookup of a request, before its first blocks are allocated.

        Allocation may evict blocks that the lookup found, and later the request's own blocks are
        cached under the hashes that were looked up.

        Args:
            request_id: The request. Only its first call has an effect.
            hit: Its tokens that are read from the cache.
        """
        if request_id in self._records:
            return
        record = None
        if self.last_lookup is not None:
            lookup, self.last_lookup = self.last_lookup, None
            alone = self._counters is not None or logger.isEnabledFor(logging.DEBUG)
            record = self._record(lookup, hit, alone)
            self._unreported[request_id] = lookup.block_hashes
        self._records[request_id] = record

    def cached(self, request: Request) -> None:
        """Report a scheduled request, once."""
        block_hashes = self._unreported.pop(request.request_id, None)
        if block_hashes is None:
            return
        record = self._records[request.request_id]
        if record is None or block_hashes is not request.block_hashes:
            self._records[request.request_id] = None
            return
        preempted = request.num_preemptions > 0
        if self._counters is not None:
            self._counters.count(record, preempted)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s", self.explain(request))
        if not preempted:
            self._warning.count(record)

    def freed(self, request_id: str) -> None:
        """Forget a request, and update the counters of checkpoints."""
        if request_id in self._records:
            del self._records[request_id]
            self._unreported.pop(request_id, None)
            if self._counters is not None:
                self._counters.follow(self._coordinator.stats())

    def explain(self, request: Request) -> Explanation:
        """Explain a request's scheduled lookup, or a new one if the request holds no blocks."""
        scheduled = request.request_id in self._records
        num_tokens = request.num_tokens
        record = self._records.get(request.request_id)
        if scheduled:
            num_tokens = request.num_prompt_tokens if record is None else record.limit + 1
        elif not request.skip_reading_prefix_cache:
            groups = self._coordinator.attention_groups
            lookup = self._coordinator.reconcile(request.block_hashes, num_tokens - 1, groups)
            record = self._record(lookup, lookup.length, alone=True)
        preempted = request.num_preemptions > 0
        return self.cache.explain(record, request.request_id, num_tokens, scheduled, preempted)

    def _record(self, lookup: Reconciliation, hit: int, alone: bool) -> HitRecord:
        """Attribute the length of a hit to groups.

        Args:
            lookup: The lookup.
            hit: Tokens of the hit, which a KV connector may have shortened.
            alone: Whether to look up what each kind could serve alone, if not known.
        """
        groups = self._coordinator.attention_groups
        limits = [lookup.start, *lookup.answers]
        by_kind: list[int | None] = []
        for kind in self.cache.kinds:
            first = kind.groups[0]
            tokens: int | None = None
            if lookup.start <= 0:
                tokens = 0
            elif (
                len(kind.groups) == 1
                and first < len(lookup.answers)
                and limits[first] == lookup.start
            ):
                # The groups before it served everything, so it answered for itself alone.
                tokens = lookup.answers[first]
            elif alone:
                of_kind = [groups[index] for index in kind.groups]
                tokens = self._coordinator.reconcile(
                    lookup.block_hashes, lookup.limit, of_kind
                ).length
            by_kind.append(tokens)
        reach = self.cache.reach(tuple(by_kind))
        lost = [0] * len(groups)
        first_answers = zip(range(len(limits)), limits, lookup.answers, strict=False)
        for index, before, after in [*first_answers, *lookup.reductions]:
            # What no kind could have reached is not lost.
            lost[index] += max(min(before, reach) - after, 0)
        return HitRecord(lookup.limit, hit, tuple(lost), tuple(by_kind))


class LossWarning:
    """Warns if requests recompute most of what full attention had cached."""

    def __init__(
        self, cache: CacheDescription, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cache = cache
        self._clock = clock
        self._quiet_until = clock()
        self._reset()

    def _reset(self) -> None:
        self._requests = self._reach = 0
        self._lost = [0] * len(self._cache.kinds)

    def count(self, record: HitRecord) -> None:
        self._requests += 1
        self._reach += max(self._cache.reach(record.alone), record.hit)
        if any(record.lost):
            for index, lost in enumerate(self._cache.lost_by_kind(record)):
                self._lost[index] += lost
        if self._requests == WARNING_REQUESTS:
            if 2 * sum(self._lost) > self._reach and self._clock() >= self._quiet_until:
                self._quiet_until = self._clock() + WARNING_INTERVAL_S
                self._warn()
            self._reset()

    def _warn(self) -> None:
        lost, most = sum(self._lost), max(self._lost)
        worst = self._cache.kinds[self._lost.index(most)].name
        full = [kind.name for kind in self._cache.kinds if kind.full_attention]
        setting = self._cache.setting_for(worst)
        logger.warning(
            "The last %d requests recomputed %d of the %d prompt tokens (%.0f %%) that %s had in "
            "the prefix cache, %d of them because KV groups of kind %s could not serve them%s",
            self._requests,
            lost,
            self._reach,
            100 * lost / self._reach,
            full[0] if full else "one kind of KV group",
            most,
            worst,
            f"; try {setting}" if setting else "",
        )


class HitCounters:
    """The counters of one coordinator."""

    def __init__(self, cache: CacheDescription, counters: Counters) -> None:
        self._cache = cache
        self._add = counters.add
        self._stats: dict[str, int] = {}
        # /metrics shows counters from the start, as 0.
        for name in REQUEST_COUNTERS:
            self._add(name, 0)
        for kind in cache.kinds:
            for name in KIND_COUNTERS:
                self._add(name, 0, kind.name)

    @classmethod
    def open(cls, cache: CacheDescription) -> HitCounters | None:
        """Return counters, or None if no process exports them or they cannot be written."""
        path = folder()
        if path is None:
            return None
        try:
            return cls(cache, Counters(path, engine_labels()))
        except OSError as error:
            # The temporary folder of a server may be full. It serves without these metrics.
            logger.warning("No metrics of the prefix cache: cannot write to %s: %s", path, error)
            return None

    def count(self, record: HitRecord, preempted: bool) -> None:
        """Count a request that was scheduled, for the first time or after a preemption."""
        add = self._add
        if preempted:
            add("prefix_cache_preempted_requests", 1)
            add("prefix_cache_preempted_query_tokens", record.limit + 1)
            add("prefix_cache_preempted_hit_tokens", record.hit)
            return
        add("prefix_cache_requests", 1)
        add("prefix_cache_short_requests", int(record.limit < self._cache.unit))
        by_kind = self._cache.lost_by_kind(record)
        for kind, alone, lost in zip(self._cache.kinds, record.alone, by_kind, strict=True):
            add("prefix_cache_hit_tokens", record.hit, kind.name)
            add("prefix_cache_alone_tokens", alone or 0, kind.name)
            add("prefix_cache_lost_tokens", lost, kind.name)
        if any(by_kind):
            worst = self._cache.kinds[by_kind.index(max(by_kind))]
            add("prefix_cache_limited_requests", 1, worst.name)

    def follow(self, stats: Mapping[str, int]) -> None:
        """Add what `FixedPointCoordinator.stats` gained since the last call.

        Statistics may restart at 0. Unknown names are ignored.
        """
        for name, count in stats.items():
            before = self._stats.get(name, 0)
            match = _STATISTIC.fullmatch(name)
            if match is not None and count != before:
                self._stats[name] = count
                event, kind = match.groups()
                gained = count - before if count > before else count
                self._add(f"checkpoints_{event.replace(' ', '_')}", gained, kind)
