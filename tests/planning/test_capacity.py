# SPDX-License-Identifier: Apache-2.0
"""Test the reported capacity, and which groups it counts, for models of vLLM's #40384 and #40417.

`tests/coordinator/test_pool_capacity.py` compares the capacities with what vLLM admits.
"""

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from tests.planning.layers import BLOCK, LONGEST, attention, hybrid, mla, plan, state
from vllm_hybrid_kv.errors import HybridKVStrategyError
from vllm_hybrid_kv.planning.capacity import (
    addressable_slots,
    capacity,
    check_capacity_groups,
    token_capacity_kv_cache_groups,
)

pytestmark = pytest.mark.usefixtures("default_settings")

FULL = attention()
MLA = mla(16)
WINDOW = attention(cls=SlidingWindowSpec, sliding_window=128)
WINDOW_MLA = mla(16, cls=SlidingWindowMLASpec, sliding_window=128)
CHUNKED = attention(cls=ChunkedLocalAttentionSpec, attention_chunk_size=128)


def mamba(mode, **fields):
    return state(8, mamba_cache_mode=mode, **fields)


def growing(planned):
    """Return the indices of the groups whose tokens the strategy `growing` counts as capacity."""
    groups = token_capacity_kv_cache_groups(None, planned)
    return [int(group.layer_names[0].removeprefix("layer.")) for group in groups]


UNIFORM = UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": FULL, "b": FULL})


@pytest.mark.parametrize(
    ("specs", "counted"),
    [
        pytest.param([FULL, MLA], [0, 1], id="full attention and MLA"),
        pytest.param([WINDOW, FULL, WINDOW_MLA], [1], id="windows"),
        pytest.param([CHUNKED, FULL], [1], id="chunks"),
        pytest.param([mamba("none"), mamba("align"), FULL], [2], id="states"),
        pytest.param([WINDOW, mamba("all")], [1], id="a state per block"),
        pytest.param([WINDOW, UNIFORM], [1], id="a group with one spec per layer"),
        pytest.param([WINDOW, mamba("align")], [0, 1], id="only bounded groups"),
    ],
)
def test_groups_that_grow_with_the_sequence_count(specs, counted):
    assert growing(plan(*specs)) == counted


def test_all_groups_count_if_only_groups_in_host_memory_grow():
    planned = plan(FULL, WINDOW)
    planned.kv_cache_groups[0].host_resident = True
    assert growing(planned) == [0, 1]


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (
            lambda groups: plan(FULL).kv_cache_groups,
            r"must choose among the plan's 2 KV groups, .*",
        ),
        (lambda groups: [groups[1], groups[1]], r"each at most once, got \[KVCacheGroupSpec"),
        (lambda groups: groups[:1], "got 1 of 2 KV groups, none in device memory"),
        (lambda groups: [], "got 0 of 2 KV groups, none in device memory"),
        (lambda groups: 1, "must return a list of KV groups"),
    ],
)
def test_an_invalid_choice_of_groups_is_refused(choose, message):
    planned = plan(FULL, WINDOW)
    check_capacity_groups(planned, planned.kv_cache_groups[1:], "strategy 'odd'")
    planned.kv_cache_groups[0].host_resident = True
    with pytest.raises(HybridKVStrategyError, match=f"strategy 'odd' .*{message}"):
        check_capacity_groups(planned, choose(planned.kv_cache_groups), "strategy 'odd'")


@pytest.fixture(scope="module")
def config_of(model):
    """Return a function that sets the cache mode and `max_model_len` of one engine config."""
    made = EngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        max_num_batched_tokens=4096,
        async_scheduling=False,
    ).create_engine_config()

    def make(mode="none", max_model_len=LONGEST):
        made.cache_config.mamba_cache_mode = mode
        made.model_config.max_model_len = max_model_len
        return made

    return make


@pytest.mark.parametrize(
    ("full", "states", "mode", "grow", "before", "after"),
    [
        (1, 0, "none", 1, 725_216, 725_216),
        # The example of #40384.
        (2, 3, "align", 2, 143_936, 362_608),
        (1, 1, "none", 1, 362_608, 725_216),
        (1, 3, "align", 1, 179_920, 725_216),
        (1, 3, "all", 4, 179_920, 179_920),
        (0, 3, "align", 3, 240_816, 240_816),
    ],
)
def test_the_shapes_of_40384_have_the_numbers_that_it_reports(
    full, states, mode, grow, before, after, config_of
):
    planned = hybrid(full, states, mode)
    assert len(growing(planned)) == grow
    # Divide the pool among all groups, the old rule, or only the growing ones, the rule of #40384.
    assert [262 // counted * BLOCK for counted in (full + states, grow)] == [before, after]
    # `before` is the capacity for requests of one block. One of the blocks may be the null block.
    fit = capacity(config_of(mode, BLOCK), planned).max_len_requests
    assert before - BLOCK <= fit * BLOCK <= before


def test_long_requests_get_most_of_the_capacity_of_the_growing_groups(config_of):
    found = capacity(config_of("align"), hybrid(2, 3, "align"))
    # A request has 10 blocks in each of two growing groups, and 2 states in each of three others.
    assert found.max_len_requests == 261 // 26
    stock = kv_cache_utils.get_kv_cache_capacity(config_of("align"), hybrid(2, 3, "align"))
    assert (found.max_len_tokens, found.concurrency) == stock == (278_929, 262 / 26)
    # Longer requests bring the capacity closer to the number of #40384.
    longer = capacity(config_of("align", 100 * BLOCK), hybrid(2, 3, "align"))
    assert found.max_len_tokens < longer.max_len_tokens < 362_608
    assert longer.max_len_tokens == int(262 / 206 * 100 * BLOCK)


@pytest.mark.parametrize("bounded", [WINDOW, WINDOW_MLA, CHUNKED])
def test_windows_and_chunks_are_bounded_as_in_40417(bounded, config_of):
    found = capacity(config_of(max_model_len=16_384), plan(FULL, *[bounded] * 5, num_blocks=60_001))
    assert (found.short_request, found.short_requests) == (512, 60_000 // (6 * 32))
    # A bounded layer holds 128 tokens and up to 4096 tokens in flight, instead of 16,384.
    in_flight = 4096 + 128
    least, most = in_flight // 16 - 1, in_flight // 16 + 1
    assert 60_000 // (1024 + 5 * most) <= found.max_len_requests <= 60_000 // (1024 + 5 * least)


def test_a_request_that_does_not_fit_into_the_pool_counts_as_a_fraction(config_of):
    found = capacity(config_of(), plan(FULL, num_blocks=10))
    assert found.concurrency == 10 / (LONGEST // 16)
    assert (found.max_len_requests, found.short_requests) == (0, 0)
    assert ", 0.00 of them at once; 0 whole requests" in found.describe(0)[0]


def test_a_different_reported_size_is_explained_in_the_log(config_of):
    found = capacity(config_of("align"), hybrid(2, 3, "align"))
    assert len(found.describe(found.max_len_tokens)) == 2
    assert "362,608 tokens, counts only" in found.describe(362_608)[2]


def test_a_buffer_indexed_by_slot_needs_the_groups_blocks_of_the_whole_pool():
    planned = plan(FULL, WINDOW, num_blocks=40)
    assert [addressable_slots(group, planned) for group in planned.kv_cache_groups] == [640, 640]
