# SPDX-License-Identifier: Apache-2.0
"""Tests that state blocks are cached only under the prefix of the state in them."""

from __future__ import annotations

import pytest
import vllm.v1.core.kv_cache_manager as manager_module
from vllm.v1.core.kv_cache_utils import get_group_id
from vllm.v1.kv_cache_interface import KVCacheConfig

from testing.coordinator.contents import NUM_BLOCKS, Layout, full, layout_of, mamba, request_of
from vllm_hybrid_kv.coordinator.hybrid_policy import HybridAwareCoordinator
from vllm_hybrid_kv.coordinator.longest_hit import FixedPointCoordinator

STATE_BLOCK = 64
CHUNK_GRID = 16
"""Tokens of an attention block, the smallest block. The engine core aligns chunks to it."""

LAYOUT = layout_of(full(CHUNK_GRID), mamba(STATE_BLOCK), unit=CHUNK_GRID)
STATES = 1


class Engine:
    """Runs vLLM's KV cache manager, and tracks the state that a worker would write to a block."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.manager = manager_module.KVCacheManager(
            kv_cache_config=KVCacheConfig(NUM_BLOCKS, [], list(layout.groups)),
            max_model_len=4096,
            scheduler_block_size=layout.scheduler_block_size,
            hash_block_size=layout.hash_unit,
        )
        # By block id, the number of tokens after which its state was written.
        self.written: dict[int, int] = {}

    def send(self, token_ids: list[int], *ends: int) -> int:
        """Compute a prompt in chunks that end at `ends`, and return the length of its hit."""
        request = request_of(self.layout, token_ids)
        manager = self.manager
        manager.new_step_starts()
        blocks, hit, _ = manager.get_computed_blocks(request)
        for end in ends:
            if end <= hit:
                continue
            start = max(request.num_computed_tokens, hit)
            first = request.num_computed_tokens == 0
            new = (end - start, hit, blocks) if first else (end - start,)
            assert manager.allocate_slots(request, *new) is not None
            table = manager.coordinator.get_blocks(request.request_id)[STATES]
            for source, copy in manager.coordinator.single_type_managers[
                STATES
            ].take_pending_cow_copies():
                self.written[copy.block_id] = self.written[source.block_id]
            self.written[table[-(-end // STATE_BLOCK) - 1].block_id] = end
            request.num_computed_tokens = end
            manager.new_step_starts()
            self.check()
        manager.free(request)
        return hit

    def check(self) -> None:
        for block in self.manager.block_pool.blocks:
            if block.block_hash is not None and get_group_id(block.block_hash) == STATES:
                assert self.written[block.block_id] == block.block_hash_num_tokens


@pytest.fixture(params=[FixedPointCoordinator, HybridAwareCoordinator])
def engine(request, monkeypatch):
    monkeypatch.setattr(
        manager_module, "get_kv_cache_coordinator", lambda **named: request.param(**named)
    )
    return Engine(LAYOUT)


def test_the_state_at_the_end_of_a_chunk_is_cached(engine):
    prompt = list(range(100))
    assert engine.send(prompt, 64, 96, 100) == 0
    assert engine.send([*prompt[:70], 999], 71) == 64
    assert engine.send(prompt, 100) == 96


def test_a_chunk_that_passes_the_end_of_a_state_block_caches_no_state_there(engine):
    prompt = list(range(100))
    # The chunk from 16 to 80 tokens does not stop at 64.
    engine.send(prompt, 16, 80, 100)
    assert engine.send(prompt, 100) == 0


def test_a_request_that_resumes_inside_a_state_block_and_passes_its_end_caches_no_state(engine):
    prompt = list(range(210))
    assert engine.send(prompt[:84], 64, 80, 84) == 0
    # The request resumes at 80 tokens, and its chunk does not stop at 128.
    assert engine.send(prompt, 160, 208, 210) == 80
    assert engine.send([*prompt[:150], 999], 151) == 80
