# SPDX-License-Identifier: Apache-2.0
"""The policy `hybrid_aware`: where to keep states, and what to give up first."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.utils.math_utils import round_down
from vllm.v1.core.kv_cache_coordinator import replay_boundaries
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    KVCacheBlock,
    get_block_hash,
    get_group_id,
    make_block_hash_with_group_id,
)
from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.kv_cache_interface import MambaSpec, get_mamba_prefill_checkpoint_position

from vllm_hybrid_kv.coordinator.checkpoints import Checkpoint, Checkpoints
from vllm_hybrid_kv.coordinator.eviction import CheckpointQueue
from vllm_hybrid_kv.coordinator.fixed_point import FixedPointCoordinator
from vllm_hybrid_kv.coordinator.seen_prefixes import SeenPrefixes

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

SEEN_LIMITS = (1 << 16, 1 << 22)
"""Bounds of the number of hashes remembered in a generation; 4 bytes each at most."""


@dataclass
class _Running:
    """What a request with blocks has come to.

    Attributes:
        request: vLLM's.
        units: Hash units that were computed.
        prompt_units: Hash units that were remembered when it began.
        latest: The checkpoint that it resumed at or made last.
        partial: Group, block, key and tokens of the checkpoints that end inside a block.
    """

    request: Request
    units: int
    prompt_units: int
    latest: Checkpoint | None
    partial: list[tuple[int, KVCacheBlock, BlockHash, int]] = field(default_factory=list)


class HybridAwareCoordinator(FixedPointCoordinator):
    """A coordinator for models with states (Mamba, Gated DeltaNet) in cache mode `align`.

    **Where states are kept.** At the end of a prompt, rounded down to the match unit: the next
    turn of a conversation resumes there. At a branch point, where a prompt leaves one that was
    seen before, as soon as the second request shows it. Nowhere else: the states at whole block
    boundaries that vLLM keeps beside them are left to be overwritten.

    **What is given up first.** Blocks are free to take once no checkpoint can be resumed at with
    them: attention beyond the last checkpoint, states of no checkpoint, copies of what another
    request has computed too. Then whole checkpoints go, those first that save the least compute
    for their memory (`Checkpoints`).

    **What is as in vLLM.** Who may take a block: only free ones are ever in the queue. What a hit
    is: `FixedPointCoordinator` looks it up in vLLM's own hash map. Copy-on-write of partial
    blocks, preemption, events and connectors are vLLM's code, unchanged.
    """

    def __init__(self, **factory_args: Any) -> None:
        """Make the coordinator.

        Args:
            **factory_args: The arguments of vLLM's factory.
        """
        super().__init__(**factory_args)
        groups = range(len(self.single_type_managers))
        self._state_groups = [
            group for group in groups if isinstance(self.single_type_managers[group], MambaManager)
        ]
        cached = {group for lookup in self.attention_groups for group in lookup.group_ids}
        self._attention_groups = [
            group for group in groups if group in cached and group not in self._state_groups
        ]
        self._state_ids = frozenset(self._state_groups)
        self._unit = self.hash_block_size
        self._alignment = self._cache_hit_alignment_tokens
        block_tokens = self.single_type_managers[self._state_groups[0]].block_size
        self.checkpoints = Checkpoints(len(self._state_groups), block_tokens)
        hashes = 2 * self.block_pool.num_gpu_blocks * block_tokens // self._unit
        self._seen = SeenPrefixes(min(max(hashes, SEEN_LIMITS[0]), SEEN_LIMITS[1]))
        self._running: dict[str, _Running] = {}
        self.block_pool.free_block_queue = CheckpointQueue(
            self.block_pool.free_block_queue, self._is_needed, self._give_up
        )

    @staticmethod
    def suits(kv_cache_config: KVCacheConfig) -> bool:
        """Whether a plan has attention, and states in cache mode `align`, all of them cached."""
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        states = [spec for spec in specs if isinstance(spec, MambaSpec)]
        return 0 < len(states) < len(specs) and all(
            spec.mamba_cache_mode == "align" for spec in states
        )

    def attach(self, kv_cache_manager: KVCacheManager) -> None:
        """Have states cached at branch points inside a block, which vLLM does for EAGLE alone.

        Args:
            kv_cache_manager: The one that made this coordinator; the scheduler asks it.
        """
        if self.enable_partial_hash_hits and self.num_reprefillable_tokens == 0:
            kv_cache_manager.mamba_shared_prefix_checkpoint = True
            for group in self._state_groups:
                self.single_type_managers[group].shared_prefix_checkpoint = True

    def _is_needed(self, block: KVCacheBlock) -> bool:
        key = block.block_hash
        if key is None or get_group_id(key) not in self._state_ids:
            return self.checkpoints.needs(block.block_id)
        # Of several requests that computed one state at a time, lookups find the first's.
        hash_map = self.block_pool.cached_block_hash_to_block
        return self.checkpoints.keeps(get_block_hash(key)) and hash_map.get_one_block(key) is block

    def _give_up(self) -> list[KVCacheBlock] | None:
        checkpoint = self.checkpoints.give_up()
        if checkpoint is None:
            return None
        blocks = self.block_pool.blocks
        released = [
            blocks[block_id]
            for block_id in checkpoint.blocks
            if not self.checkpoints.needs(block_id)
        ]
        # One by one, for another's state may be gone, after a connector's failure for one.
        for group in self._state_groups:
            released += self.block_pool.get_cached_block(checkpoint.key, [group]) or []
        return released

    def find_longest_cache_hit(
        self, block_hashes: list[BlockHash], max_cache_hit_length: int
    ) -> tuple[tuple[list[KVCacheBlock], ...], int, int]:
        """Find the longest prefix that every group can serve, and where a branch begins.

        Args:
            block_hashes: The request's, one for every hash unit of its tokens.
            max_cache_hit_length: No hit is longer than this many tokens.

        Returns:
            The blocks by group; the number of tokens; and how far behind that the prompt leaves
            those seen before, in tokens. vLLM ends a chunk there and keeps the state.
        """
        blocks, hit, _ = super().find_longest_cache_hit(block_hashes, max_cache_hit_length)
        units = self._seen.longest(block_hashes, max_cache_hit_length // self._unit)
        branch = round_down(units * self._unit, self._alignment)
        if branch <= hit or self._seen.ended(block_hashes[units - 1]):
            return blocks, hit, 0
        return blocks, hit, branch - hit

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Cache a request's blocks, and enter the checkpoints that it has come to.

        Args:
            request: The request.
            num_computed_tokens: Its tokens whose K, V and states are computed when the step is.
        """
        super().cache_blocks(request, num_computed_tokens)
        running = self._running.get(request.request_id)
        if running is None:
            running = self._begin(request)
        units = num_computed_tokens // self._unit
        if units <= running.units:
            return
        running.units = units
        # vLLM drops a block's entry at a shorter prefix for one at a longer. Attention's pages
        # still hold what it promised.
        for partial in running.partial:
            self._insert(*partial)
        tokens = units * self._unit
        if tokens in self._prompt_ends(request):
            self._enter(running, tokens, branch=False)
        elif tokens == request.shared_prefix_boundary:
            self._enter(running, tokens, branch=True)

    def _prompt_ends(self, request: Request) -> set[int]:
        """Return where the next turn can resume, and with draft layers one that asks again."""
        length = request.num_prompt_tokens
        drafts = bool(self.eagle_group_ids)
        end = get_mamba_prefill_checkpoint_position(length, self._alignment, drafts)
        boundaries = replay_boundaries(length, self.scheduler_block_size, drafts) if drafts else ()
        return {end, *boundaries}

    def _begin(self, request: Request) -> _Running:
        hashes = request.block_hashes
        limit = self._seen.longest(hashes, len(hashes))
        latest = self.checkpoints.arrive(hashes, limit)
        if 0 < limit < len(hashes):
            self._seen.pass_by(hashes[limit - 1])
        self._seen.add(hashes)
        running = _Running(request, 0, len(hashes), latest)
        self._running[request.request_id] = running
        return running

    def _enter(self, running: _Running, tokens: int, branch: bool) -> None:
        request = running.request
        if tokens // self._unit > len(request.block_hashes):
            # Where draft layers look ahead, a unit is hashed once the tokens after it are known.
            return
        key = request.block_hashes[tokens // self._unit - 1]
        if self.checkpoints.keeps(key):
            return
        if self.block_pool.get_cached_block(key, self._state_groups) is None:
            return
        needed: list[int] = []
        for group in self._attention_groups:
            manager = self.single_type_managers[group]
            table = manager.req_to_blocks[request.request_id]
            blocks = table[: -(-tokens // manager.block_size)]
            needed += [block.block_id for block in blocks if not block.is_null]
            if tokens % manager.block_size and manager.supports_fine_grained_hash_lookup:
                partial = (group, blocks[-1], key, tokens)
                self._insert(*partial)
                running.partial.append(partial)
        running.latest = self.checkpoints.add(key, tokens, branch, needed, running.latest)

    def _insert(self, group: int, block: KVCacheBlock, key: BlockHash, tokens: int) -> None:
        name = make_block_hash_with_group_id(key, group)
        self.block_pool._insert_block_hash(name, block, num_tokens=tokens)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Take a request's blocks away from it. See vLLM's."""
        self._end(request_id)
        return super().pop_blocks_for_free(request_id)

    def free(self, request_id: str) -> None:
        """Free a request's blocks. See vLLM's."""
        self._end(request_id)
        super().free(request_id)

    def _end(self, request_id: str) -> None:
        running = self._running.pop(request_id, None)
        if running is None:
            return
        self._seen.add(running.request.block_hashes, known=running.prompt_units)
        if running.latest is not None and running.latest.kept:
            self.checkpoints.use_now(running.latest)

    def reset_prefix_cache(self) -> bool:
        """Empty the cache, and forget what was learned of it. See vLLM's."""
        done: bool = super().reset_prefix_cache()
        if done:
            self.checkpoints.clear()
            self._seen.clear()
        return done

    def stats(self) -> dict[str, int]:
        """Return how many checkpoints were kept and given up, by kind."""
        return {**self.checkpoints.counts, "now": len(self.checkpoints)}
