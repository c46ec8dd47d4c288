# SPDX-License-Identifier: Apache-2.0
"""The strategy `min_waste`: its plan for each kind of layer, and its messages."""

import logging
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    CircularBufferSpec,
    KVCacheSpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
)

from tests.planning.layers import attention, blocks, mla, named, pages, state
from tests.planning.page_oracle import match_unit_of
from vllm_hybrid_kv.planning.lcm import unify_by_lcm
from vllm_hybrid_kv.planning.min_waste import (
    LONGEST_SEQUENCE,
    REFERENCE_REQUEST,
    MinWaste,
    longest_sequence,
    unify_with_least_waste,
    waste,
)
from vllm_hybrid_kv.planning.page_kinds import layer_kind
from vllm_hybrid_kv.planning.page_sizes import check_page_sizes

STATE_PAGE = 12_648_448
KERNEL_BLOCKS = {"block_stride_alignment": MultipleOf(64)}
"""How vLLM's worker marks the specs of backends with kernels for 16, 32 and 64 tokens."""


def page(specs):
    (size,) = set(pages(specs).values())
    return size


def test_a_small_attention_page_next_to_a_large_state_is_filled_and_padded(log):
    specs = {"attention": attention(), **named([state(STATE_PAGE)] * 3)}
    unified = unify_with_least_waste(specs)
    assert page(unified) == STATE_PAGE
    assert unified["attention"] == replace(
        specs["attention"], block_size=1_018 * 16, page_size_padded=STATE_PAGE
    )
    assert unified["layer.0"] is specs["layer.0"]
    assert log.lines(logging.INFO) == [
        "min_waste: pages of 12,648,448 bytes, 0.02 % of the pool is padding",
        "min_waste: 1 layers (FullAttentionSpec, blocks of 16,288 tokens) use 12,639,488 bytes of "
        "each page, 0.07 % of it is padding",
    ]
    assert waste(specs, unified) < waste(specs, unify_by_lcm(specs))


def test_pages_that_divide_the_largest_are_only_scaled(log):
    specs = {
        "k8v4": attention(16),
        "window": attention(48, cls=SlidingWindowSpec, sliding_window=512),
        "chunked": attention(8, cls=ChunkedLocalAttentionSpec, attention_chunk_size=480),
    }
    unified = unify_with_least_waste(specs)
    assert blocks(unified) == {"k8v4": 48, "window": 48, "chunked": 48}
    assert all(spec.page_size_padded is None for spec in unified.values())
    assert log.lines(logging.INFO) == [
        "min_waste: pages of 37,248 bytes, 0.00 % of the pool is padding"
    ]


def test_equal_pages_are_unchanged(log):
    specs = {"a": attention(), "b": attention(cls=SlidingWindowSpec, sliding_window=64)}
    unified = unify_with_least_waste(specs)
    assert all(unified[name] is spec for name, spec in specs.items())
    assert log.lines(logging.INFO) == []


def test_a_model_without_layers_has_no_plan():
    assert unify_with_least_waste({}) == {}


def test_a_state_is_only_padded():
    specs = {"attention": attention(64), "small": state(1_000), "tiny": state(7)}
    unified = unify_with_least_waste(specs)
    assert page(unified) == 64 * 776
    assert unified["small"] == replace(specs["small"], page_size_padded=64 * 776)
    assert unified["tiny"].block_size == specs["tiny"].block_size


def test_a_ring_of_raw_keys_is_only_padded():
    # Its block is its capacity, and it has one block per request.
    specs = {"attention": attention(64), "ring": attention(4, cls=CircularBufferSpec)}
    unified = unify_with_least_waste(specs)
    assert unified["ring"] == replace(specs["ring"], page_size_padded=64 * 776)


def test_a_thousandth_of_the_pool_is_not_worth_longer_blocks():
    kinds = [
        attention(),
        attention(slot=1_024),
        attention(slot=584, cls=SlidingWindowSpec, sliding_window=1_024),
    ]
    specs = named([kinds[0]] * 28 + [kinds[1]] * 4 + [kinds[2]] * 10)
    exact = unify_with_least_waste(specs, tolerance=Fraction(0))
    unified = unify_with_least_waste(specs)
    assert waste(specs, exact) < waste(specs, unified) <= Fraction(1, 100)
    assert waste(specs, unified) <= waste(specs, unify_by_lcm(specs))
    assert max(blocks(exact).values()) == 2_240
    assert max(blocks(unified).values()) == 336


def test_a_block_of_chunked_local_attention_divides_its_chunk():
    chunked = attention(128, slot=100, cls=ChunkedLocalAttentionSpec, attention_chunk_size=256)
    specs = {"k8v4": attention(128, slot=100), "chunked": chunked, "plain": attention(128, 300)}
    unified = unify_with_least_waste(specs)
    assert blocks(unified)["k8v4"] == 384
    assert blocks(unified)["chunked"] == 256
    assert len(set(pages(unified).values())) == 1
    check_page_sizes(specs, unified, "min_waste")


@pytest.mark.parametrize("longest", [64, 100, 200, 10_000])
@pytest.mark.parametrize("chunk", [48, 96, 256, 8_192])
def test_every_page_gives_chunked_local_attention_a_block_that_divides_its_chunk(chunk, longest):
    fields = {"cls": ChunkedLocalAttentionSpec, "attention_chunk_size": chunk}
    kind = layer_kind(attention(16, slot=100, **fields), longest)
    sizes = np.arange(kind.least_page, kind.longest_page + 5_000, 700)
    counts = kind.blocks(sizes)
    assert all(chunk % (16 * count) == 0 for count in counts)
    assert 16 * counts[-1] >= min(longest, chunk)
    steps = kind.steps(kind.least_page, kind.longest_page)
    assert list(kind.blocks(steps)) == sorted(set(kind.blocks(steps)))
    assert kind.with_page(int(sizes[-1])).block_size == 16 * counts[-1]


def test_the_tolerance_never_takes_more_than_lcm_leaves():
    specs = named([attention()] * 3 + [attention(slot=1_000)] + [state(STATE_PAGE)] * 200)
    unified = unify_with_least_waste(specs, tolerance=Fraction(1, 2))
    assert waste(specs, unified) <= waste(specs, unify_by_lcm(specs))


def test_padded_blocks_are_no_longer_than_max_model_len():
    specs = {"attention": attention(), "state": state(STATE_PAGE)}
    unified = unify_with_least_waste(specs, longest=8_190)
    assert unified["attention"].block_size == 8_192
    assert page(unified) == STATE_PAGE
    # Space that is never written counts as padding with any strategy.
    assert waste(specs, unified, 8_190) == 1 - Fraction(512 * 12_416 + STATE_PAGE, 2 * STATE_PAGE)
    assert waste(specs, unify_by_lcm(specs), 8_190) > waste(specs, unified, 8_190)


def test_mla_is_scaled_exactly_and_other_layers_are_padded_to_it():
    window = attention(64, 1_024, 1, SlidingWindowSpec, sliding_window=128)
    specs = {"mla": mla(), "window": window, "wide": attention(64, 4_000, 1)}
    unified = unify_with_least_waste(specs)
    assert page(unified) % 73_728 == 0
    assert unified["mla"].page_size_padded is None
    assert unified["mla"].block_size == 64 * page(unified) // 73_728
    with pytest.raises(NotImplementedError):
        unify_by_lcm({"mla": mla(), "window": window})


def test_mla_is_padded_by_its_own_alignment():
    # 64 rows of 584 bytes, rounded up to 576: 37,440. Nine times as many need no rounding.
    aligned = mla(row=584, alignment=576)
    assert aligned.page_size_bytes == 37_440
    for scale in (2, 9):
        size = -(-scale * 64 * 584 // 576) * 576
        unified = unify_with_least_waste({"mla": aligned, "state": state(size - 10)})
        assert page(unified) == size
        assert unified["mla"].block_size == scale * 64
        assert unified["mla"].real_page_size_bytes == scale * 64 * 584


def test_two_kinds_of_mla_get_a_common_multiple_for_which_stock_and_lcm_have_no_plan(stock):
    specs = {
        "mla": mla(64, 1_152),
        "draft": mla(64, 768),
        "window": attention(16, 100, cls=SlidingWindowSpec, sliding_window=64),
    }
    for rule in (stock, unify_by_lcm):
        with pytest.raises(NotImplementedError):
            rule(dict(specs))
    unified = unify_with_least_waste(specs)
    assert page(unified) == 147_456
    assert blocks(unified) == {"mla": 128, "draft": 192, "window": 16 * 46}


def test_sliding_window_mla_without_an_alignment_is_padded_as_in_vllm():
    window = mla(64, 1_000, SlidingWindowMLASpec, sliding_window=64)
    unified = unify_with_least_waste({"mla": mla(), "window": window})
    assert unified["window"] == replace(window, page_size_padded=73_728)


def test_a_block_that_is_split_into_kernel_blocks_is_not_padded():
    split = attention(128, 388, **KERNEL_BLOCKS)
    specs = {"split": split, "state": state(1_000_000)}
    unified = unify_with_least_waste(specs)
    assert page(unified) == 11 * 128 * 776
    assert unified["split"] == replace(split, block_size=11 * 128)
    assert unified["state"].page_size_padded == 11 * 128 * 776


def test_a_block_that_a_kernel_takes_whole_is_scaled_exactly_or_padded_unscaled():
    whole = attention(32, 388, **KERNEL_BLOCKS)
    many = unify_with_least_waste({"state": state(1_000_000), **named([whole] * 9)})
    assert many["layer.0"] == replace(whole, block_size=41 * 32)
    few = unify_with_least_waste({"whole": whole, **named([state(25_000)] * 9)})
    assert few["whole"] == replace(whole, page_size_padded=25_000)


def test_existing_padding_is_filled():
    padded = attention(16, page_size_padded=40_000)
    unified = unify_with_least_waste({"padded": padded, "state": state(40_000)})
    assert unified["padded"] == replace(padded, block_size=48)


def test_padding_that_vllm_gave_a_state_before_planning_is_removed():
    # Qwen3.6-35B-A3B with one layer left unquantised: vLLM pads states to a multiple of both
    # attention pages before it plans.
    specs = {
        **named([state(1_097_728, 128, page_size_padded=25_427_968)] * 30),
        **{f"k8v4.{index}": attention(128) for index in range(9)},
        "bf16": attention(128, 1_024),
    }
    assert waste(specs, unify_by_lcm(specs)) > Fraction(7, 10)
    unified = unify_with_least_waste(specs)
    check_page_sizes(specs, unified, "min_waste")
    assert page(unified) == 1_097_728
    assert (unified["k8v4.0"].block_size, unified["bf16"].block_size) == (1_408, 512)
    assert waste(specs, unified) < Fraction(1, 400)


def test_pages_can_be_viewed_as_the_layers_dtypes():
    specs = {"state": state(1_001), "attention": attention(1, 2, 25, dtype=torch.bfloat16)}
    unified = unify_with_least_waste(specs)
    assert page(unified) == 1_002


def test_a_compressed_layer_that_rounds_its_tokens_is_unchanged():
    # 24 tokens make 1 entry of 16, 48 make 3.
    compressed = mla(24, 100, tokens_per_state=16)
    unified = unify_with_least_waste({"mla": compressed, "state": state(40)})
    assert unified["mla"] is compressed
    with pytest.raises(NotImplementedError, match=r"layer mla \(MLAAttentionSpec\) has a page of"):
        unify_with_least_waste({"mla": compressed, "state": state(200)})


class OtherSpec(KVCacheSpec):
    """An unknown layer of another package."""

    page_size_bytes = property(lambda self: 100 * self.block_size)


def test_a_layer_of_an_unknown_kind_is_only_scaled():
    other = OtherSpec(block_size=16)
    unified = unify_with_least_waste({"other": other, "state": state(4_000)})
    assert unified["other"] == replace(other, block_size=48)
    assert page(unified) == 4_800


def test_layers_keep_fields_that_vllm_does_not_compare():
    if not hasattr(attention(), "is_draft"):
        pytest.skip("from vLLM 0.33 on")
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


def three_kinds_of_attention():
    return named(
        [attention()] * 28
        + [attention(slot=1_024)] * 4
        + [attention(slot=584, cls=SlidingWindowSpec, sliding_window=1_024)] * 10
    )


def test_a_few_percent_of_padding_are_accepted_for_a_smaller_match_unit():
    specs = three_kinds_of_attention()
    least = unify_with_least_waste(specs)
    weighed = unify_with_least_waste(specs, reference=Fraction(REFERENCE_REQUEST))
    assert (match_unit_of(least), match_unit_of(weighed)) == (2_688, 96)
    assert waste(specs, least) < Fraction(1, 100) < waste(specs, weighed) < Fraction(4, 100)


def test_only_models_whose_hits_end_at_blocks_weigh_match_units(make_config):
    specs = three_kinds_of_attention()
    config = make_config()

    def units(specs):
        plan = MinWaste().hybrid_kv_unify_page_sizes(vllm_config=config, kv_cache_spec=specs)
        least = unify_with_least_waste(specs, longest_sequence(config))
        return match_unit_of(plan), match_unit_of(least)

    weighed, least = units(specs)
    assert weighed < least
    weighed, least = units({"state": state(1_000), **specs})
    assert weighed == least
    config.cache_config.enable_prefix_caching = False
    weighed, least = units(specs)
    assert weighed == least


@pytest.mark.parametrize(
    ("spec", "tokens"),
    [
        (attention(), 3_200),
        (attention(cls=SlidingWindowSpec, sliding_window=1_024), 1_024),
        (attention(cls=SlidingWindowSpec, sliding_window=4_096), 3_200),
        (attention(cls=ChunkedLocalAttentionSpec, attention_chunk_size=256), 256),
        (state(1_000), 16),
        (attention(4, cls=CircularBufferSpec), 4),
    ],
)
def test_a_layer_holds_no_more_of_a_request_than_its_window_or_chunk(spec, tokens):
    assert layer_kind(spec, 8_192).held(Fraction(3_200)) == tokens


def test_blocks_of_several_devices_count_as_one_block(make_config):
    specs = three_kinds_of_attention()
    config = make_config()
    config.parallel_config.decode_context_parallel_size = 64
    plan = MinWaste().hybrid_kv_unify_page_sizes(vllm_config=config, kv_cache_spec=specs)
    assert match_unit_of(plan) == 32


def test_the_longest_sequence_is_max_model_len_if_a_model_is_configured(make_config):
    assert longest_sequence(None) == LONGEST_SEQUENCE
    config = make_config()
    assert longest_sequence(config) == config.model_config.max_model_len
