# SPDX-License-Identifier: Apache-2.0
"""The free queue of a pool in which checkpoints pin cached blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    FreeKVCacheBlockQueue,
    KVCacheBlock,
    get_block_hash,
    get_group_id,
)

from vllm_hybrid_kv.coordinator.checkpoints import Checkpoint, Checkpoints


class CheckpointQueue(FreeKVCacheBlockQueue):
    """vLLM's free queue, in which unpinned blocks come before pinned blocks.

    vLLM takes blocks from the front. If there are too few unpinned blocks, checkpoints are evicted
    one after another until there are enough. The queue holds free blocks only, so no block of a
    running request is affected. Unpinned blocks without a hash come first.
    """

    def __init__(
        self, pool: BlockPool, checkpoints: Checkpoints, state_groups: Sequence[int]
    ) -> None:
        """Take over the free blocks of a pool's queue. No checkpoint pins any of them yet."""
        super().__init__(pool.free_block_queue.get_all_free_blocks())
        self._pool = pool
        self._checkpoints = checkpoints
        self._state_groups = state_groups
        self.unpinned: set[int] = {block.block_id for block in self.get_all_free_blocks()}
        """The free blocks that can be taken before any checkpoint is evicted."""
        # The first block of the pinned part, or the tail of the list if that part is empty.
        self._first_pinned: Any = self.fake_free_list_tail

    def is_pinned(self, block: KVCacheBlock) -> bool:
        """Whether a checkpoint pins a block, free or not."""
        key = block.block_hash
        if key is None or get_group_id(key) not in self._state_groups:
            return block.block_id in self._checkpoints.pins
        # If several blocks hold the same state, only the block that lookups return is pinned.
        return (
            self._checkpoints.pinned_at(get_block_hash(key)) is not None
            and self._pool.cached_block_hash_to_block.get_one_block(key) is block
        )

    def recheck(self, key: BlockHash) -> None:
        """Unpin the checkpoint at a prefix if it lost a state, otherwise pin its cached states."""
        checkpoint = self._checkpoints.pinned_at(key)
        if checkpoint is not None:
            states = self._pool.get_cached_block(key, self._state_groups)
            if states is None:
                self.drop(checkpoint)
            else:
                self.repin(states)

    def drop(self, checkpoint: Checkpoint) -> None:
        """Unpin a checkpoint and the blocks that only it pinned."""
        self._checkpoints.unpin(checkpoint)
        self.release(checkpoint.key, checkpoint.blocks)

    def release(self, key: BlockHash, block_ids: Iterable[int]) -> None:
        """After a checkpoint was unpinned, move its free blocks to the unpinned part.

        Attention blocks that another checkpoint pins stay in the pinned part.
        """
        blocks = [self._pool.blocks[block_id] for block_id in block_ids]
        self.unpin([block for block in blocks if not self.is_pinned(block)])
        # Look up each group alone, because a failed load may have lost the state of one group.
        for group in self._state_groups:
            self.unpin(self._pool.get_cached_block(key, [group]) or ())

    def unpin(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Move blocks to the unpinned part. Skip those that running requests hold."""
        for block in blocks:
            is_free = block.next_free_block is not None
            if is_free and block.block_id not in self.unpinned:
                self.remove(block)
                self._insert_unpinned([block])

    def repin(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Move blocks from the unpinned to the pinned part, after a checkpoint has pinned them."""
        for block in blocks:
            if block.block_id in self.unpinned:
                self.remove(block)
                self.append(block)

    def _insert_unpinned(self, blocks: list[KVCacheBlock]) -> None:
        before = self._first_pinned.prev_free_block
        for block in blocks:
            before.next_free_block, block.prev_free_block = block, before
            before = block
        before.next_free_block, self._first_pinned.prev_free_block = self._first_pinned, before
        self.num_free_blocks += len(blocks)
        self.unpinned.update(block.block_id for block in blocks)

    def popleft(self) -> KVCacheBlock:
        return self.popleft_n(1)[0]

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        while len(self.unpinned) < n and (evicted := self._checkpoints.evict()) is not None:
            self.release(evicted.key, evicted.blocks)
        takes_pinned = n > len(self.unpinned)
        blocks: list[KVCacheBlock] = super().popleft_n(n)
        self.unpinned.difference_update([block.block_id for block in blocks])
        if takes_pinned:
            self._first_pinned = self.fake_free_list_head.next_free_block
        return blocks

    def remove(self, block: KVCacheBlock) -> None:
        if block is self._first_pinned:
            self._first_pinned = block.next_free_block
        super().remove(block)
        self.unpinned.discard(block.block_id)

    def prepend_n(self, blocks: list[KVCacheBlock]) -> None:
        """Insert blocks at the front. vLLM passes only blocks without a hash."""
        super().prepend_n(blocks)
        self.unpinned.update(block.block_id for block in blocks)

    def append(self, block: KVCacheBlock) -> None:
        self.append_n([block])

    def append_n(self, blocks: list[KVCacheBlock]) -> None:
        """Append blocks with a hash, each to the pinned or the unpinned part."""
        pinned: list[KVCacheBlock] = []
        unpinned: list[KVCacheBlock] = []
        for block in blocks:
            is_pinned = self.is_pinned(block)
            (pinned if is_pinned else unpinned).append(block)
            key = block.block_hash
            if not is_pinned and key is not None and get_group_id(key) in self._state_groups:
                # vLLM may have moved this block's hash to the copy in which the request continued.
                # The checkpoint then lacks a state, so check whether it must be unpinned.
                self.recheck(get_block_hash(key))
        self._insert_unpinned(unpinned)
        super().append_n(pinned)
        if pinned and self._first_pinned is self.fake_free_list_tail:
            self._first_pinned = pinned[0]
