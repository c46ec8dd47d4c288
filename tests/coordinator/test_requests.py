# SPDX-License-Identifier: Apache-2.0
"""A request in vLLM's real KV cache manager with our coordinator."""

import pytest
import vllm.v1.core.kv_cache_manager as manager_module
from vllm.v1.kv_cache_interface import KVCacheConfig

from testing.coordinator.contents import NUM_BLOCKS, full, layout_of, mamba, request_of
from vllm_hybrid_kv.coordinator.longest_hit import FixedPointCoordinator


@pytest.fixture
def manager_of(monkeypatch):
    """Make a manager as vLLM does, with a given coordinator class."""

    def make(coordinator_class, layout):
        monkeypatch.setattr(
            manager_module,
            "get_kv_cache_coordinator",
            lambda **factory_args: coordinator_class(**factory_args),
        )
        return manager_module.KVCacheManager(
            kv_cache_config=KVCacheConfig(NUM_BLOCKS, [], list(layout.groups)),
            max_model_len=4096,
            scheduler_block_size=layout.scheduler_block_size,
            hash_block_size=layout.hash_unit,
        )

    return make


def compute(manager, request, *chunks):
    """Compute a request's tokens in chunks, one per step."""
    for count in chunks:
        manager.new_step_starts()
        assert manager.allocate_slots(request, count) is not None
        request.num_computed_tokens += count
        copies(manager)


def copies(manager):
    """Return the block copies of the step, as pairs of source and copy."""
    return [
        pair
        for one in manager.coordinator.single_type_managers
        for pair in one.take_pending_cow_copies()
    ]


def test_a_repeated_prompt_hits_inside_a_block_and_writes_to_copies(manager_of):
    layout = layout_of(full(64), mamba(64), unit=16)
    manager = manager_of(FixedPointCoordinator, layout)
    first = request_of(layout, list(range(120)))
    # A chunk ends where the state is cached: at the prompt's last whole hash unit.
    compute(manager, first, 112, 8)
    first.append_output_token_ids(list(range(500, 520)))
    compute(manager, first, 16)
    manager.free(first)
    again = request_of(layout, [*range(120), *range(500, 508)])
    manager.new_step_starts()
    blocks, length, _ = manager.get_computed_blocks(again)
    assert length == 112
    shared = [group[-1] for group in blocks.blocks]
    assert manager.allocate_slots(again, 16, length, blocks) is not None
    made = copies(manager)
    assert [source for source, _ in made] == shared
    own = [group[-1] for group in manager.coordinator.get_blocks("request")]
    assert [copy for _, copy in made] == own
