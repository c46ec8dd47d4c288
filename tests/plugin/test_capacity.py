# SPDX-License-Identifier: Apache-2.0
"""Which groups count, what a pool holds, and the check of what a strategy chooses to count.

`tests/coordinator/test_pool_capacity.py` compares the formulas with what vLLM lets in.
"""

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core import kv_cache_utils
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
from vllm_hybrid_kv.planning.capacity import (
    addressable_slots,
    blocks_per_request,
    capacity,
    check_capacity_groups,
    requests_at_once,
    token_capacity_kv_cache_groups,
)

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


LEN = 27_680
BLOCK = 2_768


@pytest.fixture(scope="module")
def config_of(model):
    """Makes one real configuration, with another cache mode and length each time."""
    made = EngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        max_num_batched_tokens=4096,
        async_scheduling=False,
    ).create_engine_config()

    def make(mode="none", max_model_len=LEN):
        made.cache_config.mamba_cache_mode = mode
        made.model_config.max_model_len = max_model_len
        return made

    return make


def hybrid(full, states, mode, block=BLOCK, num_blocks=262):
    """The shapes of #40384: groups of attention beside groups of states, of equal pages."""
    attention = FullAttentionSpec(
        block_size=block, num_kv_heads=2, head_size=256, dtype=torch.uint8, state_content_bytes=388
    )
    page = attention.page_size_bytes
    states_block = LEN if mode == "none" else block
    spec = MambaSpec(states_block, shapes=((page,),), dtypes=(torch.uint8,), mamba_cache_mode=mode)
    planned = plan(*[attention] * full, *[spec] * states)
    planned.num_blocks = num_blocks
    return planned


def of_40384(full, counted, num_blocks=262, block=BLOCK):
    """What #40384 and the vLLM of its time report: tokens of `counted` groups' share of a pool."""
    return num_blocks // counted * block


# Attention groups, groups of states, cache mode; groups that grow; old and new number of #40384
# for 262 blocks of 2,768 tokens. The second is the pull request's own example.
SHAPES_OF_40384 = {
    "attention alone": (1, 0, "none", 1, 725_216, 725_216),
    "two of attention, three of states": (2, 3, "align", 2, 143_936, 362_608),
    "one of attention, one of states": (1, 1, "none", 1, 362_608, 725_216),
    "one of attention, three of states": (1, 3, "align", 1, 179_920, 725_216),
    "a state for every block": (1, 3, "all", 4, 179_920, 179_920),
    "states alone": (0, 3, "align", 3, 240_816, 240_816),
}


@pytest.mark.parametrize("shape", SHAPES_OF_40384)
def test_the_shapes_of_40384(shape, config_of):
    full, states, mode, growing, before, after = SHAPES_OF_40384[shape]
    config, planned = config_of(mode), hybrid(full, states, mode)
    counted = token_capacity_kv_cache_groups(config, planned)
    assert len(counted) == growing
    assert of_40384(full, full + states) == before
    assert of_40384(full, len(counted)) == after


@pytest.mark.parametrize("shape", SHAPES_OF_40384)
def test_what_40384_calls_deflated_is_what_short_requests_can_have(shape, config_of):
    full, states, mode, _, before, _ = SHAPES_OF_40384[shape]
    planned = hybrid(full, states, mode)
    fit = requests_at_once(config_of(mode), planned, BLOCK)
    # The null block may cost one request.
    assert before - BLOCK <= fit * BLOCK <= before


def test_long_requests_can_have_what_the_growing_groups_leave_room_for(config_of):
    said = capacity(config_of("align"), hybrid(2, 3, "align"))
    # 10 blocks of each of two groups that grow, and two states of each of three that do not.
    assert said.max_len_requests == 261 // 26
    assert said.concurrency == 262 / 26
    assert said.max_len_tokens == int(262 / 26 * LEN) == 278_929
    # The longer the requests, the nearer to #40384's number.
    longer = capacity(config_of("align", 100 * BLOCK), hybrid(2, 3, "align"))
    assert said.max_len_tokens < longer.max_len_tokens < 362_608
    assert longer.max_len_tokens == int(262 / 206 * 100 * BLOCK)


@pytest.mark.parametrize("bounded", [WINDOW, WINDOW_MLA, CHUNKED])
def test_the_shapes_of_40417_windows_and_chunks_are_bounded(bounded, config_of):
    config = config_of(max_model_len=16_384)
    planned = plan(FULL, *[bounded] * 5)
    planned.num_blocks = 60_001
    assert names(token_capacity_kv_cache_groups(config, planned)) == ["layer.0"]
    said = capacity(config, planned)
    assert (said.short_request, said.short_requests) == (512, 60_000 // (6 * 32))
    # 128 tokens and the 4096 in flight, in place of 16,384.
    in_flight = 4096 + 128
    least, most = in_flight // 16 - 1, in_flight // 16 + 1
    assert 60_000 // (1024 + 5 * most) <= said.max_len_requests <= 60_000 // (1024 + 5 * least)


def test_nemotron_h_with_several_groups_of_attention(config_of):
    # 24 layers of states and 4 of attention, in groups of 2: two grow, twelve do not.
    config, planned = config_of("align"), hybrid(2, 12, "align", num_blocks=1401)
    assert len(token_capacity_kv_cache_groups(config, planned)) == 2
    said = capacity(config, planned)
    assert said.short_requests == 1400 // 14
    assert said.max_len_requests == 1400 // (2 * 10 + 12 * 2)


def test_whole_requests_do_not_use_the_null_block(config_of):
    planned = plan(FULL)
    planned.num_blocks = 300
    said = capacity(config_of(max_model_len=1600), planned)
    assert (said.concurrency, said.max_len_tokens) == (3.0, 4800)
    assert (said.max_len_requests, said.short_requests) == (2, 299 // 32)


def test_the_reported_size_is_what_vllm_reports_without_the_plugin(config_of):
    config, planned = config_of("align"), hybrid(2, 3, "align")
    said = capacity(config, planned)
    stock = kv_cache_utils.get_kv_cache_capacity(config, planned)
    assert stock == (said.max_len_tokens, said.concurrency)


def test_a_request_is_not_longer_than_max_model_len(config_of):
    planned = plan(FULL)
    planned.num_blocks = 101
    said = capacity(config_of(max_model_len=90), planned)
    assert (said.short_request, said.short_requests) == (90, 100 // 6)


def test_a_request_longer_than_the_pool_is_a_fraction(config_of):
    said = capacity(config_of(), plan(FULL))
    assert said.concurrency == 10 / (LEN // 16)
    assert (said.max_len_requests, said.short_requests) == (0, 0)
    assert ", 0.00 of them at once; 0 whole ones" in said.describe()[0]


def test_another_reported_size_is_explained_in_the_log(config_of):
    said = capacity(config_of("align"), hybrid(2, 3, "align"))
    assert len(said.describe()) == len(said.describe(said.max_len_tokens)) == 2
    assert "362,608 tokens, counts only" in said.describe(362_608)[2]


def test_drafts_need_states_of_their_own(config_of):
    spec = MambaSpec(
        16, shapes=((8,),), dtypes=(torch.float32,), mamba_cache_mode="align",
        num_speculative_blocks=3,
    )  # fmt: skip
    config = config_of("align", 160)
    assert [blocks_per_request(config, spec, tokens) for tokens in (1, 16, 17, 160)] == [4, 4, 5, 5]


def test_slots_of_a_group_reach_over_the_whole_pool(config_of):
    # #37118: a buffer that is indexed by slot, of a model with two groups of attention.
    config, planned = config_of("align"), hybrid(2, 3, "align")
    group = planned.kv_cache_groups[1]
    slots = addressable_slots(group, planned)
    assert slots == 262 * BLOCK == 725_216
    last_block = planned.num_blocks - 1
    assert slots == last_block * BLOCK + (BLOCK - 1) + 1
    said = capacity(config, planned)
    growing = of_40384(2, len(token_capacity_kv_cache_groups(config, planned)))
    assert slots > growing > said.max_len_tokens > said.short_tokens


def test_groups_of_other_block_sizes_have_slots_of_their_own():
    planned = plan(FULL, SlidingWindowSpec(**{**SHAPE, "block_size": 64}, sliding_window=128))
    slots = [addressable_slots(group, planned) for group in planned.kv_cache_groups]
    assert slots == [160, 640]
