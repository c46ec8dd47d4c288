# SPDX-License-Identifier: Apache-2.0
"""Storing quantised tokens in pages and reading them back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.k8v4 import Layout, PageFormat
from vllm_hybrid_kv.kernels.reference import Quantised, dequantise, load, quantise, rotate, store

UNTOUCHED = 0xA5

FORMATS = [
    (64, Layout.LINEAR),
    (64, Layout.CPU_TILED),
    (72, Layout.LINEAR),
    (96, Layout.CPU_TILED),
    (128, Layout.CPU_TILED),
    (256, Layout.LINEAR),
]


def random_tokens(count: int, heads: int, head_size: int, seed: int = 0) -> Quantised:
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, count, heads, head_size, generator=generator)
    return quantise(key * 3, value)


def pages(blocks: int, heads: int, page_size: int, head_size: int) -> torch.Tensor:
    shape = (blocks, heads, page_size, k8v4.slot_bytes(head_size))
    return torch.full(shape, UNTOUCHED, dtype=torch.uint8)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.sampled_from([16, 32, 48, 112]),
    st.integers(1, 3),
    st.integers(0, 2**31),
)
def test_stored_tokens_are_loaded_from_their_slots(
    kind: tuple[int, Layout], page_size: int, heads: int, seed: int
) -> None:
    head_size, layout = kind
    cache = pages(3, heads, page_size, head_size)
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 3 * page_size, (), generator=generator))
    slots = torch.randperm(3 * page_size, generator=generator)[:count]
    tokens = random_tokens(count, heads, head_size, seed)
    store(tokens, cache, slots, layout)
    loaded = load(cache, head_size, layout)
    for read, expected in zip(loaded, tokens, strict=True):
        assert torch.equal(read[slots], expected)


@pytest.mark.parametrize(("head_size", "layout"), FORMATS)
def test_each_key_and_value_is_in_the_byte_that_the_format_defines(
    head_size: int, layout: Layout
) -> None:
    page_format = PageFormat(head_size, 32, layout)
    tokens = random_tokens(1, 1, head_size)
    for slot in (0, 5, 31):
        cache = pages(1, 1, 32, head_size)
        store(tokens, cache, torch.tensor([slot]), layout)
        region = cache.flatten()
        for dim in range(head_size):
            assert region[page_format.key_byte(slot, dim)] == tokens.key_codes[0, 0, dim]
            byte, shift = page_format.value_byte(slot, dim)
            assert region[byte] >> shift & 15 == tokens.value_codes[0, 0, dim]
        for offset, number in (
            (page_format.scale_offset, tokens.scale),
            (page_format.zero_offset, tokens.zero),
        ):
            two_bytes = region[offset + 2 * slot : offset + 2 * slot + 2]
            assert torch.equal(two_bytes.view(torch.float16), number[0])


@pytest.mark.parametrize(("head_size", "layout"), FORMATS)
def test_a_token_changes_its_own_bytes_only(head_size: int, layout: Layout) -> None:
    heads, slot = 2, 21
    page_format = PageFormat(head_size, 16, layout)
    tokens = random_tokens(3, heads, head_size)
    before, cache = pages(2, heads, 16, head_size), pages(2, heads, 16, head_size)
    before.random_(generator=torch.Generator().manual_seed(1))
    cache.copy_(before)
    store(tokens, cache, torch.tensor([-1, slot, -1]), layout)
    t = slot % 16
    own = {page_format.key_byte(t, d) for d in range(head_size)}
    own |= {page_format.value_byte(t, d)[0] for d in range(head_size)}
    own |= {page_format.scale_offset + 2 * t + i for i in range(2)}
    own |= {page_format.zero_offset + 2 * t + i for i in range(2)}
    others = torch.ones(page_format.head_bytes, dtype=torch.bool)
    others[list(own)] = False
    assert len(own) == k8v4.slot_bytes(head_size)
    assert torch.equal(cache[0], before[0])
    assert torch.equal(cache[1].flatten(1)[:, others], before[1].flatten(1)[:, others])
    assert torch.equal(load(cache, head_size, layout).scale[slot], tokens.scale[1])


def test_dequantised_values_are_code_times_scale_plus_zero_rotated_back() -> None:
    codes = torch.arange(16, dtype=torch.uint8).reshape(1, 1, 16)
    scale = torch.tensor([[0.25]], dtype=torch.float16)
    zero = torch.tensor([[-3.5]], dtype=torch.float16)
    _, value = dequantise(Quantised(codes, codes, scale, zero))
    # The rotation of numbers with few bits is exact.
    assert rotate(value).flatten().tolist() == [0.25 * code - 3.5 for code in range(16)]
    half_sum = sum(0.25 * code - 3.5 for code in (0, 1, 2, 3)) / 2
    one_stage = [half_sum - (0.25 * code - 3.5) for code in (0, 1, 2, 3)]
    _, value = dequantise(Quantised(codes[..., :4], codes[..., :4], scale, zero))
    assert value.flatten().tolist() == one_stage
