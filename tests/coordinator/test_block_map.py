# SPDX-License-Identifier: Apache-2.0
"""Compare `GroupedBlockMap` with vLLM's map from hashes to blocks, which it replaces."""

import random

import pytest
from vllm.v1.core.block_pool import BlockHashToBlockMap, BlockPool
from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

from vllm_hybrid_kv.coordinator.block_map import GroupedBlockMap, install_grouped_map

HASHES = [bytes([number]) * 32 for number in range(6)]
KEYS = [make_block_hash_with_group_id(one, group) for one in HASHES for group in (0, 1, 258)]


def pool_of(num_blocks=12):
    return BlockPool(num_blocks, enable_caching=True, hash_block_size=16)


@pytest.mark.parametrize("seed", range(20))
def test_lookups_agree_with_vllms_map_after_random_changes(seed):
    rng = random.Random(seed)
    blocks = pool_of().blocks[1:]
    stock, ours = BlockHashToBlockMap(), GroupedBlockMap()
    for _ in range(500):
        key, block = rng.choice(KEYS), rng.choice(blocks)
        if rng.random() < 0.5:
            stock.insert(key, block)
            ours.insert(key, block)
        else:
            assert ours.pop(key, block.block_id) is stock.pop(key, block.block_id)
        for key in KEYS:
            assert ours.get_one_block(key) is stock.get_one_block(key)
            assert all(
                ours.contain(key, block.block_id) == stock.contain(key, block.block_id)
                for block in blocks
            )
        assert len(ours) == len([key for key in KEYS if stock.get_one_block(key)])


def test_installing_the_map_keeps_the_contents_of_the_pools_map():
    pool = pool_of()
    first, second, third = pool.blocks[1:4]
    for key, block in ((KEYS[0], first), (KEYS[0], second), (KEYS[4], third)):
        pool._insert_block_hash(key, block, num_tokens=16)
    install_grouped_map(pool)
    grouped = pool.cached_block_hash_to_block
    install_grouped_map(pool)
    assert pool.cached_block_hash_to_block is grouped
    assert pool.get_cached_block(HASHES[0], [0]) == [first]
    assert grouped.contain(KEYS[0], second.block_id)
    assert grouped.get_one_block(KEYS[4]) is third
