# SPDX-License-Identifier: Apache-2.0
"""Lookups in which vLLM's coordinator fails, and the contract with vLLM."""

from dataclasses import replace

import pytest
from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator
from vllm.v1.core.single_type_kv_cache_manager import (
    HiSparseSourceManager,
)
from vllm.v1.kv_cache_interface import KVCacheGroupRole

from testing.coordinator.contents import (
    NUM_BLOCKS,
    chunked,
    coordinator_of,
    every,
    fill,
    fill_at,
    full,
    layout_of,
    mamba,
    request_of,
    ring,
    window,
)
from testing.coordinator.oracle import Cached
from vllm_hybrid_kv.coordinator.longest_hit import FixedPointCoordinator

WRONG_IN_VLLM = pytest.mark.xfail(strict=True, raises=AssertionError, reason="vLLM's own")
BOTH = [
    FixedPointCoordinator,
    pytest.param(HybridKVCacheCoordinator, marks=WRONG_IN_VLLM),
]
UNIT = 16


def look_up(coordinator_class, layout, num_tokens, *boundaries):
    """Look up a request, for whose groups the blocks that end at `boundaries` are cached."""
    request = request_of(layout, range(num_tokens))
    coordinator = coordinator_of(layout, coordinator_class)
    fill_at(coordinator.block_pool, request, *boundaries)
    hits, length, uncached = coordinator.find_longest_cache_hit(
        request.block_hashes, num_tokens - 1
    )
    ids = [[block.block_id for block in blocks] for blocks in hits]
    return ids, length, uncached


@pytest.mark.parametrize("coordinator_class", BOTH)
def test_drafts_of_a_window_need_their_lookahead_after_another_window_shortens_the_hit(
    coordinator_class,
):
    layout = layout_of(full(16), window(16, 17), window(16, 33), drafts=(1, 2))
    # The first window has blocks for 96 tokens with lookahead, and for 48 without it.
    first = (48, 96, 112)
    second = (16, 32, 48, 64)
    _, length, _ = look_up(coordinator_class, layout, 130, every(16, 128), first, second)
    assert length == 0


@pytest.mark.parametrize("coordinator_class", BOTH)
def test_drafts_need_their_lookahead_after_a_state_shortens_the_hit(coordinator_class):
    # No group is marked, so vLLM treats all as having drafts, even states.
    layout = layout_of(full(16), window(16, 17), mamba(16), drafts=())
    _, length, _ = look_up(coordinator_class, layout, 130, every(16, 128), (48, 96, 112), (48,))
    assert length == 0


@pytest.mark.parametrize("coordinator_class", BOTH)
def test_a_chunk_that_starts_inside_a_block_needs_that_block(coordinator_class):
    layout = layout_of(full(16), chunked(16, 24))
    # After 32 tokens the chunk starts at 24. vLLM finds none of its blocks and falls back to 16
    # tokens without checking the blocks of the chunk before.
    _, length, _ = look_up(coordinator_class, layout, 40, every(16, 32), ())
    assert length == 0


@pytest.mark.parametrize("coordinator_class", BOTH)
def test_drafts_with_a_window_longer_than_the_prefix_cost_one_unit_only(coordinator_class):
    layout = layout_of(full(64), window(16, 1024), drafts=(1,))
    _, length, _ = look_up(coordinator_class, layout, 100, (64,), every(16, 96))
    assert length == 64


@pytest.mark.parametrize("coordinator_class", BOTH)
def test_a_whole_block_serves_a_prefix_that_ends_inside_it(coordinator_class):
    layout = layout_of(full(64), mamba(64), unit=UNIT)
    ids, length, _ = look_up(coordinator_class, layout, 128, (64, 128), (112,))
    assert (length, ids) == (112, [[100, 101], [0, 200]])


@pytest.mark.parametrize("coordinator_class", BOTH)
def test_groups_of_equal_specs_may_hold_different_parts_of_their_last_block(coordinator_class):
    layout = layout_of(full(64), full(64), mamba(64), unit=UNIT)
    ids, length, _ = look_up(coordinator_class, layout, 128, (64, 96), (64, 112), (96, 112))
    assert (length, ids) == (96, [[100, 101], [200, 201], [0, 300]])


@pytest.mark.parametrize("coordinator_class", BOTH)
def test_chunked_local_attention_works_with_larger_blocks_of_other_groups(coordinator_class):
    layout = layout_of(full(64), chunked(16, 32))
    _, length, _ = look_up(coordinator_class, layout, 100, (64,), ())
    assert length == 64


@pytest.mark.parametrize("coordinator_class", BOTH)
def test_chunked_local_attention_works_with_drafts(coordinator_class):
    layout = layout_of(full(16), chunked(16, 64), drafts=())
    _, length, _ = look_up(coordinator_class, layout, 60, every(16, 48), every(16, 48))
    assert length == 32


def test_models_without_full_attention_hit_where_all_states_are_cached():
    layout = layout_of(mamba(32), mamba(64, width=6), window(32, 64))
    ids, length, _ = look_up(
        FixedPointCoordinator, layout, 400, (128, 192, 320), (64, 192, 256), every(32, 384)
    )
    assert length == 192
    assert ids == [[0, 0, 0, 0, 0, 101], [0, 0, 201], [0, 0, 0, 0, 304, 305]]


def test_context_parallel_ranks_lengthen_full_attention_blocks_but_not_state_blocks():
    layout = layout_of(full(16), mamba(32), dcp=2)
    ids, length, _ = look_up(FixedPointCoordinator, layout, 100, every(32, 96), (32, 64))
    assert (length, ids) == (64, [[100, 101], [0, 201]])


def test_the_longer_prefix_of_full_attention_is_returned():
    layout = layout_of(full(16), mamba(16))
    _, length, uncached = look_up(FixedPointCoordinator, layout, 130, every(16, 96), (32,))
    assert (length, uncached) == (32, 64)


def test_groups_that_opt_out_of_prefix_caching_get_no_blocks():
    layout = layout_of(full(16), ring(16), mamba(16))
    ids, length, _ = look_up(FixedPointCoordinator, layout, 60, (16, 32), (), (32,))
    assert (length, ids) == (32, [[100, 101], [], [0, 300]])


def test_full_attention_ends_at_an_evicted_block():
    layout = layout_of(full(16), mamba(16))
    _, length, _ = look_up(
        FixedPointCoordinator, layout, 200, (*every(16, 64), *range(96, 193, 16)), every(16, 192)
    )
    assert length == 64


def test_after_a_reset_only_new_blocks_are_hit():
    layout = layout_of(full(16), mamba(16))
    request = request_of(layout, list(range(50)))
    cached = Cached(48, {(0, 16): [5], (1, 16): [6]})
    coordinator = coordinator_of(layout, FixedPointCoordinator)
    for _ in range(2):
        fill(coordinator.block_pool, request, cached)
        assert coordinator.find_longest_cache_hit(request.block_hashes, 49)[1] == 16
        assert coordinator.reset_prefix_cache()
        assert coordinator.find_longest_cache_hit(request.block_hashes, 49)[1] == 0


def test_a_group_with_a_host_pool_keeps_its_longer_hit():
    layout = layout_of(full(16), window(16, 16))
    host = replace(layout.groups[0], role=KVCacheGroupRole.HISPARSE_SOURCE, host_resident=True)
    layout = replace(layout, groups=(host, layout.groups[1]))
    coordinator = coordinator_of(layout, FixedPointCoordinator)
    source = coordinator.single_type_managers[0]
    assert isinstance(source, HiSparseSourceManager)
    source.bind_host_pool(NUM_BLOCKS)
    request = request_of(layout, list(range(100)))
    on_host = Cached(96, {(0, end): [end] for end in every(16, 80)})
    on_device = Cached(96, {(1, end): [end] for end in (16, 32)})
    for pool, cached in ((source.block_pool, on_host), (coordinator.block_pool, on_device)):
        fill(pool, request, cached)
    hits, length, _ = coordinator.find_longest_cache_hit(request.block_hashes, 99)
    assert length == 32
    assert [block.block_id for block in hits[0]] == [16, 32, 48, 64, 80]
    assert [block.block_id for block in hits[1]] == [0, 32]


def test_a_state_must_be_cached_in_all_groups_of_equal_specs():
    layout = layout_of(full(16), mamba(16), mamba(16))
    _, length, _ = look_up(FixedPointCoordinator, layout, 65, every(16, 64), (32, 64), (32,))
    assert length == 32
