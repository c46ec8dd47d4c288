# SPDX-License-Identifier: Apache-2.0
"""The free queue of a pool whose blocks are given up by what still needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock


class CheckpointQueue(FreeKVCacheBlockQueue):
    """vLLM's free queue with the blocks that nothing needs in front.

    The queue has two parts, one behind the other: blocks to take at any time, and blocks that a
    checkpoint needs. vLLM takes from the front. Where the first part is too short for what is
    asked, checkpoints are given up, one after the other, until it is long enough. Only free
    blocks are ever in here, so that no block of a running request is touched.
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

    def _make_room(self, wanted: int) -> None:
        while len(self._spent) < wanted:
            released = self._give_up()
            if released is None:
                # What is left is needed by nothing that could be given up; take it in order.
                return
            self._to_front(block for block in released if block.ref_cnt == 0)

    def _to_front(self, blocks: Iterable[KVCacheBlock]) -> None:
        for block in blocks:
            if block.block_id not in self._spent and block.next_free_block is not None:
                super().remove(block)
                self._insert_front([block])

    def _insert_front(self, blocks: list[KVCacheBlock]) -> None:
        super().prepend_n(blocks)
        self._spent.update(block.block_id for block in blocks)

    def popleft(self) -> KVCacheBlock:
        """Take the first block."""
        self._make_room(1)
        block = super().popleft()
        self._spent.discard(block.block_id)
        return block

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        """Take the first `n` blocks."""
        self._make_room(n)
        blocks: list[KVCacheBlock] = super().popleft_n(n)
        for block in blocks:
            self._spent.discard(block.block_id)
        return blocks

    def remove(self, block: KVCacheBlock) -> None:
        """Take a block from wherever it is: a request hit it."""
        super().remove(block)
        self._spent.discard(block.block_id)

    def prepend_n(self, blocks: list[KVCacheBlock]) -> None:
        """Put blocks without a hash in front."""
        self._insert_front(blocks)

    def append(self, block: KVCacheBlock) -> None:
        """Put a block with a hash where it belongs."""
        self.append_n([block])

    def append_n(self, blocks: list[KVCacheBlock]) -> None:
        """Put blocks with a hash where they belong: behind, or in front if nothing needs them."""
        kept: list[KVCacheBlock] = []
        spent: list[KVCacheBlock] = []
        for block in blocks:
            (kept if self._needed(block) else spent).append(block)
        super().append_n(kept)
        self._insert_front(spent)
