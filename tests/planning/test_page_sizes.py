# SPDX-License-Identifier: Apache-2.0
"""The strategy `lcm`, and the check of any strategy's page sizes."""

import logging
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.kv_cache_interface import MambaSpec, SlidingWindowSpec

from tests.planning.layers import attention, mla, pages, state
from vllm_hybrid_kv.errors import HybridKVStrategyError
from vllm_hybrid_kv.planning.lcm import unify_by_lcm
from vllm_hybrid_kv.planning.page_sizes import check_page_sizes


def test_a_large_state_is_padded_to_a_multiple_of_the_attention_page(log):
    specs = {"attention": attention(), "state": state(12_648_448)}
    assert pages(specs) == {"attention": 12_416, "state": 12_648_448}
    unified = unify_by_lcm(specs)
    assert pages(unified) == {"attention": 12_651_904, "state": 12_651_904}
    assert unified["attention"].block_size == 16_304
    assert unified["attention"].page_size_padded is None
    assert unified["state"].block_size == 16
    assert log.lines(logging.INFO) == [
        "lcm: pages of 1 layers padded from 12,648,448 to 12,651,904 bytes (0.03 %)"
    ]


def test_pages_that_divide_the_largest_are_only_scaled(log):
    specs = {
        "k8v4": attention(16),
        "window": attention(48, cls=SlidingWindowSpec, sliding_window=512),
    }
    unified = unify_by_lcm(specs)
    assert unified["k8v4"] == replace(specs["k8v4"], block_size=48)
    assert unified["window"] is specs["window"]
    assert log.lines(logging.INFO) == []


def test_equal_pages_are_unchanged():
    specs = {"a": attention(), "b": attention()}
    assert unify_by_lcm(specs) == specs


def test_a_smaller_state_is_padded_and_does_not_affect_the_multiple():
    specs = {"attention": attention(64), "small": state(1_000), "tiny": state(7)}
    unified = unify_by_lcm(specs)
    assert set(pages(unified).values()) == {64 * 776}
    assert unified["attention"] is specs["attention"]


def test_the_padding_of_a_padded_page_is_scaled_with_its_block():
    specs = {"padded": attention(16, page_size_padded=12_500), "state": state(25_000)}
    unified = unify_by_lcm(specs)
    assert unified["padded"] == replace(specs["padded"], block_size=32, page_size_padded=25_000)


def test_attention_with_the_largest_page_is_padded():
    specs = {"small": attention(16), "large": attention(16, slot=1_000)}
    unified = unify_by_lcm(specs)
    assert set(pages(unified).values()) == {3 * 12_416}
    assert unified["small"].block_size == 48
    assert unified["large"] == replace(specs["large"], page_size_padded=3 * 12_416)


def test_layers_that_lcm_cannot_unify_are_reported_with_sizes_and_advice():
    specs = {"mla.0": mla(), "mla.1": mla(), "small": attention(16, slot=100)}
    with pytest.raises(NotImplementedError) as error:
        unify_by_lcm(specs)
    assert str(error.value) == (
        "lcm: layer mla.0 and 1 more (MLAAttentionSpec) has a page of 73,728 bytes for 64 tokens, "
        "which can be neither scaled nor padded to the 76,800 bytes that the other layers' pages "
        "divide; set unify_page_sizes=min_waste, which tries other sizes, or another "
        "--block-size"
    )


page_specs = st.one_of(
    st.builds(
        attention,
        block_size=st.integers(1, 64).map(lambda n: 16 * n),
        slot=st.sampled_from([100, 196, 256, 388, 1_024]),
        kv_heads=st.integers(1, 4),
    ),
    st.builds(state, page=st.integers(1, 1 << 22), block_size=st.sampled_from([16, 528, 2_768])),
)


@given(st.lists(page_specs, min_size=1, max_size=6))
def test_pages_become_equal_and_nothing_shrinks(specs):
    before = {f"layer.{index}": spec for index, spec in enumerate(specs)}
    after = unify_by_lcm(before)
    check_page_sizes(before, after, "lcm")
    assert list(after) == list(before)
    largest = max(pages(before).values())
    growing = [s.page_size_bytes for s in specs if not isinstance(s, MambaSpec)]
    multiple = math.lcm(*(page for page in growing if page < largest))
    (page,) = set(pages(after).values())
    assert page % multiple == 0
    assert page - largest < multiple
    for name, spec in before.items():
        if not isinstance(spec, MambaSpec) and spec.page_size_bytes < largest:
            assert after[name].page_size_padded is None


BEFORE = {"model.layers.0.attn": attention(16), "model.layers.1.attn": attention(16)}
A, B = BEFORE


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({A: attention(32)}, r"equal: layer \S+ has (12,416|24,832) bytes, layer \S+ has"),
        ({A: attention(8), B: attention(8)}, f"block of layer {A} from 16 to 8 tokens"),
        ({A: attention(16, 40), B: attention(16, 40)}, f"page of layer {A} from 12,416 to 1,280"),
        ({A: attention(16, page_size_padded=99)}, f"page of layer {A} to 99 bytes, less than"),
        ({A: "a spec"}, f"layer {A} 'a spec', which is not a KVCacheSpec"),
        ({"model.layers.2.attn": attention(16)}, "added layer model.layers.2.attn"),
    ],
)
def test_an_answer_that_breaks_a_rule_is_refused_by_layer_and_number(changed, message):
    with pytest.raises(HybridKVStrategyError, match=f"^strategy 'odd'.*{message}"):
        check_page_sizes(BEFORE, {**BEFORE, **changed}, "strategy 'odd'")


def test_an_answer_may_drop_padding():
    before = {"state": state(1_000, page_size_padded=12_416), "attention": attention(1)}
    after = {"state": replace(before["state"], page_size_padded=1_552), "attention": attention(2)}
    check_page_sizes(before, after, "strategy 'odd'")


def test_an_answer_without_a_layer_is_refused():
    with pytest.raises(HybridKVStrategyError, match=f"strategy 'odd' left out layer {A}"):
        check_page_sizes(BEFORE, {B: BEFORE[B]}, "strategy 'odd'")


def test_an_answer_that_is_no_dict_is_refused():
    with pytest.raises(HybridKVStrategyError, match="must return a dict of specs"):
        check_page_sizes(BEFORE, list(BEFORE.values()), "strategy 'odd'")
