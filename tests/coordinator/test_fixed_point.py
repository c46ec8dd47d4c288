# SPDX-License-Identifier: Apache-2.0
"""Test `FixedPointCoordinator` in cases where vLLM's lookup fails, and against brute force."""

import os
from dataclasses import replace

import pytest
from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator
from vllm.v1.core.single_type_kv_cache_manager import HiSparseSourceManager
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
    random_cases,
    request_of,
    window,
)
from testing.coordinator.oracle import Cached, longest, wrong_blocks
from vllm_hybrid_kv.coordinator.longest_hit import FixedPointCoordinator

WRONG_IN_VLLM = pytest.mark.xfail(strict=True, raises=AssertionError, reason="vLLM's own")
BOTH = [FixedPointCoordinator, pytest.param(HybridKVCacheCoordinator, marks=WRONG_IN_VLLM)]
UNIT = 16


def look_up(coordinator_class, layout, num_tokens, *boundaries):
    """Look up a request. For each group, `boundaries` has the tokens where cached blocks end."""
    request = request_of(layout, range(num_tokens))
    coordinator = coordinator_of(layout, coordinator_class)
    fill_at(coordinator.block_pool, request, *boundaries)
    hits, length, uncached = coordinator.find_longest_cache_hit(
        request.block_hashes, num_tokens - 1
    )
    ids = [[block.block_id for block in blocks] for blocks in hits]
    return ids, length, uncached


@pytest.mark.parametrize("coordinator_class", BOTH)
@pytest.mark.parametrize(
    ("layout", "num_tokens", "boundaries", "hit"),
    [
        pytest.param(
            # The first window has the block for the lookahead at 96 tokens, but not at 48.
            layout_of(full(16), window(16, 17), window(16, 33), drafts=(1, 2)),
            *(130, [every(16, 128), (48, 96, 112), (16, 32, 48, 64)], 0),
            id="drafts of a window need their lookahead after another window shortens the hit",
        ),
        pytest.param(
            # No group is marked as a draft group, so vLLM treats all as draft groups, even states.
            layout_of(full(16), window(16, 17), mamba(16), drafts=()),
            *(130, [every(16, 128), (48, 96, 112), (48,)], 0),
            id="drafts need their lookahead after a state shortens the hit",
        ),
        pytest.param(
            # After 32 tokens, the chunk starts at 24. vLLM finds none of this chunk's blocks. It
            # falls back to 16 tokens without checking the blocks of the previous chunk.
            layout_of(full(16), chunked(16, 24)),
            *(40, [every(16, 32), ()], 0),
            id="a chunk that starts inside a block needs that block",
        ),
        pytest.param(
            layout_of(full(64), window(16, 1024), drafts=(1,)),
            *(100, [(64,), every(16, 96)], 64),
            id="drafts with a window longer than the prefix cost one unit only",
        ),
        pytest.param(
            layout_of(full(64), chunked(16, 32)),
            *(100, [(64,), ()], 64),
            id="chunked local attention works with larger blocks of other groups",
        ),
        pytest.param(
            layout_of(full(16), chunked(16, 64), drafts=()),
            *(60, [every(16, 48), every(16, 48)], 32),
            id="chunked local attention works with drafts",
        ),
    ],
)
def test_the_hit_is_right_where_vllms_own_is_wrong(
    coordinator_class, layout, num_tokens, boundaries, hit
):
    assert look_up(coordinator_class, layout, num_tokens, *boundaries)[1] == hit


@pytest.mark.parametrize("coordinator_class", BOTH)
@pytest.mark.parametrize(
    ("layout", "boundaries", "hit", "expected"),
    [
        pytest.param(
            layout_of(full(64), mamba(64), unit=UNIT),
            *([(64, 128), (112,)], 112, [[100, 101], [0, 200]]),
            id="a whole block serves a prefix that ends inside it",
        ),
        pytest.param(
            layout_of(full(64), full(64), mamba(64), unit=UNIT),
            *([(64, 96), (64, 112), (96, 112)], 96, [[100, 101], [200, 201], [0, 300]]),
            id="groups of equal specs may hold different parts of their last block",
        ),
    ],
)
def test_the_blocks_of_a_partial_hit_are_right_where_vllms_own_are_wrong(
    coordinator_class, layout, boundaries, hit, expected
):
    ids, length, _ = look_up(coordinator_class, layout, 128, *boundaries)
    assert (length, ids) == (hit, expected)


def test_the_longer_prefix_of_full_attention_is_returned():
    layout = layout_of(full(16), mamba(16))
    _, length, uncached = look_up(FixedPointCoordinator, layout, 130, every(16, 96), (32,))
    assert (length, uncached) == (32, 64)


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


SEED = int(os.environ.get("HYBRID_KV_TEST_SEED", "20261122"))
PARTS = 10
LAYOUTS, CONTENTS = 50, 20
"""Each of 10 parts has 50 layouts, and each layout has 20 cache contents: 10,000 cases."""


def cases_of(part):
    """Yield each case with a coordinator whose cache has the contents of the case."""
    for cases in random_cases(SEED + part, LAYOUTS, CONTENTS):
        coordinator = coordinator_of(cases[0].layout, FixedPointCoordinator)
        other = request_of(cases[0].layout, range(5000, 5024))
        for case in cases:
            assert coordinator.reset_prefix_cache()
            fill(coordinator.block_pool, case.request, case.cached, other)
            yield coordinator, case


def ids(blocks):
    return [block.block_id for block in blocks]


@pytest.mark.parametrize("part", range(PARTS))
def test_the_hit_is_the_longest_prefix_that_every_group_can_serve(part):
    compared = hits = 0
    for coordinator, case in cases_of(part):
        alignment = coordinator._cache_hit_alignment_tokens
        every = range(len(case.layout.groups))
        want = longest(case.layout, case.cached, alignment, case.limit, every)
        blocks, length, uncached = coordinator.find_longest_cache_hit(
            case.request.block_hashes, case.limit
        )
        assert length == want, f"{case.what}: {case.layout}"
        assert uncached >= 0
        for group_id in every:
            problem = wrong_blocks(
                case.layout, case.cached, group_id, length, ids(blocks[group_id])
            )
            assert problem is None, f"{case.what}: {problem}"
        compared += 1
        hits += length > 0
    assert compared == LAYOUTS * CONTENTS
    # A comparison without hits would prove nothing.
    assert hits > compared / 10


@pytest.mark.parametrize("part", range(0, PARTS, 5))
def test_each_group_alone_hits_the_longest_prefix_that_it_can_serve(part):
    for coordinator, case in cases_of(part):
        alignment = coordinator._cache_hit_alignment_tokens
        blocks, lengths = coordinator.find_longest_cache_hit_per_group(
            case.request.block_hashes, case.limit
        )
        for group in range(len(case.layout.groups)):
            spec = case.layout.spec(group)
            if not spec.prefix_cacheable:
                assert (lengths[group], blocks[group]) == (0, [])
                continue
            alike = [
                other for other in range(len(case.layout.groups)) if case.layout.spec(other) == spec
            ]
            want = longest(case.layout, case.cached, alignment, case.limit, alike)
            assert lengths[group] == want, f"{case.what}: group {group}"
            problem = wrong_blocks(case.layout, case.cached, group, want, ids(blocks[group]))
            assert problem is None, f"{case.what}: {problem}"
