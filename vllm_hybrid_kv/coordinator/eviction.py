# SPDX-License-Identifier: Apache-2.0
"""The free queue of a pool whose blocks are given up by what still needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock


class CheckpointQueue(FreeKVCacheBlockQueue):
    """vLLM's free queue with the blocks that nothing needs before those that a checkpoint needs.

    The queue has two parts, one behind the other: blocks to take at any time, those without a
    hash first, and blocks that a checkpoint needs. vLLM takes from the front. Where the first part
    is too short for what is asked, checkpoints are given up, one after the other, until it is
    long enough. Only free blocks are ever in here, so that no block of a running request is
    touched.
    """

    def __init__(
        self,
        queue: FreeKVCacheBlockQueue,
        needed: Callable[[KVCacheBlock], bool],
        give_up: Callable[[], Iterable[KVCacheBlock] | None],
    ) -> None:
        """Take over a queue.

        Args:
            queue: A pool's, not to be used any more.
            needed: Whether a checkpoint needs a block that has a hash.
            give_up: Gives up a checkpoint and returns the blocks that only it needed, free or
                not; None where there is no checkpoint left.
        """
        super().__init__(queue.get_all_free_blocks())
        self._needed = needed
        self._give_up = give_up
        self._spent: set[int] = {block.block_id for block in self.get_all_free_blocks()}
        # The first block of the second part; behind both is the list's own end.
        self._first_needed: KVCacheBlock = self.fake_free_list_tail

    @property
    def num_spent(self) -> int:
        """How many blocks can be taken before any checkpoint is given up."""
        return len(self._spent)

    def release(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Have blocks that no checkpoint needs any more taken before those that one does."""
        for block in blocks:
            is_free = block.next_free_block is not None
            if is_free and block.block_id not in self._spent:
                self.remove(block)
                self._insert_spent([block])

    def retain(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Have free blocks that a checkpoint needs from now on taken after all others."""
        for block in blocks:
            if block.block_id in self._spent:
                self.remove(block)
                self.append(block)

    def _make_room(self, wanted: int) -> None:
        while len(self._spent) < wanted:
            released = self._give_up()
            if released is None:
                # Nothing is left that could be given up: the second part is taken in its order.
                return
            self.release(released)

    def _insert_spent(self, blocks: list[KVCacheBlock]) -> None:
        """Put blocks at the end of the first part, to be taken after those that are there."""
        before = self._first_needed.prev_free_block
        assert before is not None
        for block in blocks:
            before.next_free_block, block.prev_free_block = block, before
            before = block
        before.next_free_block, self._first_needed.prev_free_block = self._first_needed, before
        self.num_free_blocks += len(blocks)
        self._spent.update(block.block_id for block in blocks)

    def popleft(self) -> KVCacheBlock:
        """Take the first block."""
        return self.popleft_n(1)[0]

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        """Take the first `n` blocks."""
        self._make_room(n)
        past_the_first_part = n > len(self._spent)
        blocks: list[KVCacheBlock] = super().popleft_n(n)
        self._spent.difference_update([block.block_id for block in blocks])
        if past_the_first_part:
            first = self.fake_free_list_head.next_free_block
            assert first is not None
            self._first_needed = first
        return blocks

    def remove(self, block: KVCacheBlock) -> None:
        """Take a block from wherever it is: a request hit it."""
        if block is self._first_needed:
            behind = block.next_free_block
            assert behind is not None
            self._first_needed = behind
        super().remove(block)
        self._spent.discard(block.block_id)

    def prepend_n(self, blocks: list[KVCacheBlock]) -> None:
        """Put blocks without a hash in front."""
        super().prepend_n(blocks)
        self._spent.update(block.block_id for block in blocks)

    def append(self, block: KVCacheBlock) -> None:
        """Put a block with a hash where it belongs."""
        self.append_n([block])

    def append_n(self, blocks: list[KVCacheBlock]) -> None:
        """Put blocks with a hash where they belong: at the end of one part or of the other."""
        needed: list[KVCacheBlock] = []
        spent: list[KVCacheBlock] = []
        for block in blocks:
            (needed if self._needed(block) else spent).append(block)
        if spent:
            self._insert_spent(spent)
        if needed:
            super().append_n(needed)
            if self._first_needed is self.fake_free_list_tail:
                self._first_needed = needed[0]
