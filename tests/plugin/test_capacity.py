# SPDX-License-Identifier: Apache-2.0
"""The strategy `growing`, and the check of what any strategy chooses to count."""

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from vllm_hybrid_kv.errors import HybridKVStrategyError
from vllm_hybrid_kv.planning.capacity import check_capacity_groups, token_capacity_kv_cache_groups

SHAPE = {"block_size": 16, "num_kv_heads": 1, "head_size": 64, "dtype": torch.bfloat16}
FULL = FullAttentionSpec(**SHAPE)
MLA = MLAAttentionSpec(**SHAPE)
WINDOW = SlidingWindowSpec(**SHAPE, sliding_window=128)
WINDOW_MLA = SlidingWindowMLASpec(**SHAPE, sliding_window=128)
CHUNKED = ChunkedLocalAttentionSpec(**SHAPE, attention_chunk_size=128)


def mamba(mode):
    return MambaSpec(16, shapes=((8,),), dtypes=(torch.float32,), mamba_cache_mode=mode)


def plan(*specs, **fields):
    groups = [
        KVCacheGroupSpec([f"layer.{index}"], spec, **fields) for index, spec in enumerate(specs)
    ]
    return KVCacheConfig(num_blocks=10, kv_cache_tensors=[], kv_cache_groups=groups)


def names(groups):
    return [group.layer_names[0] for group in groups]


def test_full_attention_and_its_subclasses_grow():
    assert names(token_capacity_kv_cache_groups(None, plan(FULL, MLA))) == ["layer.0", "layer.1"]


@pytest.mark.parametrize("bounded", [WINDOW, WINDOW_MLA, CHUNKED, mamba("none"), mamba("align")])
def test_what_is_bounded_does_not_count_beside_full_attention(bounded):
    assert names(token_capacity_kv_cache_groups(None, plan(bounded, FULL, bounded))) == ["layer.1"]


def test_mamba_that_keeps_a_state_for_every_block_grows():
    assert names(token_capacity_kv_cache_groups(None, plan(FULL, mamba("all")))) == [
        "layer.0",
        "layer.1",
    ]


def test_a_group_of_layers_with_specs_of_their_own_is_looked_into():
    inner = UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": FULL, "b": FULL})
    assert names(token_capacity_kv_cache_groups(None, plan(WINDOW, inner))) == ["layer.1"]


def test_where_nothing_grows_every_group_counts():
    assert names(token_capacity_kv_cache_groups(None, plan(WINDOW, mamba("align")))) == [
        "layer.0",
        "layer.1",
    ]


def test_groups_in_host_memory_alone_are_not_enough():
    everything = plan(FULL, WINDOW)
    everything.kv_cache_groups[0].host_resident = True
    assert names(token_capacity_kv_cache_groups(None, everything)) == ["layer.0", "layer.1"]


def test_a_choice_of_the_plans_groups_is_accepted():
    everything = plan(FULL, WINDOW)
    check_capacity_groups(everything, everything.kv_cache_groups[1:], "strategy 'odd'")


def test_a_group_of_another_plan_is_refused():
    with pytest.raises(HybridKVStrategyError, match="strategy 'odd' chose a KV group that is not"):
        check_capacity_groups(plan(FULL), plan(FULL).kv_cache_groups, "strategy 'odd'")


def test_a_group_chosen_twice_is_refused():
    everything = plan(FULL, WINDOW)
    with pytest.raises(HybridKVStrategyError, match=r"KV group of layer layer\.0 twice"):
        check_capacity_groups(everything, [everything.kv_cache_groups[0]] * 2, "strategy 'odd'")


@pytest.mark.parametrize("host", [True, False])
def test_a_choice_without_device_memory_is_refused(host):
    everything = plan(FULL, WINDOW)
    everything.kv_cache_groups[0].host_resident = True
    chosen = everything.kv_cache_groups[:1] if host else []
    with pytest.raises(HybridKVStrategyError, match="none of them in device memory"):
        check_capacity_groups(everything, chosen, "strategy 'odd'")


def test_an_answer_that_is_no_list_is_refused():
    with pytest.raises(HybridKVStrategyError, match="must answer with a list of KV groups"):
        check_capacity_groups(plan(FULL), 1, "strategy 'odd'")
