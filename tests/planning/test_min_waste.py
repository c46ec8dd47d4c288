# SPDX-License-Identifier: Apache-2.0
"""Test the plans of `min_waste` for each kind of layer, and its messages."""

import logging

import pytest
import torch
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, KVCacheSpec, SlidingWindowSpec

from tests.planning.layers import attention, mla, named, shapes, state
from tests.planning.page_oracle import match_unit_of, share_wasted
from vllm_hybrid_kv.planning.lcm import unify_by_lcm
from vllm_hybrid_kv.planning.min_waste import (
    LONGEST_SEQUENCE,
    REFERENCE_REQUEST,
    MinWaste,
    unify_with_least_waste,
)
from vllm_hybrid_kv.planning.page_sizes import check_page_sizes

STATE_PAGE = 12_648_448


class OtherSpec(KVCacheSpec):
    """The spec of a layer from another package, of a kind that the planner does not know."""

    page_size_bytes = property(lambda self: 100 * self.block_size)


def window(*arguments, size=128, **fields):
    return attention(*arguments, cls=SlidingWindowSpec, sliding_window=size, **fields)


def chunks(*arguments, size):
    return attention(*arguments, cls=ChunkedLocalAttentionSpec, attention_chunk_size=size)


PLANS = {
    "a small page next to large states is filled and padded": (
        [attention(), *[state(STATE_PAGE)] * 3],
        [(1_018 * 16, STATE_PAGE), *[(16, None)] * 3],
    ),
    "a block of chunked local attention divides its chunk": (
        [attention(128, 100), chunks(128, 100, size=256), attention(128, 300)],
        [(384, None), (256, 76_800), (128, None)],
    ),
    "MLA is scaled exactly and other layers are padded to it": (
        [mla(), window(64, 1_024, 1), attention(64, 4_000, 1)],
        [(448, None), (448, 516_096), (128, 516_096)],
    ),
    # 64 rows of 584 bytes are padded to a multiple of 576 bytes: 37,440. Nine times as many rows
    # need no padding.
    "MLA is padded by its alignment": (
        [mla(row=584, alignment=576), state(2 * 64 * 584)],
        [(128, 74_880), (16, 74_880)],
    ),
    "two kinds of MLA get a common multiple": (
        [mla(64, 1_152), mla(64, 768), window(16, 100, size=64)],
        [(128, None), (192, None), (46 * 16, 147_456)],
    ),
    # Qwen3.6-35B-A3B with one layer left unquantised: vLLM pads states to a multiple of both
    # attention pages before it plans.
    "padding that vLLM gave a state is removed": (
        [
            *[state(1_097_728, 128, page_size_padded=25_427_968)] * 30,
            *[attention(128)] * 9,
            attention(128, 1_024),
        ],
        [*[(128, None)] * 30, *[(1_408, 1_097_728)] * 9, (512, 1_097_728)],
    ),
    "pages can be viewed as the layers' dtypes": (
        [state(1_001), attention(1, 2, 25, dtype=torch.bfloat16)],
        [(16, 1_002), (20, 1_002)],
    ),
    # An entry covers 16 tokens: 24 tokens make 1 entry, but twice as many tokens make 3.
    "a compressed layer that rounds its tokens is unchanged": (
        [mla(24, 100, tokens_per_state=16), state(40)],
        [(24, None), (16, 100)],
    ),
    "a layer of an unknown kind is only scaled": (
        [OtherSpec(block_size=16), state(4_000)],
        [(48, None), (16, 4_800)],
    ),
}


@pytest.mark.parametrize("plan", PLANS)
def test_each_kind_of_layer_has_the_blocks_and_padding_that_its_kernels_can_read(plan):
    layers, expected = PLANS[plan]
    specs = named(layers)
    unified = unify_with_least_waste(specs)
    assert shapes(unified) == expected
    check_page_sizes(specs, unified, "min_waste")


def test_the_plan_is_logged_in_one_line(log):
    unify_with_least_waste(named([attention(), *[state(STATE_PAGE)] * 3]))
    unify_with_least_waste(named([attention(), window()]))
    assert log(logging.INFO) == [
        "min_waste: pages of 12,648,448 bytes, 0.02 % of the pool is padding"
    ]


def test_two_kinds_of_mla_have_no_plan_with_stock_or_lcm(stock):
    specs = named(PLANS["two kinds of MLA get a common multiple"][0])
    for rule in (stock, unify_by_lcm):
        with pytest.raises(NotImplementedError):
            rule(dict(specs))


THREE_KINDS = named(
    [*[attention()] * 28, *[attention(slot=1_024)] * 4, *[window(16, 584, size=1_024)] * 10]
)


def test_less_than_a_percent_of_the_pool_is_not_worth_longer_blocks():
    exact = unify_with_least_waste(THREE_KINDS, tolerance=0.0)
    unified = unify_with_least_waste(THREE_KINDS)
    assert share_wasted(THREE_KINDS, exact) < share_wasted(THREE_KINDS, unified) <= 0.01
    assert share_wasted(THREE_KINDS, unified) <= share_wasted(
        THREE_KINDS, unify_by_lcm(THREE_KINDS)
    )
    longest = [max(block for block, _ in shapes(plan)) for plan in (exact, unified)]
    assert longest == [2_240, 336]


def test_padded_blocks_are_no_longer_than_max_model_len():
    specs = {"attention": attention(), "state": state(STATE_PAGE)}
    unified = unify_with_least_waste(specs, longest=8_190)
    assert shapes(unified) == [(8_192, STATE_PAGE), (16, None)]
    # For every strategy, space that no token can fill counts as padding.
    assert share_wasted(specs, unify_by_lcm(specs), 8_190) > share_wasted(specs, unified, 8_190)


def test_layers_keep_fields_that_vllm_does_not_compare():
    if not hasattr(attention(), "is_draft"):
        pytest.skip("needs vLLM 0.33")
    specs = {"target": attention(), "draft": attention(is_draft=True), "state": state(50_000)}
    unified = unify_with_least_waste(specs)
    assert unified["target"] == unified["draft"]
    assert (unified["target"].is_draft, unified["draft"].is_draft) == (False, True)


def test_layers_without_a_common_page_are_reported_with_sizes_and_advice():
    specs = {
        "mla.0": mla(64, 1_153),
        "mla.1": mla(64, 1_153),
        "draft": mla(64, 1_151),
        "state": state(40_000),
    }
    with pytest.raises(NotImplementedError) as error:
        unify_with_least_waste(specs, longest=4_096)
    assert str(error.value) == (
        "min_waste: no page size suits all layers: layer mla.0 and 1 more (MLAAttentionSpec) has a "
        "page of 73,792 bytes for 64 tokens; layer draft (MLAAttentionSpec) has a page of 73,664 "
        "bytes for 64 tokens. These pages can only be scaled by whole blocks, and no size from "
        "73,792 bytes (the largest page) to 4,722,688 bytes (a block of max_model_len, 4,096 "
        "tokens) is a multiple of all of them. Use one --kv-cache-dtype for all layers, a draft "
        "model of the same shape, or another --block-size"
    )
    with pytest.raises(NotImplementedError, match=r"layer mla \(MLAAttentionSpec\) has a page of"):
        unify_with_least_waste({"mla": mla(24, 100, tokens_per_state=16), "state": state(200)})


def test_a_few_percent_of_padding_are_accepted_for_a_smaller_match_unit():
    least = unify_with_least_waste(THREE_KINDS)
    weighed = unify_with_least_waste(THREE_KINDS, reference=REFERENCE_REQUEST)
    assert (match_unit_of(least), match_unit_of(weighed)) == (2_688, 96)
    assert 0.01 < share_wasted(THREE_KINDS, weighed) < 0.04


@pytest.mark.parametrize(
    ("specs", "prefix_caching", "devices", "unit"),
    [
        (THREE_KINDS, True, 1, 96),
        # With 64 devices a match unit covers 64 times as many tokens, so a shorter one is better.
        (THREE_KINDS, True, 64, 32),
        (THREE_KINDS, False, 1, 2_688),
        ({"state": state(1_000), **THREE_KINDS}, True, 1, None),
    ],
)
def test_only_models_whose_hits_end_at_blocks_weigh_match_units(
    specs, prefix_caching, devices, unit, make_config
):
    config = make_config()
    config.cache_config.enable_prefix_caching = prefix_caching
    config.parallel_config.decode_context_parallel_size = devices
    plan = MinWaste().hybrid_kv_unify_page_sizes(vllm_config=config, kv_cache_spec=specs)
    least = unify_with_least_waste(specs, config.model_config.max_model_len)
    assert match_unit_of(plan) == (unit or match_unit_of(least))


def test_without_a_configuration_no_block_is_limited_by_max_model_len():
    specs = {"attention": attention(), "state": state(STATE_PAGE)}
    plan = MinWaste().hybrid_kv_unify_page_sizes(vllm_config=None, kv_cache_spec=specs)
    assert plan == unify_with_least_waste(specs, LONGEST_SEQUENCE)
