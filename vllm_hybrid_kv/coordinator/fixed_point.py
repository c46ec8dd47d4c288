# SPDX-License-Identifier: Apache-2.0
"""Prefix caching over any number and mix of KV groups: the longest prefix that all can serve.

The algorithm is that of vllm-project/vllm#31707, which vLLM follows in part.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

from vllm.utils.math_utils import round_down
from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator, SpecGroup
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock

from vllm_hybrid_kv.coordinator.lookup import GroupLookup, lookup_class


class FixedPointCoordinator(HybridKVCacheCoordinator):
    """vLLM's coordinator for several KV groups with a lookup that finds the longest hit.

    Groups of equal specs are looked up together (`attention_groups`, full attention first). Every
    one of these lookups g has a function

        f_g(n) = the greatest length of at most n tokens that g can serve,

    and the lengths are multiples of the alignment, 0 among them, which every group serves. A
    lookup starts with n as long as the request allows and replaces n by f_g(n) for one g after
    the other, round and round, until all have left n as it is.

    Why that ends: n falls by at least the alignment whenever it changes and never below 0, and
    after a change the round goes on for at most as many steps as there are lookups. So there are
    at most `lookups x (n / alignment + 1)` steps.

    Why it is the longest prefix that every group can serve: let c be that length. At the start
    c <= n. If c <= n before a step, then c is one of the lengths that f_g(n) is the greatest of,
    so c <= f_g(n), the next n. At the end n = f_g(n) for every g: every group serves n, and no
    longer prefix than c is served by all, so n = c.

    What a group can serve, draft layers among them, is in `lookup`. It does not depend on the
    step of the iteration, as it does in vLLM, which asks draft layers for their lookahead only
    once while the length falls.
    """

    def find_longest_cache_hit(
        self, block_hashes: list[BlockHash], max_cache_hit_length: int
    ) -> tuple[tuple[list[KVCacheBlock], ...], int, int]:
        """Find the longest prefix of a request that every group can serve.

        Args:
            block_hashes: The request's, one for every hash unit of its tokens.
            max_cache_hit_length: No hit is longer than this many tokens.

        Returns:
            The blocks by group, with null blocks where a group needs none; the number of tokens;
            and by how many tokens the first lookup's hit was longer, full attention's where there
            is any: vLLM keeps states and windows at the end of such a prefix when it is computed.
        """
        length, lookups = self.reconcile(block_hashes, max_cache_hit_length)
        hits: list[list[KVCacheBlock]] = [[] for _ in self.single_type_managers]
        for lookup, answer in lookups:
            served = answer if lookup.manager.retains_longer_hit else length
            if served > 0:
                self._hand_out(lookup, served, hits)
        return tuple(hits), length, lookups[0][1] - length if lookups else 0

    def find_longest_cache_hit_per_group(
        self, block_hashes: list[BlockHash], max_cache_hit_length: int
    ) -> tuple[tuple[list[KVCacheBlock], ...], tuple[int, ...]]:
        """Find the longest prefix of a request that each group can serve by itself.

        Args:
            block_hashes: The request's, one for every hash unit of its tokens.
            max_cache_hit_length: No hit is longer than this many tokens.

        Returns:
            The blocks and the numbers of tokens by group. Groups of equal specs have one answer;
            those that opt out of prefix caching have none and 0.
        """
        hits: list[list[KVCacheBlock]] = [[] for _ in self.single_type_managers]
        lengths = [0] * len(hits)
        for group in self.attention_groups:
            lookup = self.make_lookup(group, block_hashes)
            length = lookup.longest(round_down(max_cache_hit_length, lookup.alignment))
            if length > 0:
                self._hand_out(lookup, length, hits)
            for group_id in lookup.group.group_ids:
                lengths[group_id] = length
        return tuple(hits), tuple(lengths)

    @staticmethod
    def _hand_out(lookup: GroupLookup, length: int, hits: list[list[KVCacheBlock]]) -> None:
        for group_id, blocks in zip(lookup.group.group_ids, lookup.blocks(length), strict=True):
            hits[group_id] = blocks

    def make_lookup(self, group: SpecGroup, block_hashes: Sequence[BlockHash]) -> GroupLookup:
        """Return a lookup of a request in one of `attention_groups`."""
        manager = self.single_type_managers[group.group_ids[0]]
        return lookup_class(group.manager_cls)(
            group, manager, block_hashes, self._cache_hit_alignment_tokens
        )

    def reconcile(
        self, block_hashes: Sequence[BlockHash], limit: int
    ) -> tuple[int, list[tuple[GroupLookup, int]]]:
        """Iterate to the longest prefix of a request that all groups can serve.

        Args:
            block_hashes: The request's, one for every hash unit of its tokens.
            limit: No hit is longer than this many tokens.

        Returns:
            The number of tokens, and the lookups with what each answered when it was first asked,
            in the order of `attention_groups`. Where that came to nothing the rest was not asked.
        """
        length = round_down(limit, self._cache_hit_alignment_tokens)
        lookups: list[tuple[GroupLookup, int]] = []
        # How many of those asked last gave the length that it is now.
        agreed = 0
        for group in self.attention_groups:
            if length <= 0:
                return 0, lookups
            lookup = self.make_lookup(group, block_hashes)
            answer = lookup.longest(length)
            lookups.append((lookup, answer))
            agreed = agreed + 1 if answer == length else 1
            length = answer
        for lookup, _ in cycle(lookups):
            if length <= 0 or agreed == len(lookups):
                break
            answer = lookup.longest(length)
            agreed = agreed + 1 if answer == length else 1
            length = answer
        return length, lookups
