# SPDX-License-Identifier: Apache-2.0
"""`FixedPointCoordinator` compared with brute force, on random groups and cache contents."""

import os

import pytest

from testing.coordinator.contents import coordinator_of, fill, random_cases, request_of
from testing.coordinator.oracle import longest, wrong_blocks
from vllm_hybrid_kv.coordinator.longest_hit import FixedPointCoordinator

SEED = int(os.environ.get("HYBRID_KV_TEST_SEED", "20261122"))
PARTS = 10
LAYOUTS, CONTENTS = 50, 20
"""Per part: 10,000 cases in total."""


def cases_of(part):
    """Yield each case with a coordinator whose cache has its contents."""
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
    # Contents without any hit would prove nothing.
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
