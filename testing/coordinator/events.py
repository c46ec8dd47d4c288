# SPDX-License-Identifier: Apache-2.0
"""Replay KV events, as a router does, and check that they are consistent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import chain

from vllm.distributed.kv_events import (
    MEDIUM_CPU,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVCacheEvent,
)
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    ExternalBlockHash,
    get_block_hash,
    get_group_id,
    hash_block_tokens,
    maybe_convert_block_hash,
)

from testing.coordinator.contents import hashes_of


class EventReplay:
    """The cached hashes of an engine, known only from its KV events.

    Attributes:
        copies: How many blocks are cached, by group and hash.
    """

    def __init__(self, unit: int) -> None:
        """Start with an empty cache. `unit` is the number of tokens per hash."""
        self.copies: Counter[tuple[int | None, ExternalBlockHash]] = Counter()
        self._unit = unit
        self._hashes: dict[ExternalBlockHash | None, BlockHash | None] = {None: None}

    def learn(self, hashes: Iterable[BlockHash]) -> None:
        """Learn hashes of requests, because events may have only 64 bits of each hash."""
        self._hashes.update({maybe_convert_block_hash(one): one for one in hashes})

    def apply(self, events: Iterable[KVCacheEvent], well_formed: bool = True) -> None:
        """Apply events in order. Check the tokens of stored blocks unless `well_formed` is False.

        Raises:
            AssertionError: A hash is not that of the event's tokens, or a block that is not cached
                was removed.
        """
        for event in events:
            if isinstance(event, AllBlocksCleared):
                self.copies.clear()
                continue
            assert isinstance(event, BlockStored | BlockRemoved)
            if event.medium == MEDIUM_CPU:
                # vLLM's events of host memory have no tokens, and are not about this cache.
                continue
            keys = [(event.group_idx, one) for one in event.block_hashes]
            if isinstance(event, BlockStored):
                if well_formed:
                    assert event.block_hashes == self._hashes_of(event), event
                self.copies.update(keys)
            else:
                self.copies.subtract(keys)
                assert all(self.copies[key] >= 0 for key in keys), event

    def _hashes_of(self, event: BlockStored) -> list[ExternalBlockHash]:
        """Compute the hash of every block of an event from its parent and its tokens."""
        prefix = self._hashes[event.parent_block_hash]
        hashes: list[ExternalBlockHash] = []
        for end in range(self._unit, len(event.token_ids) + 1, self._unit):
            prefix = hash_block_tokens(sha256, prefix, event.token_ids[end - self._unit : end])
            if end % event.block_size == 0:
                hashes.append(maybe_convert_block_hash(prefix))
        return hashes


def cached_copies(pool: BlockPool) -> Counter[tuple[int | None, ExternalBlockHash]]:
    """Count the blocks of a pool that are cached under each hash, by group and hash."""
    keys = chain.from_iterable(set(hashes_of(pool, block)) for block in pool.blocks)
    return Counter(
        (get_group_id(key), maybe_convert_block_hash(get_block_hash(key))) for key in keys
    )
