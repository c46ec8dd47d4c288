# SPDX-License-Identifier: Apache-2.0
"""Prefix caching over any number and mix of KV groups: the longest prefix that all can serve.

The algorithm is that of vllm-project/vllm#31707, which vLLM follows in part.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm.utils.math_utils import round_down
from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator, SpecGroup
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.kv_cache_interface import MambaSpec

from vllm_hybrid_kv.coordinator.explanation import Cache, Explanation, Found, kinds_of
from vllm_hybrid_kv.coordinator.hit_report import CheckpointKeeper, HitReport
from vllm_hybrid_kv.coordinator.lookup import GroupLookup, lookup_class
from vllm_hybrid_kv.coordinator.passed_blocks import PassedBlocks
from vllm_hybrid_kv.coordinator.step_writes import StepWrites
from vllm_hybrid_kv.state import STATE

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.request import Request


class Agreement(NamedTuple):
    """What groups agreed on.

    Attributes:
        start: The length in tokens that the first of them was asked for.
        length: The longest that all of them serve.
        answers: What each answered when it was first asked. Where the length came to nothing the
            rest was not asked and has none.
        later: Places of groups that shortened it when asked again, from how much and to how much.
    """

    start: int
    length: int
    answers: list[int]
    later: list[tuple[int, int, int]]


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

    What was found for a request, and which groups made it less, is kept while it runs: see
    `explain`.
    """

    def __init__(self, *args: Any, **factory_args: Any) -> None:
        """Make the coordinator.

        Args:
            *args: The arguments of vLLM's factory.
            **factory_args: The rest of them, or all.
        """
        super().__init__(*args, **factory_args)
        states = [
            group.spec.mamba_cache_mode
            for group in self.attention_groups
            if isinstance(group.spec, MambaSpec)
        ]
        self._cache = Cache(
            kinds_of(self.attention_groups),
            self._cache_hit_alignment_tokens,
            self.enable_partial_hash_hits,
            bool(states) and all(mode == "align" for mode in states),
            STATE.settings.coordinator,
        )
        managers = enumerate(self.single_type_managers)
        self._step_writes = StepWrites(
            {
                group: manager
                for group, manager in managers
                if self.enable_partial_hash_hits
                and manager.supports_fine_grained_hash_lookup
                and not isinstance(manager, MambaManager)
            }
        )
        self._passed_blocks = PassedBlocks(self.single_type_managers)
        self._report: HitReport | None = None
        self._checkpoint_keeper: CheckpointKeeper | None = None
        self._last_lookup: tuple[Sequence[BlockHash], int, Agreement] | None = None
        # By the names of requests with blocks. None for those that read no cache.
        self._scheduled: dict[str, Found | None] = {}
        # The hashes of those among them that nothing was told of yet.
        self._untold: dict[str, Sequence[BlockHash]] = {}
        # Whole hash units that were offered to the cache, by request.
        self._offered: dict[str, int] = {}

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
        agreement, lookups = self._reconcile(
            block_hashes, max_cache_hit_length, self.attention_groups
        )
        # Without the lookups: they have thousands of blocks, which nobody may keep but a request.
        self._last_lookup = (block_hashes, max_cache_hit_length, agreement)
        length = agreement.length
        hits: list[list[KVCacheBlock]] = [[] for _ in self.single_type_managers]
        for lookup, answer in zip(lookups, agreement.answers, strict=True):
            served = answer if lookup.manager.retains_longer_hit else length
            if served > 0:
                self._hand_out(lookup, served, hits)
        longer = agreement.answers[0] - length if agreement.answers else 0
        return tuple(hits), length, longer

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
        # What a KV connector then brings may let the groups hit different lengths: none shortens
        # another's.
        start = round_down(max_cache_hit_length, self._cache_hit_alignment_tokens)
        self._last_lookup = (block_hashes, max_cache_hit_length, Agreement(start, 0, [], []))
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
        self, block_hashes: Sequence[BlockHash], limit: int, groups: Sequence[SpecGroup]
    ) -> Agreement:
        """Iterate to the longest prefix of a request that all of some groups can serve.

        Args:
            block_hashes: The request's, one for every hash unit of its tokens.
            limit: No hit is longer than this many tokens.
            groups: Some of `attention_groups`, in their order.
        """
        return self._reconcile(block_hashes, limit, groups)[0]

    def _reconcile(
        self, block_hashes: Sequence[BlockHash], limit: int, groups: Sequence[SpecGroup]
    ) -> tuple[Agreement, list[GroupLookup]]:
        """Reconcile, and return the lookups of the groups that were asked too."""
        start = length = round_down(limit, self._cache_hit_alignment_tokens)
        lookups: list[GroupLookup] = []
        answers: list[int] = []
        later: list[tuple[int, int, int]] = []
        # How many of those asked last gave the length that it is now.
        agreed = 0
        for group in groups:
            if length <= 0:
                return Agreement(start, 0, answers, later), lookups
            lookup = self.make_lookup(group, block_hashes)
            answer = lookup.longest(length)
            lookups.append(lookup)
            answers.append(answer)
            agreed = agreed + 1 if answer == length else 1
            length = answer
        for place in cycle(range(len(lookups))):
            if length <= 0 or agreed == len(lookups):
                break
            answer = lookups[place].longest(length)
            if answer == length:
                agreed += 1
            else:
                later.append((place, length, answer))
                agreed = 1
                length = answer
        return Agreement(start, length, answers, later), lookups

    def attach(self, kv_cache_manager: KVCacheManager) -> None:
        """Be told the manager that had this made, whose requests are told of from now on.

        Args:
            kv_cache_manager: Says whether statistics are kept.
        """
        self._report = HitReport(self._cache, kv_cache_manager.log_stats)
        self._checkpoint_keeper = self if isinstance(self, CheckpointKeeper) else None

    def explain(self, request: Request) -> Explanation:
        """Say why a request hit what it hit.

        Args:
            request: One that runs: what was found when it was scheduled. Or one that does not,
                such as one that waits: what would be found now.
        """
        preempted = request.num_preemptions > 0
        if request.request_id in self._scheduled:
            found = self._scheduled[request.request_id]
            num_tokens = request.num_prompt_tokens if found is None else found.limit + 1
            return self._cache.explain(found, request.request_id, num_tokens, True, preempted)
        if request.skip_reading_prefix_cache:
            found = None
        else:
            hashes, limit = request.block_hashes, request.num_tokens - 1
            agreement = self.reconcile(hashes, limit, self.attention_groups)
            found = self._find(hashes, limit, agreement, agreement.length, alone=True)
        return self._cache.explain(found, request.request_id, request.num_tokens, False, preempted)

    def allocate_new_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: tuple[Sequence[KVCacheBlock], ...],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        *more: Any,
        **named: Any,
    ) -> None:
        """Give a request the blocks that it hit. See vLLM's."""
        if self._report is not None and request_id not in self._scheduled:
            self._schedule(self._report, request_id, num_local_computed_tokens)
        super().allocate_new_computed_blocks(
            request_id,
            new_computed_blocks,
            num_local_computed_tokens,
            num_external_computed_tokens,
            *more,
            **named,
        )
        self._passed_blocks.resume(
            request_id, num_local_computed_tokens + num_external_computed_tokens
        )

    def allocate_new_blocks(
        self, request_id: str, *more: Any, **named: Any
    ) -> tuple[list[KVCacheBlock], ...]:
        """Give a request new blocks. See vLLM's."""
        if self._report is not None and request_id not in self._scheduled:
            # One that hit something has come by before.
            self._schedule(self._report, request_id, 0)
        blocks: tuple[list[KVCacheBlock], ...] = super().allocate_new_blocks(
            request_id, *more, **named
        )
        return blocks

    def new_step_starts(self) -> None:
        """Begin a step. See vLLM's."""
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
        *more: Any,
        **named: Any,
    ) -> int:
        """Return how many blocks a step of a request takes. See vLLM's.

        More than there are, which is vLLM's own way to have it wait for the next step, if it hits a
        part of what this one writes.
        """
        if any(new_computed_blocks) and self._step_writes.meet(
            new_computed_blocks, num_local_computed_tokens
        ):
            return self.block_pool.num_gpu_blocks + 1
        blocks: int = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            num_encoder_tokens,
            total_computed_tokens,
            num_local_computed_tokens,
            *more,
            **named,
        )
        return blocks

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Cache a request's blocks. See vLLM's."""
        if not self._is_inside_a_unit(request, num_computed_tokens):
            self._cache_blocks(request, num_computed_tokens)

    def _cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        self._step_writes.add(request, num_computed_tokens)
        if self._report is not None and request.request_id in self._untold:
            self._tell(self._report, request)
        self._passed_blocks.hide(request, num_computed_tokens)
        try:
            super().cache_blocks(request, num_computed_tokens)
        finally:
            self._passed_blocks.restore(request)

    def _is_inside_a_unit(self, request: Request, num_computed_tokens: int) -> bool:
        """Whether a step of decoding completes no hash unit, so that there is nothing to cache.

        All that is cached, whole blocks and parts of them, ends where a unit does, and nobody can
        hit what such a step writes. Most steps are like that, and asking every group in each of
        them takes a fifth of the scheduler's time. Draft layers cache what is behind, which the
        unit does not tell.
        """
        units = num_computed_tokens // self.hash_block_size
        if (
            units == self._offered.get(request.request_id)
            and request.num_computed_tokens >= request.num_prompt_tokens
            and not self.eagle_group_ids
        ):
            return True
        self._offered[request.request_id] = units
        return False

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Take a request's blocks away from it. See vLLM's."""
        self._forget(request_id)
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        return blocks

    def free(self, request_id: str) -> None:
        """Free a request's blocks. See vLLM's."""
        self._forget(request_id)
        super().free(request_id)

    def _forget(self, request_id: str) -> None:
        self._offered.pop(request_id, None)
        self._passed_blocks.forget(request_id)
        if self._report is None or request_id not in self._scheduled:
            return
        del self._scheduled[request_id]
        self._untold.pop(request_id, None)
        if self._checkpoint_keeper is not None:
            self._report.tell_checkpoints(self._checkpoint_keeper.stats())

    def _schedule(self, report: HitReport, request_id: str, hit: int) -> None:
        """Note what was found for a request that is about to get its first blocks.

        Before it gets them, for they may be taken from what was found, and cached under the very
        hashes that were looked up. vLLM looks a request up just before: its lookup is the last.
        """
        found = None
        if self._last_lookup is not None:
            hashes, limit, agreement = self._last_lookup
            self._last_lookup = None
            found = self._find(hashes, limit, agreement, hit, report.wants_alone)
            self._untold[request_id] = hashes
        self._scheduled[request_id] = found

    def _tell(self, report: HitReport, request: Request) -> None:
        found = self._scheduled[request.request_id]
        if self._untold.pop(request.request_id) is not request.block_hashes or found is None:
            # It reads no cache, and the last lookup was of one that could not be scheduled.
            self._scheduled[request.request_id] = None
            return
        report.tell(request, found)

    def _find(
        self,
        hashes: Sequence[BlockHash],
        limit: int,
        agreement: Agreement,
        hit: int,
        alone: bool,
    ) -> Found:
        """Say how a hit came about.

        Args:
            hashes: The request's.
            limit: No hit is longer than this many tokens.
            agreement: What its groups agreed on.
            hit: Tokens of the hit. A KV connector may have it end earlier.
            alone: Whether what each kind alone could serve is looked up where it is not known.
        """
        asked = [agreement.start, *agreement.answers]
        by_kind: list[int | None] = []
        for kind in self._cache.kinds:
            place = kind.groups[0]
            tokens: int | None = None
            if asked[0] <= 0:
                tokens = 0
            elif (
                len(kind.groups) == 1
                and place < len(agreement.answers)
                and asked[place] == asked[0]
            ):
                # Those before it had served all: it was asked for as much as it is alone.
                tokens = agreement.answers[place]
            elif alone:
                groups = [self.attention_groups[place] for place in kind.groups]
                tokens = self.reconcile(hashes, limit, groups).length
            by_kind.append(tokens)
        reach = self._cache.reach(tuple(by_kind))
        lost = [0] * len(self.attention_groups)
        steps = list(zip(range(len(asked)), asked, agreement.answers, strict=False))
        for place, before, after in [*steps, *agreement.later]:
            # What is beyond anybody's reach is not lost.
            lost[place] += max(min(before, reach) - after, 0)
        return Found(limit, hit, tuple(lost), tuple(by_kind))
