# SPDX-License-Identifier: Apache-2.0
"""Test the strategy `lcm`, and the check of the page sizes that any strategy returns."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.kv_cache_interface import MambaSpec, SlidingWindowSpec

from tests.planning.layers import attention, mla, named, pages, shapes, state
from vllm_hybrid_kv.errors import HybridKVStrategyError
from vllm_hybrid_kv.planning.lcm import unify_by_lcm
from vllm_hybrid_kv.planning.page_sizes import check_page_sizes


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        # A state is padded to a multiple of the attention page.
        ([attention(), state(12_648_448)], [(16_304, None), (16, 12_651_904)]),
        # A page that divides the largest one is scaled without padding. The largest is unchanged.
        (
            [attention(16), attention(48, cls=SlidingWindowSpec, sliding_window=512)],
            [(48, None)] * 2,
        ),
        # The padding of a padded page is scaled with its block.
        ([attention(16, page_size_padded=12_500), state(25_000)], [(32, 25_000), (16, None)]),
        # If attention has the largest page, its page is padded.
        ([attention(16), attention(16, slot=1_000)], [(48, None), (16, 3 * 12_416)]),
    ],
)
def test_lcm_scales_or_pads_layers_to_a_common_multiple(layers, expected):
    unified = unify_by_lcm(named(layers))
    assert shapes(unified) == expected
    assert len(set(pages(unified).values())) == 1


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


@pytest.mark.parametrize(("answer", "message"), [
    ({A: attention(32), B: attention(16)}, "equal: layer .* has 12,416 bytes, layer .* has 24,"),
    ({A: attention(8), B: attention(8)},
        f"not shrink layer {A}: .* 12,416 bytes for 16 tokens, got 6,208 bytes for 8 tokens"),
    ({A: attention(16, 40), B: attention(16, 40)},
        f"not shrink layer {A}: .* got 1,280 bytes for 16 tokens"),
    ({A: attention(32, page_size_padded=12_417), B: attention(16)},
        f"not shrink layer {A}: .* got 12,417 bytes for 32 tokens"),
    ({A: "a spec", B: attention(16)}, f"must return a KVCacheSpec for layer {A}, got 'a spec'"),
    ({**BEFORE, "model.layers.2.attn": attention(16)}, r"model\.layers\.2\.attn is missing or"),
    ({B: attention(16)}, f"{A} is missing or is not a layer of the model"),
    (list(BEFORE.values()), "must return a dict of specs"),
])  # fmt: skip
def test_an_answer_that_breaks_a_rule_is_refused_by_layer_and_number(answer, message):
    with pytest.raises(HybridKVStrategyError, match=f"^strategy 'odd'.*{message}"):
        check_page_sizes(BEFORE, answer, "strategy 'odd'")


def test_an_answer_may_drop_padding():
    before = {"state": state(1_000, page_size_padded=12_416), "attention": attention(1)}
    after = {"state": replace(before["state"], page_size_padded=1_552), "attention": attention(2)}
    check_page_sizes(before, after, "strategy 'odd'")
