# SPDX-License-Identifier: Apache-2.0
"""Prefix caching over any mix of KV groups: the longest prefix that all of them can serve.

The algorithm is that of vllm-project/vllm#31707. vLLM's own lookup implements only part of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm.utils.math_utils import round_down
from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator, SpecGroup
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock

from vllm_hybrid_kv.coordinator.block_map import install_grouped_map
from vllm_hybrid_kv.coordinator.lookup import GroupLookup, lookup_class
from vllm_hybrid_kv.coordinator.observer import HitObserver
from vllm_hybrid_kv.coordinator.upstream_fixes import PassedBlocks, StepWrites
from vllm_hybrid_kv.state import STATE

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.request import Request

    from vllm_hybrid_kv.coordinator.explanation import Explanation


class Reconciliation(NamedTuple):
    """The longest prefix of a request that several groups can serve, and how it was found.

    Attributes:
        block_hashes: The request's hashes, one per hash unit.
        limit: The maximum hit in tokens.
        start: The length in tokens that the iteration started with.
        length: The longest prefix that all groups can serve, in tokens.
        answers: The first answer of each group, up to the group that answered 0.
        reductions: Later reductions: the index of the group, and the length before and after.
    """

    block_hashes: Sequence[BlockHash]
    limit: int
    start: int
    length: int
    answers: list[int]
    reductions: list[tuple[int, int, int]]


class FixedPointCoordinator(HybridKVCacheCoordinator):
    """vLLM's coordinator for several KV groups, with a lookup that finds the longest hit.

    Groups of equal specs are looked up together (`attention_groups`, full attention first). A
    lookup g defines

        f_g(n) = the greatest length of at most n tokens that g can serve.

    Lengths are multiples of the alignment, and every group can serve 0. The iteration starts with
    the longest n that the request allows. It replaces n by f_g(n), for each g in turn, until no
    lookup changes n.

    The iteration ends, because n falls by at least the alignment whenever it changes. There are at
    most `lookups x (n / alignment + 1)` steps.

    The iteration finds the longest prefix c that every group can serve. At the start c <= n. If
    c <= n before a step, then f_g(n) is the maximum over a set that contains c, so c <= f_g(n). At
    the end every group can serve n, so n <= c.

    The module `lookup` defines which lengths a group can serve, and the definition is the same in
    every step of the iteration. vLLM's own lookup requires the lookahead of draft layers in some
    steps only.
    """

    def __init__(self, *args: Any, **factory_args: Any) -> None:
        """Make the coordinator with the arguments of vLLM's factory."""
        super().__init__(*args, **factory_args)
        self.observer = HitObserver(self, STATE.settings.coordinator)
        self._step_writes = StepWrites(
            self.single_type_managers if self.enable_partial_hash_hits else ()
        )
        self._passed_blocks = PassedBlocks(self.single_type_managers)
        # Whole hash units passed to `cache_blocks`, by request.
        self._offered: dict[str, int] = {}

    def attach(self, kv_cache_manager: KVCacheManager) -> None:
        """Start counting if the manager logs statistics. Called before the scheduler starts."""
        if kv_cache_manager.log_stats:
            self.observer.start_counting()

    def stats(self) -> Mapping[str, int]:
        """Return counts of checkpoints by event and, for some events, by kind: `kept prompt`."""
        return {}

    def explain(self, request: Request) -> Explanation:
        """Explain a request's scheduled lookup, or a new one if the request holds no blocks."""
        return self.observer.explain(request)

    def find_longest_cache_hit(
        self, block_hashes: list[BlockHash], max_cache_hit_length: int
    ) -> tuple[tuple[list[KVCacheBlock], ...], int, int]:
        """Find the longest prefix of a request that every group can serve.

        Args:
            block_hashes: The request's hashes, one per hash unit.
            max_cache_hit_length: The maximum hit in tokens.

        Returns:
            The blocks of each group, with null blocks where the group needs none; the hit in
            tokens; and how many tokens more the first group could serve alone. When vLLM computes
            that longer prefix, it caches the states and windows at the prefix's end.
        """
        result, lookups = self._reconcile(block_hashes, max_cache_hit_length, self.attention_groups)
        # The observer does not get the lookups, because they hold thousands of blocks.
        self.observer.last_lookup = result
        hits: list[list[KVCacheBlock]] = [[] for _ in self.single_type_managers]
        for lookup, answer in zip(lookups, result.answers, strict=True):
            served = answer if lookup.manager.retains_longer_hit else result.length
            if served > 0:
                _collect_blocks(lookup, served, hits)
        longer = result.answers[0] - result.length if result.answers else 0
        return tuple(hits), result.length, longer

    def find_longest_cache_hit_per_group(
        self, block_hashes: list[BlockHash], max_cache_hit_length: int
    ) -> tuple[tuple[list[KVCacheBlock], ...], tuple[int, ...]]:
        """Find the longest prefix of a request that each group can serve alone.

        Args:
            block_hashes: The request's hashes, one per hash unit.
            max_cache_hit_length: The maximum hit in tokens.

        Returns:
            The blocks and the hit in tokens of each group. Groups of equal specs hit the same
            length, and groups that opt out of prefix caching hit nothing.
        """
        hits: list[list[KVCacheBlock]] = [[] for _ in self.single_type_managers]
        lengths = [0] * len(hits)
        for group in self.attention_groups:
            lookup = self.make_lookup(group, block_hashes)
            length = lookup.longest(round_down(max_cache_hit_length, lookup.alignment))
            if length > 0:
                _collect_blocks(lookup, length, hits)
            for group_id in group.group_ids:
                lengths[group_id] = length
        # A KV connector loads the difference, so no group shortens the hit of another.
        start = round_down(max_cache_hit_length, self._cache_hit_alignment_tokens)
        self.observer.last_lookup = Reconciliation(
            block_hashes, max_cache_hit_length, start, 0, [], []
        )
        return tuple(hits), tuple(lengths)

    def make_lookup(self, group: SpecGroup, block_hashes: Sequence[BlockHash]) -> GroupLookup:
        """Return a lookup of a request in one of `attention_groups`."""
        manager = self.single_type_managers[group.group_ids[0]]
        # At every lookup, because vLLM makes a new map when the cache is reset.
        install_grouped_map(manager.block_pool)
        return lookup_class(group.manager_cls)(
            group, manager, block_hashes, self._cache_hit_alignment_tokens
        )

    def reconcile(
        self, block_hashes: Sequence[BlockHash], limit: int, groups: Sequence[SpecGroup]
    ) -> Reconciliation:
        """Find the longest prefix of a request that all given groups can serve.

        Args:
            block_hashes: The request's hashes, one per hash unit.
            limit: The maximum hit in tokens.
            groups: Some of `attention_groups`, in their order.
        """
        return self._reconcile(block_hashes, limit, groups)[0]

    def _reconcile(
        self, block_hashes: Sequence[BlockHash], limit: int, groups: Sequence[SpecGroup]
    ) -> tuple[Reconciliation, list[GroupLookup]]:
        """Reconcile, and also return the lookups of the groups that answered."""
        start = length = round_down(limit, self._cache_hit_alignment_tokens)
        lookups: list[GroupLookup] = []
        answers: list[int] = []
        reductions: list[tuple[int, int, int]] = []
        # How many of the latest answers equal the current length.
        agreed = 0
        for group in groups:
            if length <= 0:
                break
            lookup = self.make_lookup(group, block_hashes)
            answer = lookup.longest(length)
            lookups.append(lookup)
            answers.append(answer)
            agreed = agreed + 1 if answer == length else 1
            length = answer
        for index in cycle(range(len(lookups))):
            if length <= 0 or agreed == len(lookups):
                break
            answer = lookups[index].longest(length)
            if answer == length:
                agreed += 1
            else:
                reductions.append((index, length, answer))
                agreed = 1
                length = answer
        length = max(length, 0)
        return Reconciliation(block_hashes, limit, start, length, answers, reductions), lookups

    def allocate_new_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: tuple[Sequence[KVCacheBlock], ...],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        self.observer.scheduled(request_id, num_local_computed_tokens)
        super().allocate_new_computed_blocks(
            request_id,
            new_computed_blocks,
            num_local_computed_tokens,
            num_external_computed_tokens,
            *args,
            **kwargs,
        )
        self._passed_blocks.resume(
            request_id, num_local_computed_tokens + num_external_computed_tokens
        )

    def allocate_new_blocks(
        self, request_id: str, *args: Any, **kwargs: Any
    ) -> tuple[list[KVCacheBlock], ...]:
        # vLLM calls `allocate_new_computed_blocks` first if the request hit anything.
        self.observer.scheduled(request_id, 0)
        return super().allocate_new_blocks(request_id, *args, **kwargs)

    def new_step_starts(self) -> None:
        super().new_step_starts()
        self._step_writes.clear()

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: tuple[Sequence[KVCacheBlock], ...],
        num_encoder_tokens: int,
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """Return how many blocks a step of a request needs.

        If the request hits part of a block that this step writes, return more blocks than the pool
        has. vLLM itself postpones a request to the next step in this way.
        """
        if any(new_computed_blocks) and self._step_writes.overlap(
            new_computed_blocks, num_local_computed_tokens
        ):
            return self.block_pool.num_gpu_blocks + 1
        return super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            num_encoder_tokens,
            total_computed_tokens,
            num_local_computed_tokens,
            *args,
            **kwargs,
        )

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        if self._completes_a_unit(request, num_computed_tokens):
            self._cache_blocks(request, num_computed_tokens)

    def _cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        self._offered[request.request_id] = num_computed_tokens // self.hash_block_size
        self._step_writes.add(request, num_computed_tokens)
        self.observer.cached(request)
        self._passed_blocks.hide(request, num_computed_tokens)
        try:
            super().cache_blocks(request, num_computed_tokens)
        finally:
            self._passed_blocks.restore(request)

    def _completes_a_unit(self, request: Request, num_computed_tokens: int) -> bool:
        """Return whether a step may have computed something that can be cached.

        Cached blocks and parts of blocks end where a hash unit ends, and most decoding steps
        complete no hash unit. Skipping those steps saves a fifth of the scheduler's time. With
        draft layers no step is skipped, because their groups cache tokens further back than the
        last hash unit.
        """
        units = num_computed_tokens // self.hash_block_size
        return (
            units != self._offered.get(request.request_id)
            or request.num_computed_tokens < request.num_prompt_tokens
            or bool(self.eagle_group_ids)
        )

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._forget(request_id)
        return super().pop_blocks_for_free(request_id)

    def free(self, request_id: str) -> None:
        self._forget(request_id)
        super().free(request_id)

    def _forget(self, request_id: str) -> None:
        self._offered.pop(request_id, None)
        self._passed_blocks.forget(request_id)
        self.observer.freed(request_id)


def _collect_blocks(lookup: GroupLookup, length: int, hits: list[list[KVCacheBlock]]) -> None:
    for group_id, blocks in zip(lookup.group.group_ids, lookup.blocks(length), strict=True):
        hits[group_id] = blocks
