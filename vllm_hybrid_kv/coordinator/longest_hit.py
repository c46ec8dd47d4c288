# SPDX-License-Identifier: Apache-2.0
"""Prefix caching over any mix of KV groups: the longest prefix that all of them can serve.

The algorithm is that of vllm-project/vllm#31707. vLLM's own lookup implements only part of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

from vllm.utils.math_utils import round_down
from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator, SpecGroup
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.request import Request

from vllm_hybrid_kv.coordinator.block_map import install_grouped_map
from vllm_hybrid_kv.coordinator.events import cache_runs, publish_hit
from vllm_hybrid_kv.coordinator.explanation import Explanation
from vllm_hybrid_kv.coordinator.lookup import LOOKUPS, GroupLookup
from vllm_hybrid_kv.coordinator.observer import HitObserver
from vllm_hybrid_kv.coordinator.upstream_fixes import PassedBlocks, StepWrites
from vllm_hybrid_kv.state import STATE


class Reconciliation(NamedTuple):
    """The longest prefix of a request that several groups can serve, and how it was found.

    Attributes:
        limit: The maximum hit in tokens.
        length: The longest prefix that all groups can serve, in tokens.
        lookups: A lookup for each group, up to the group that answered 0.
        answers: One per step: the index of the lookup, the length that it was asked for, and the
            length that it can serve. The first steps ask each lookup once, in order.
    """

    block_hashes: Sequence[BlockHash]
    limit: int
    length: int
    lookups: list[GroupLookup]
    answers: list[tuple[int, int, int]]


class FixedPointCoordinator(HybridKVCacheCoordinator):
    """vLLM's coordinator for several KV groups, with a lookup that finds the longest hit.

    Groups of equal specs are looked up together (`attention_groups`, full attention first). A
    lookup g defines

        f_g(n) = the greatest length of at most n tokens that g can serve.

    Lengths are multiples of the alignment, and every group can serve 0. The iteration starts with
    the longest n that the request allows. It replaces n by f_g(n), for each g in turn, until no
    lookup changes n. It ends, because n falls by at least the alignment whenever it changes.

    Let c be the longest prefix that every group can serve. At the start, c <= n. If c <= n before a
    step, f_g(n) is the maximum over a set that contains c, so c <= f_g(n). At the end, every group
    can serve n, so n <= c. The result n is therefore c.

    The module `lookup` defines which lengths a group can serve. Draft layers need a cached unit
    after the hit. vLLM's own lookup checks this in some steps only.
    """

    def __init__(self, *args: Any, **factory_args: Any) -> None:
        super().__init__(*args, **factory_args)
        self.observer = HitObserver(self, STATE.settings.coordinator)
        self._step_writes = StepWrites(
            self.single_type_managers if self.enable_partial_hash_hits else ()
        )
        self._passed_blocks = PassedBlocks(self.single_type_managers)
        # For each request id: how many whole hash units were computed when it last cached blocks.
        self._offered: dict[str, int] = {}
        pool = self.block_pool
        if pool.enable_kv_cache_events:
            pool.cache_full_blocks = partial(cache_runs, pool.cache_full_blocks)

    @property
    def knows_all_groups(self) -> bool:
        """Whether `LOOKUPS` has the manager of every group. It lacks those of other packages."""
        classes = [group.manager_cls for group in self.attention_groups]
        return all(cls.find_longest_cache_hit.__func__ in LOOKUPS for cls in classes)

    def attach(self, kv_cache_manager: Any) -> None:
        """Start counting if vLLM's KV cache manager logs statistics."""
        if kv_cache_manager.log_stats:
            self.observer.start_counting()

    def stats(self) -> Counter[tuple[str, str | None]]:
        """Return counts of checkpoint events; empty, because this policy has no checkpoints."""
        return Counter()

    def explain(self, request: Request) -> Explanation:
        """Explain a request's scheduled lookup, or a new one if the request holds no blocks."""
        return self.observer.explain(request)

    def find_longest_cache_hit(
        self, block_hashes: list[BlockHash], max_cache_hit_length: int
    ) -> tuple[tuple[list[KVCacheBlock], ...], int, int]:
        """Find the longest prefix of a request that every group can serve.

        Returns:
            The blocks of each group, with null blocks where the group needs none; the hit in
            tokens; and how many tokens more the first group could serve alone. When vLLM computes
            that longer prefix, it caches the states and windows at the prefix's end.
        """
        result = self.reconcile(block_hashes, max_cache_hit_length, self.attention_groups)
        self.observer.last_lookup = result
        hits: list[list[KVCacheBlock]] = [[] for _ in self.single_type_managers]
        for lookup, (_, _, first) in zip(result.lookups, result.answers, strict=False):
            served = first if lookup.manager.retains_longer_hit else result.length
            if served > 0:
                _collect_blocks(lookup, served, hits)
        longer = result.answers[0][2] - result.length if result.answers else 0
        return tuple(hits), result.length, longer

    def find_longest_cache_hit_per_group(
        self, block_hashes: list[BlockHash], max_cache_hit_length: int
    ) -> tuple[tuple[list[KVCacheBlock], ...], tuple[int, ...]]:
        """Find the longest prefix of a request that each group can serve alone.

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
        # Groups may keep hits of different lengths: the KV connector loads the missing blocks.
        self.observer.last_lookup = Reconciliation(block_hashes, max_cache_hit_length, 0, [], [])
        return tuple(hits), tuple(lengths)

    def make_lookup(self, group: SpecGroup, block_hashes: Sequence[BlockHash]) -> GroupLookup:
        """Prepare the lookup of a request in one of `attention_groups`."""
        manager = self.single_type_managers[group.group_ids[0]]
        # Check the map at every lookup, because vLLM makes a new map when the cache is reset.
        install_grouped_map(manager.block_pool)
        lookup_class = LOOKUPS[group.manager_cls.find_longest_cache_hit.__func__]
        return lookup_class(group, manager, block_hashes, self._cache_hit_alignment_tokens)

    def reconcile(
        self, block_hashes: Sequence[BlockHash], limit: int, groups: Sequence[SpecGroup]
    ) -> Reconciliation:
        """Find the longest prefix of up to `limit` tokens that all given groups can serve.

        The groups are some of `attention_groups`, in their order.
        """
        length = max(round_down(limit, self._cache_hit_alignment_tokens), 0)
        lookups: list[GroupLookup] = []
        answers: list[tuple[int, int, int]] = []
        # How many lookups can serve `length`, as far as known. If all can, `length` is the hit.
        agreed = 0
        for index in cycle(range(len(groups))):
            if length == 0 or agreed == len(groups):
                break
            if index == len(lookups):
                lookups.append(self.make_lookup(groups[index], block_hashes))
            answer = lookups[index].longest(length)
            answers.append((index, length, answer))
            agreed = agreed + 1 if answer == length else 1
            length = answer
        return Reconciliation(block_hashes, limit, length, lookups, answers)

    def allocate_new_computed_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> None:
        local = kwargs["num_local_computed_tokens"]
        self.observer.scheduled(request_id, local)
        super().allocate_new_computed_blocks(request_id, *args, **kwargs)
        self._passed_blocks.resume(request_id, local + kwargs["num_external_computed_tokens"])

    def allocate_new_blocks(
        self, request_id: str, *args: Any, **kwargs: Any
    ) -> tuple[list[KVCacheBlock], ...]:
        # If the request hit anything, `allocate_new_computed_blocks` has recorded that already.
        self.observer.scheduled(request_id, 0)
        return super().allocate_new_blocks(request_id, *args, **kwargs)

    def new_step_starts(self) -> None:
        super().new_step_starts()
        self._step_writes.first_written.clear()

    def get_num_blocks_to_allocate(self, *args: Any, **kwargs: Any) -> int:
        """Return how many blocks a step of a request needs. vLLM passes all arguments by name.

        A request that hits part of a block which this step writes must wait for the next step. To
        make vLLM postpone it, return more blocks than the pool has, as vLLM itself does.
        """
        hits, tokens = kwargs["new_computed_blocks"], kwargs["num_local_computed_tokens"]
        if any(hits) and self._step_writes.overlap(hits, tokens):
            return self.block_pool.num_gpu_blocks + 1
        return super().get_num_blocks_to_allocate(*args, **kwargs)

    def emit_cached_block_events(
        self, request: Request, computed_blocks: tuple[list[KVCacheBlock], ...]
    ) -> None:
        for manager, blocks in zip(self.single_type_managers, computed_blocks, strict=True):
            if blocks:
                publish_hit(manager, request, blocks)

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        self._cache_new_blocks(request, num_computed_tokens)

    def _cache_new_blocks(self, request: Request, num_computed_tokens: int) -> bool:
        """Cache a request's blocks, or return False if the step completed nothing to cache.

        Only whole hash units are cached, and most decoding steps complete none. Skipping those
        steps saves a fifth of the scheduler's time. Engines with draft layers skip no step: vLLM
        caches a draft group's last tokens later, so a unit may become ready in any step.
        """
        request_id, units = request.request_id, num_computed_tokens // self.hash_block_size
        if (
            units == self._offered.get(request_id)
            and request.num_computed_tokens >= request.num_prompt_tokens
            and not self.eagle_group_ids
        ):
            return False
        self._offered[request_id] = units
        self._step_writes.add(request, num_computed_tokens)
        self.observer.cached(request)
        with self._passed_blocks.hidden(request, num_computed_tokens):
            super().cache_blocks(request, num_computed_tokens)
        return True

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
