# SPDX-License-Identifier: Apache-2.0
"""The reference stores quantised tokens in pages and reads them back."""

import itertools

import pytest
import torch

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.k8v4 import Layout, PageFormat
from vllm_hybrid_kv.kernels.reference import load, quantise, store

FORMATS = [*itertools.product((64, 72, 112, 128, 512), Layout)]


@pytest.mark.parametrize(("head_size", "layout"), FORMATS)
@pytest.mark.parametrize("page_size", [16, 48, 112])
def test_tokens_fill_the_bytes_that_the_format_defines_and_no_others(
    head_size: int, layout: Layout, page_size: int
) -> None:
    generator = torch.Generator().manual_seed(page_size)
    page_format = PageFormat(head_size, page_size, layout)
    slots = torch.randperm(3 * page_size, generator=generator)[: page_size + 5]
    slots[::6] = -1
    key, value = torch.randn(2, len(slots), 2, head_size, generator=generator)
    tokens = quantise(key * 3, value)
    cache = torch.empty(3, 2, page_size, k8v4.slot_bytes(head_size), dtype=torch.uint8)
    cache.random_(generator=generator)
    expected = cache.clone().flatten(2)
    for slot, key_codes, value_codes, *scales in zip(slots.tolist(), *tokens, strict=True):
        if slot < 0:
            continue
        region, t = expected[slot // page_size], slot % page_size
        for dim in range(head_size):
            code = key_codes[:, dim].to(torch.int16) & 255
            region[:, page_format.key_byte(t, dim)] = code ^ page_format.key_sign_flip
            byte, shift = page_format.value_byte(t, dim)
            region[:, byte] &= 0xF0 >> shift
            region[:, byte] |= value_codes[:, dim] << shift
        offsets = (page_format.key_scale_offset, page_format.value_scale_offset)
        for offset, scale in zip(offsets, scales, strict=True):
            region[:, offset + 2 * t : offset + 2 * t + 2] = scale[:, None].view(torch.uint8)
    store(tokens, cache, slots, layout)
    assert torch.equal(cache.flatten(2), expected)
    for read, stored in zip(load(cache, head_size, layout), tokens, strict=True):
        assert torch.equal(read[slots[slots >= 0]], stored[slots >= 0])
