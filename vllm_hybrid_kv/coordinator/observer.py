# SPDX-License-Identifier: Apache-2.0
"""Reports prefix cache hits in explanations, counters, DEBUG lines and a warning."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import KVCacheSpecKind, MambaSpec, get_kv_cache_spec_kind

from vllm_hybrid_kv.coordinator.explanation import Explanation, KindHit, Reason
from vllm_hybrid_kv.metrics import Counters, engine_labels, folder

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import BlockHash
    from vllm.v1.request import Request

    from vllm_hybrid_kv.coordinator.longest_hit import FixedPointCoordinator, Reconciliation

# A child of the logger `vllm`, whose handlers vLLM configures.
logger = init_logger("vllm.hybrid_kv")

WARNING_REQUESTS = 100
"""Requests whose losses are added up before the observer decides whether to warn."""

WARNING_INTERVAL_S = 600.0

_REQUEST_COUNTERS = (
    "prefix_cache_requests",
    "prefix_cache_short_requests",
    "prefix_cache_preempted_requests",
    "prefix_cache_preempted_query_tokens",
    "prefix_cache_preempted_hit_tokens",
)
_KIND_COUNTERS = (
    "prefix_cache_hit_tokens",
    "prefix_cache_alone_tokens",
    "prefix_cache_limited_requests",
    "prefix_cache_lost_tokens",
)


@dataclass(frozen=True)
class GroupKind:
    """One kind of KV group.

    Attributes:
        name: vLLM's name of the kind, with the suffix `_draft` if `draft`.
        draft: Whether its groups include draft layers.
        groups: Indices of its groups in the coordinator's `attention_groups`.
        full_attention: Whether its layers attend to every earlier token.
    """

    name: str
    draft: bool
    groups: list[int]
    full_attention: bool


def kinds_of(coordinator: FixedPointCoordinator) -> list[GroupKind]:
    """Merge a coordinator's groups by kind, because metrics and messages name kinds."""
    kinds: dict[str, GroupKind] = {}
    for index, group in enumerate(coordinator.attention_groups):
        # If no group is marked as a draft group, vLLM marks all. But states have no draft layers.
        draft = group.use_eagle and not isinstance(group.spec, MambaSpec)
        name = get_kv_cache_spec_kind(group.spec).value + "_draft" * draft
        full = issubclass(group.manager_cls, FullAttentionManager)
        kinds.setdefault(name, GroupKind(name, draft, [], full)).groups.append(index)
    return list(kinds.values())


class HitObserver:
    """Observes the lookups of one coordinator.

    vLLM first looks up a request's hashes, then allocates blocks by the request's id, and last
    passes the request itself to cache its blocks. `last_lookup`, `scheduled` and `cached` follow
    these three calls. vLLM schedules a request directly after its lookup, with two exceptions. A
    request that does not read the cache has no lookup. After a lookup, the request may not fit into
    the pool. `cached` detects both cases by comparing the hashes.

    Attributes:
        kinds: The kinds of the coordinator's groups.
        last_lookup: The latest lookup, until its request is scheduled.
    """

    def __init__(self, coordinator: FixedPointCoordinator, strategy: str) -> None:
        self._coordinator = coordinator
        self._strategy = strategy
        self.kinds = kinds_of(coordinator)
        self._unit = coordinator._cache_hit_alignment_tokens
        self._counters: Counters | None = None
        self._stats: Counter[tuple[str, str | None]] = Counter()
        self.last_lookup: Reconciliation | None = None
        # For each request that holds blocks: its explanation, or None if it had no lookup.
        self._records: dict[str, Explanation | None] = {}
        # For each scheduled request that was not reported yet: the hashes that were looked up.
        self._unreported: dict[str, Sequence[BlockHash]] = {}
        self._quiet_until = time.monotonic()
        self._recent: list[Explanation] = []

    def start_counting(self) -> None:
        """Open the counters if a process exports metrics."""
        path = folder()
        if path is None:
            return
        try:
            self._counters = Counters(path, engine_labels())
        except OSError as error:
            # The server's temporary folder may be full. The engine then runs without these metrics.
            logger.warning("No metrics of the prefix cache: cannot write to %s: %s", path, error)
            return
        # Add 0, so that /metrics shows every counter from the start.
        for name in _REQUEST_COUNTERS:
            self._counters.add(name, 0)
        for kind in self.kinds:
            for name in _KIND_COUNTERS:
                self._counters.add(name, 0, kind.name)

    def scheduled(self, request_id: str, hit: int) -> None:
        """Record the lookup of a request, before its first blocks are allocated.

        A later explanation would differ: allocation may evict blocks that the lookup found, and the
        request's own blocks are cached under the same hashes. Only the first call for a request has
        an effect. `hit` is the number of tokens that the request reads from the cache.
        """
        if request_id in self._records:
            return
        lookup, self.last_lookup = self.last_lookup, None
        self._records[request_id] = None
        if lookup is not None:
            alone = self._counters is not None or logger.isEnabledFor(logging.DEBUG)
            self._records[request_id] = self._describe(request_id, lookup, hit, alone)
            self._unreported[request_id] = lookup.block_hashes

    def cached(self, request: Request) -> None:
        """Count and log the hit of a scheduled request, at the first call for that request."""
        block_hashes = self._unreported.pop(request.request_id, None)
        if block_hashes is None:
            return
        if block_hashes is not request.block_hashes:
            self._records[request.request_id] = None
            return
        why = self.explain(request)
        if self._counters is not None:
            self._count(self._counters, why)
        logger.debug("%s", why)
        if not why.preempted:
            self._warn_of_losses(why)

    def freed(self, request_id: str) -> None:
        """Forget a request, and update the counters of checkpoints."""
        if request_id in self._records:
            del self._records[request_id]
            self._unreported.pop(request_id, None)
            if self._counters is not None:
                self._count_checkpoints(self._counters)

    def explain(self, request: Request) -> Explanation:
        """Explain a request's scheduled lookup, or a new one if the request holds no blocks."""
        request_id = request.request_id
        scheduled = request_id in self._records
        why = self._records.get(request_id)
        if not scheduled and not request.skip_reading_prefix_cache:
            lookup = self._coordinator.reconcile(
                request.block_hashes, request.num_tokens - 1, self._coordinator.attention_groups
            )
            why = self._describe(request_id, lookup, lookup.length, alone=True)
        if why is None:
            tokens = request.num_prompt_tokens if scheduled else request.num_tokens
            kinds = tuple(KindHit(kind.name, kind.draft, None, 0) for kind in self.kinds)
            why = Explanation(
                request_id, scheduled, False, tokens, self._unit, 0, 0, kinds, Reason.NOT_READ, None
            )
        return replace(why, scheduled=scheduled, preempted=request.num_preemptions > 0)

    def _describe(
        self, request_id: str, lookup: Reconciliation, hit: int, alone: bool
    ) -> Explanation:
        """Explain the length of a hit, which a KV connector may have shortened.

        If `alone`, look up the prefix that each kind could serve alone, unless it is known.
        """
        groups = self._coordinator.attention_groups
        served: list[int | None] = []
        for kind in self.kinds:
            first, *others = kind.groups
            answered = first < len(lookup.lookups)
            if answered and not others and lookup.answers[first][1] == lookup.answers[0][1]:
                # No earlier group shortened the hit, so the group answered as it would alone.
                served.append(lookup.answers[first][2])
            elif alone:
                of_kind = [groups[index] for index in kind.groups]
                again = self._coordinator.reconcile(lookup.block_hashes, lookup.limit, of_kind)
                served.append(again.length)
            else:
                served.append(None)
        full = [n for kind, n in zip(self.kinds, served, strict=True) if kind.full_attention]
        reach = max((n for n in full or served if n is not None), default=0)
        lost = [0] * len(groups)
        for index, before, after in lookup.answers:
            # Tokens after `reach` do not count as lost, because no hit could have included them.
            lost[index] += max(min(before, reach) - after, 0)
        kinds = tuple(
            KindHit(kind.name, kind.draft, tokens, sum([lost[index] for index in kind.groups]))
            for kind, tokens in zip(self.kinds, served, strict=True)
        )
        setting = None
        if lookup.limit < self._unit:
            reason, setting = Reason.TOO_SHORT, self._setting_for(None)
        elif any(lost):
            reason = Reason.LIMITED
            setting = self._setting_for(max(kinds, key=lambda kind: kind.lost_tokens))
        elif hit + self._unit > lookup.limit:
            reason = Reason.LAST_TOKEN
        else:
            reason = Reason.NOT_CACHED
        return Explanation(
            request_id=request_id,
            scheduled=True,
            preempted=False,
            prompt_tokens=lookup.limit + 1,
            unit_tokens=self._unit,
            hit_tokens=hit,
            reach_tokens=max(reach, hit),
            kinds=kinds,
            reason=reason,
            setting=setting,
        )

    def _setting_for(self, kind: KindHit | None) -> str | None:
        """Return settings that may lengthen hits. If `kind` is None, the match unit limits them."""
        partial = self._coordinator.enable_partial_hash_hits
        specs = [group.spec for group in self._coordinator.attention_groups]
        settings = []
        if {spec.mamba_cache_mode for spec in specs if isinstance(spec, MambaSpec)} == {"align"}:
            states = kind is not None and kind.name == KVCacheSpecKind.MAMBA.value
            if states and self._strategy != "hybrid_aware":
                settings.append("coordinator=hybrid_aware")
            if not partial:
                settings.append("prefix_match_unit=auto")
        if settings:
            return f"the hybrid_kv setting {' and '.join(settings)}"
        if kind is None or kind.draft:
            return None if partial else "a smaller --block-size"
        return "more memory for the KV cache (--gpu-memory-utilization, --kv-cache-memory-bytes)"

    def _count(self, counters: Counters, why: Explanation) -> None:
        """Count a request that was scheduled, for the first time or after a preemption."""
        if why.preempted:
            counters.add("prefix_cache_preempted_requests", 1)
            counters.add("prefix_cache_preempted_query_tokens", why.prompt_tokens)
            counters.add("prefix_cache_preempted_hit_tokens", why.hit_tokens)
            return
        counters.add("prefix_cache_requests", 1)
        counters.add("prefix_cache_short_requests", int(why.reason is Reason.TOO_SHORT))
        for kind in why.kinds:
            counters.add("prefix_cache_hit_tokens", why.hit_tokens, kind.name)
            counters.add("prefix_cache_alone_tokens", kind.alone_tokens or 0, kind.name)
            counters.add("prefix_cache_lost_tokens", kind.lost_tokens, kind.name)
        if why.limited_by is not None:
            counters.add("prefix_cache_limited_requests", 1, why.limited_by)

    def _count_checkpoints(self, counters: Counters) -> None:
        """Add the events that the coordinator has counted since the last call."""
        stats = self._coordinator.stats()
        for (event, kind), gained in (stats - self._stats).items():
            counters.add(f"checkpoints_{event}", gained, kind)
        self._stats = stats.copy()

    def _warn_of_losses(self, why: Explanation) -> None:
        """Warn if the last requests recomputed most of what full attention had cached."""
        self._recent.append(why)
        if len(self._recent) < WARNING_REQUESTS:
            return
        recent, self._recent = self._recent, []
        reach = sum(why.reach_tokens for why in recent)
        lost = sum(why.lost_tokens for why in recent)
        now = time.monotonic()
        if 2 * lost <= reach or now < self._quiet_until:
            return
        self._quiet_until = now + WARNING_INTERVAL_S
        of_kinds = zip(*(why.kinds for why in recent), strict=True)
        totals = [sum(hit.lost_tokens for hit in of_kind) for of_kind in of_kinds]
        worst = why.kinds[totals.index(max(totals))]
        full = [kind.name for kind in self.kinds if kind.full_attention]
        setting = self._setting_for(worst)
        logger.warning(
            "In the last %d requests, %s had %d prompt tokens in the prefix cache, but %d "
            "(%.0f %%) were recomputed, %d of these because KV groups of kind %s had not cached "
            "them%s",
            len(recent),
            full[0] if full else "one kind of KV group",
            reach,
            lost,
            100 * lost / reach,
            max(totals),
            worst.name,
            f"; try {setting}" if setting else "",
        )
