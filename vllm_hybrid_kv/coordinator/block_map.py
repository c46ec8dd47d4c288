# SPDX-License-Identifier: Apache-2.0
"""A pool's map from hashes to cached blocks, kept per KV group.

vLLM keys its map by a hash with the group's number behind it, so that every lookup makes a new key
and hashes it, and the few states of a Mamba group lie among the many blocks of all others. Here
every group has a dictionary of its own, keyed by the request's hashes themselves: Python keeps
their hash values, and one call of `map` looks up thousands.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping

from vllm.v1.core.block_pool import BlockHashToBlockMap, BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, BlockHashWithGroupId, KVCacheBlock

_GROUP_ID_BYTES = 4
"""Bytes of the group's number behind the hash (`make_block_hash_with_group_id`)."""


class GroupedBlockMap(BlockHashToBlockMap):
    """vLLM's map with the same answers, and a dictionary for each group.

    Where several blocks hold the same tokens, the one that was cached first answers, as in vLLM.
    """

    def __init__(self) -> None:
        self._groups: dict[bytes, dict[BlockHash, KVCacheBlock]] = {}
        self._by_id: dict[int, dict[BlockHash, KVCacheBlock]] = {}
        # Only of hashes with more than one block, by block id and in the order of insertion.
        self._copies: dict[BlockHashWithGroupId, dict[int, KVCacheBlock]] = {}

    @property
    def _cache(self) -> _AsOneDictionary:
        """What vLLM calls its dictionary, for code that reaches into it (vLLM's tests do)."""
        return _AsOneDictionary(self)

    def group(self, group_id: int) -> dict[BlockHash, KVCacheBlock]:
        """Return the first cached block of every hash in one group. Not to be changed."""
        group = self._by_id.get(group_id)
        if group is None:
            group = self._groups.setdefault(group_id.to_bytes(_GROUP_ID_BYTES, "big"), {})
            self._by_id[group_id] = group
        return group

    def get_one_block(self, key: BlockHashWithGroupId) -> KVCacheBlock | None:
        """Return the block that was cached first under a hash."""
        group = self._groups.get(key[-_GROUP_ID_BYTES:])
        return None if group is None else group.get(BlockHash(key[:-_GROUP_ID_BYTES]))

    def contain(self, key: BlockHashWithGroupId, block_id: int) -> bool:
        """Return whether a hash maps to this block, among others perhaps."""
        copies = self._copies.get(key)
        if copies is not None:
            return block_id in copies
        block = self.get_one_block(key)
        return block is not None and block.block_id == block_id

    def insert(self, key: BlockHashWithGroupId, block: KVCacheBlock) -> None:
        """Cache a block under a hash, beside those that are there."""
        suffix = key[-_GROUP_ID_BYTES:]
        group = self._groups.get(suffix)
        if group is None:
            group = self._groups[suffix] = {}
        first = group.setdefault(BlockHash(key[:-_GROUP_ID_BYTES]), block)
        if first is not block:
            copies = self._copies.setdefault(key, {first.block_id: first})
            copies[block.block_id] = block

    def pop(self, key: BlockHashWithGroupId, block_id: int) -> KVCacheBlock | None:
        """Take one block out; None where the hash does not map to it."""
        group = self._groups.get(key[-_GROUP_ID_BYTES:])
        block_hash = BlockHash(key[:-_GROUP_ID_BYTES])
        first = None if group is None else group.get(block_hash)
        if group is None or first is None:
            return None
        copies = self._copies.get(key)
        if copies is None:
            if first.block_id != block_id:
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


class _AsOneDictionary(
    MutableMapping[BlockHashWithGroupId, KVCacheBlock | dict[int, KVCacheBlock]]
):
    """The shape of vLLM's own dictionary: a block, or a dictionary of several, by key."""

    def __init__(self, blocks: GroupedBlockMap) -> None:
        self._blocks = blocks

    def __getitem__(self, key: BlockHashWithGroupId) -> KVCacheBlock | dict[int, KVCacheBlock]:
        found = self._blocks._copies.get(key) or self._blocks.get_one_block(key)
        if found is None:
            raise KeyError(key)
        return found

    def __setitem__(
        self, key: BlockHashWithGroupId, value: KVCacheBlock | dict[int, KVCacheBlock]
    ) -> None:
        self.pop(key, None)
        for block in value.values() if isinstance(value, dict) else (value,):
            self._blocks.insert(key, block)

    def __delitem__(self, key: BlockHashWithGroupId) -> None:
        found = self[key]
        for block_id in list(found) if isinstance(found, dict) else [found.block_id]:
            self._blocks.pop(key, block_id)

    def __iter__(self) -> Iterator[BlockHashWithGroupId]:
        for suffix, group in self._blocks._groups.items():
            for block_hash in group:
                yield BlockHashWithGroupId(block_hash + suffix)

    def __len__(self) -> int:
        return len(self._blocks)

    def __copy__(self) -> dict[BlockHashWithGroupId, KVCacheBlock | dict[int, KVCacheBlock]]:
        return dict(self)


def grouped_blocks(pool: BlockPool) -> GroupedBlockMap:
    """Return a pool's map, after putting a grouped one in the place of vLLM's.

    vLLM starts a new map when the prefix cache is reset, so this is asked before every lookup.
    """
    blocks = pool.cached_block_hash_to_block
    if isinstance(blocks, GroupedBlockMap):
        return blocks
    grouped = GroupedBlockMap()
    for key, value in blocks._cache.items():
        grouped._cache[key] = value
    pool.cached_block_hash_to_block = grouped
    return grouped
