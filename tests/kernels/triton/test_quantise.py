# SPDX-License-Identifier: Apache-2.0
"""Run by Triton's interpreter, the kernel writes exactly the bytes that the reference writes."""

from __future__ import annotations

import pytest
import torch

from testing.triton.processes import interpreted
from testing.triton.store import (
    UNWRITTEN,
    differing_bytes,
    pages,
    random_rows,
    rows_of_all_numbers,
    special_rows,
)
from vllm_hybrid_kv.kernels import k8v4, reference
from vllm_hybrid_kv.kernels.k8v4 import Layout
from vllm_hybrid_kv.kernels.triton import quantise_and_store

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [64, 72, 80, 96, 112, 128, 160, 192, 248, 256, 512])
@interpreted
def test_every_head_size_and_dtype_equals_the_reference(
    head_size: int, dtype: torch.dtype
) -> None:  # fmt: skip
    key, value = random_rows(37, 3, head_size, dtype)
    assert differing_bytes(key, value, torch.randperm(64)[:37]) == 0


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("head_size", [64, 256])
@interpreted
def test_every_16_bit_number_equals_the_reference(head_size: int, dtype: torch.dtype) -> None:
    key, value = rows_of_all_numbers(head_size, dtype)
    if dtype is torch.bfloat16:
        # Triton's interpreter converts 254 of bf16's denormals to wrong float32 numbers.
        value = value.masked_fill(value.abs() < torch.finfo(dtype).smallest_normal, 0.0)
    assert differing_bytes(key, value, torch.arange(len(key))) == 0


@interpreted
def test_codes_at_every_rounding_boundary_equal_the_reference() -> None:
    """The rows have numbers exactly halfway between two codes, and slightly below and above.

    With 64 dims and scales of 1, rotating these rows is exact in float32.
    """

    def rows(middles: torch.Tensor, largest: float) -> torch.Tensor:
        near = torch.cat([middles, middles - 2.0**-10, middles + 2.0**-10])
        near = torch.cat([near, near.new_zeros(-len(near) % 63)]).view(-1, 63)
        return torch.cat([near, torch.full((len(near), 1), largest)], dim=1)

    wanted_keys = rows(torch.arange(-126.5, 127.0), 127.0)
    wanted_values = rows(torch.arange(-7.0, 8.0), 8.0).repeat(len(wanted_keys), 1)
    wanted_values = wanted_values[: len(wanted_keys)]
    key, value = (reference.rotate(x)[:, None] for x in (wanted_keys, wanted_values))
    quantised = reference.quantise(key, value)
    assert torch.equal(quantised.key_codes[:, 0].float(), wanted_keys.round())
    assert torch.equal(
        quantised.value_codes[:, 0].float(), (wanted_values + 7.5).round().clamp(max=15)
    )
    assert differing_bytes(key, value, torch.arange(len(key))) == 0


@pytest.mark.parametrize("page_size", [16, 48, 528, 2768])
@interpreted
def test_every_page_size_and_padding_of_blocks_equals_the_reference(page_size: int) -> None:
    key, value = random_rows(50, 2, 80, torch.bfloat16)
    slots = torch.randperm(3 * page_size)[:50]
    for padding in (0, 16, 34):
        assert differing_bytes(key, value, slots, page_size, padding) == 0


@pytest.mark.parametrize("heads", [1, 2, 5, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 70])
@interpreted
def test_any_number_of_tokens_and_heads_equals_the_reference(count: int, heads: int) -> None:
    key, value = random_rows(count, heads, 64, torch.bfloat16)
    assert differing_bytes(key, value, torch.arange(count)) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@interpreted
def test_nan_infinity_and_constant_rows_equal_the_reference(dtype: torch.dtype) -> None:
    key, value = special_rows(72, dtype)
    assert differing_bytes(key, value, torch.arange(len(key))) == 0


@interpreted
def test_negative_slots_and_tokens_after_the_slot_mapping_are_not_written() -> None:
    key, value = random_rows(40, 2, 64, torch.bfloat16)
    slots = torch.arange(19)
    slots[::4] = -1
    for some in (slots, torch.full((6,), -1), slots[:0]):
        assert differing_bytes(key, value, some) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [80, 128])
@interpreted
def test_rows_with_any_strides_equal_the_reference(head_size: int, dtype: torch.dtype) -> None:
    tokens, heads = 21, 2
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(tokens, 7 * heads * head_size, generator=generator).to(dtype)
    parts = fused.view(tokens, 7, heads, head_size)
    transposed = torch.randn(2, heads, head_size, tokens, generator=generator).to(dtype)
    shared = torch.randn(2, tokens, 1, head_size, generator=generator).to(dtype)
    slots = torch.arange(tokens).repeat_interleave(2)[::2]
    for key, value in (
        (parts[:, 3], parts[:, 4]),
        transposed.permute(0, 3, 1, 2),
        shared.expand(2, tokens, heads, head_size),
        (parts[:, 3].contiguous(), parts[:, 6]),
    ):
        assert differing_bytes(key, value, slots) == 0


@interpreted
def test_offsets_beyond_two_gigabytes_are_written() -> None:
    head_size, heads, page_size, stride = 64, 2, 16, 2**30 + 4096
    slot = k8v4.slot_bytes(head_size)
    # The OS only allocates the memory pages that are written.
    memory = torch.empty(4 * stride, dtype=torch.uint8)
    cache = memory.as_strided((4, heads, page_size, slot), (stride, page_size * slot, slot, 1))
    cache.fill_(UNWRITTEN)
    key, value = random_rows(14, heads, head_size, torch.bfloat16)
    slots = torch.cat([torch.arange(3 * page_size + 5, 4 * page_size), torch.tensor([2, 37, -1])])
    _, expected = pages(4, heads, page_size, head_size)
    reference.store(reference.quantise(key, value), expected, slots, Layout.LINEAR)
    quantise_and_store(key, value, cache, slots)
    assert torch.equal(cache, expected)


@interpreted
def test_wrong_slots_and_odd_strides_write_nothing() -> None:
    memory = torch.zeros(3, 3201, dtype=torch.uint8)
    odd, cache = memory[:, :3200].view(3, 2, 16, 100), memory.new_zeros(3, 2, 16, 100)
    rows = torch.ones(2, 2, 64)
    past, twice, right = (torch.tensor(slots) for slots in ((48, 10**12), (7, 7), (0, 1)))
    quantise_and_store(rows, rows, cache, past)
    for blocks, slots, message in (
        (cache, past, f"slot {10**12}, which is past the end of the cache, 3 blocks of 16 "),
        (cache, twice, "slot_mapping names slot 7 twice"),
        (odd, right, "an even number of bytes between blocks, got .* strides .3201"),
    ):
        with pytest.raises(ValueError, match=message):
            quantise_and_store(rows, rows, blocks, slots, debug=True)
        assert not blocks.any()
