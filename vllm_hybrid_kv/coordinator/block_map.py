# SPDX-License-Identifier: Apache-2.0
"""A block pool's map from hashes to cached blocks, with one dictionary per KV group.

vLLM keys its map by the hash followed by the group id. Every lookup then builds and hashes a new
key, and the few states of a Mamba group are mixed with the blocks of all other groups. Here each
group has its own dictionary, keyed by a request's block hashes without a group id. Python caches
the hash value of each such key, and one call of `map` looks up thousands of keys.
"""

from __future__ import annotations

from collections import UserDict, defaultdict

from vllm.v1.core.block_pool import BlockHashToBlockMap, BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, BlockHashWithGroupId, KVCacheBlock

_GROUP_ID_BYTES = 4
"""Bytes of the group id that vLLM's `make_block_hash_with_group_id` appends to a hash."""


class GroupedBlockMap(BlockHashToBlockMap):
    """A map with the same results as vLLM's, and one dictionary for each group.

    As in vLLM, if several blocks hold the same tokens, lookups return the block that was cached
    first.
    """

    def __init__(self) -> None:
        self._groups: defaultdict[bytes, dict[BlockHash, KVCacheBlock]] = defaultdict(dict)
        # Each key that several blocks share, with these blocks by id in the order of insertion.
        self._copies: dict[BlockHashWithGroupId, dict[int, KVCacheBlock]] = {}

    @property
    def _cache(self) -> _FlatView:
        """The map as one dictionary, named as in vLLM, because vLLM's tests access that name."""
        return _FlatView(self)

    def group(self, group_id: int) -> dict[BlockHash, KVCacheBlock]:
        """Return one group's dictionary from hash to block. Callers must not change it."""
        return self._groups[group_id.to_bytes(_GROUP_ID_BYTES, "big")]

    def get_one_block(self, key: BlockHashWithGroupId) -> KVCacheBlock | None:
        return self._groups[key[-_GROUP_ID_BYTES:]].get(BlockHash(key[:-_GROUP_ID_BYTES]))

    def contain(self, key: BlockHashWithGroupId, block_id: int) -> bool:
        copies = self._copies.get(key)
        if copies is not None:
            return block_id in copies
        block = self.get_one_block(key)
        return block is not None and block.block_id == block_id

    def insert(self, key: BlockHashWithGroupId, block: KVCacheBlock) -> None:
        group = self._groups[key[-_GROUP_ID_BYTES:]]
        first = group.setdefault(BlockHash(key[:-_GROUP_ID_BYTES]), block)
        if first is not block:
            copies = self._copies.setdefault(key, {first.block_id: first})
            copies[block.block_id] = block

    def pop(self, key: BlockHashWithGroupId, block_id: int) -> KVCacheBlock | None:
        group = self._groups[key[-_GROUP_ID_BYTES:]]
        block_hash = BlockHash(key[:-_GROUP_ID_BYTES])
        first = group.get(block_hash)
        copies = self._copies.get(key)
        if copies is None:
            if first is None or first.block_id != block_id:
                return None
            return group.pop(block_hash)
        block = copies.pop(block_id, None)
        if block is first:
            group[block_hash] = next(iter(copies.values()))
        if len(copies) == 1:
            del self._copies[key]
        return block

    def __len__(self) -> int:
        return sum(map(len, self._groups.values()))


class _FlatView(UserDict[BlockHashWithGroupId, "KVCacheBlock | dict[int, KVCacheBlock]"]):
    """A copy of the map as one dictionary like vLLM's. Writes to the copy also change the map.

    The value of a key is its block or, if it has several, a dictionary of blocks by id.
    """

    def __init__(self, blocks: GroupedBlockMap) -> None:
        self._blocks = blocks
        self.data = {
            BlockHashWithGroupId(block_hash + suffix): block
            for suffix, group in blocks._groups.items()
            for block_hash, block in group.items()
        }
        self.data.update(blocks._copies)

    def __setitem__(
        self, key: BlockHashWithGroupId, value: KVCacheBlock | dict[int, KVCacheBlock]
    ) -> None:
        self.pop(key, None)
        self.data[key] = value
        for block in value.values() if isinstance(value, dict) else (value,):
            self._blocks.insert(key, block)

    def __delitem__(self, key: BlockHashWithGroupId) -> None:
        entry = self.data.pop(key)
        for block_id in list(entry) if isinstance(entry, dict) else [entry.block_id]:
            self._blocks.pop(key, block_id)


def install_grouped_map(pool: BlockPool) -> None:
    """Replace a pool's map by an equal `GroupedBlockMap`, unless the pool already has one."""
    blocks = pool.cached_block_hash_to_block
    if not isinstance(blocks, GroupedBlockMap):
        grouped = pool.cached_block_hash_to_block = GroupedBlockMap()
        grouped._cache.update(blocks._cache)
