# SPDX-License-Identifier: Apache-2.0
"""The free queue of a pool in which checkpoints pin cached blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock


class CheckpointQueue(FreeKVCacheBlockQueue):
    """vLLM's free queue, in which unpinned blocks come before those that a checkpoint pins.

    vLLM takes blocks from the front. If there are too few unpinned blocks, checkpoints are evicted
    one after another until there are enough. The queue holds free blocks only, so no block of a
    running request is affected. Unpinned blocks without a hash come first.
    """

    def __init__(
        self,
        queue: FreeKVCacheBlockQueue,
        is_pinned: Callable[[KVCacheBlock], bool],
        on_unpinned_free: Callable[[KVCacheBlock], None],
        evict: Callable[[], Iterable[KVCacheBlock] | None],
    ) -> None:
        """Replace a pool's queue, whose blocks are all unpinned.

        Args:
            queue: The queue to replace. It must not be used afterwards.
            is_pinned: Whether a checkpoint pins a block.
            on_unpinned_free: Is called with each unpinned block with a hash, before it is appended.
            evict: Evicts a checkpoint and returns the blocks that only it pinned, free or not, or
                None if there is no checkpoint left.
        """
        super().__init__(queue.get_all_free_blocks())
        self._is_pinned = is_pinned
        self._on_unpinned_free = on_unpinned_free
        self._evict = evict
        self._unpinned: set[int] = {block.block_id for block in self.get_all_free_blocks()}
        # The first block of the pinned part, or the tail of the list.
        self._first_pinned: KVCacheBlock = self.fake_free_list_tail

    @property
    def num_unpinned(self) -> int:
        """How many blocks can be taken before any checkpoint is evicted."""
        return len(self._unpinned)

    def unpin(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Move those of the given blocks that are free to the unpinned part."""
        for block in blocks:
            is_free = block.next_free_block is not None
            if is_free and block.block_id not in self._unpinned:
                self.remove(block)
                self._insert_unpinned([block])

    def repin(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Move those of the given blocks that are free to the part that they belong to now."""
        for block in blocks:
            if block.block_id in self._unpinned:
                self.remove(block)
                self.append(block)

    def _make_room(self, wanted: int) -> None:
        while len(self._unpinned) < wanted:
            released = self._evict()
            if released is None:
                # No checkpoint is left: the pinned part is taken in its order.
                return
            self.unpin(released)

    def _insert_unpinned(self, blocks: list[KVCacheBlock]) -> None:
        """Append blocks to the unpinned part."""
        before = self._first_pinned.prev_free_block
        assert before is not None
        for block in blocks:
            before.next_free_block, block.prev_free_block = block, before
            before = block
        before.next_free_block, self._first_pinned.prev_free_block = self._first_pinned, before
        self.num_free_blocks += len(blocks)
        self._unpinned.update(block.block_id for block in blocks)

    def popleft(self) -> KVCacheBlock:
        return self.popleft_n(1)[0]

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        self._make_room(n)
        takes_pinned = n > len(self._unpinned)
        blocks: list[KVCacheBlock] = super().popleft_n(n)
        self._unpinned.difference_update([block.block_id for block in blocks])
        if takes_pinned:
            first = self.fake_free_list_head.next_free_block
            assert first is not None
            self._first_pinned = first
        return blocks

    def remove(self, block: KVCacheBlock) -> None:
        if block is self._first_pinned:
            following = block.next_free_block
            assert following is not None
            self._first_pinned = following
        super().remove(block)
        self._unpinned.discard(block.block_id)

    def prepend_n(self, blocks: list[KVCacheBlock]) -> None:
        """Insert blocks without a hash at the front."""
        super().prepend_n(blocks)
        self._unpinned.update(block.block_id for block in blocks)

    def append(self, block: KVCacheBlock) -> None:
        self.append_n([block])

    def append_n(self, blocks: list[KVCacheBlock]) -> None:
        """Append blocks with a hash, each to the part that it belongs to."""
        pinned: list[KVCacheBlock] = []
        unpinned: list[KVCacheBlock] = []
        for block in blocks:
            if self._is_pinned(block):
                pinned.append(block)
            else:
                self._on_unpinned_free(block)
                unpinned.append(block)
        if unpinned:
            self._insert_unpinned(unpinned)
        if pinned:
            super().append_n(pinned)
            if self._first_pinned is self.fake_free_list_tail:
                self._first_pinned = pinned[0]
