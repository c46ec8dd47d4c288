# SPDX-License-Identifier: Apache-2.0
"""The page format uses every byte of a page once, and rejects unsupported sizes.

`test_cpu_quantise.py` checks that the kernels put every byte in the place that is defined here.
"""

import itertools

import pytest
import torch

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.k8v4 import Layout, PageFormat

FORMATS = [
    *itertools.product(k8v4.HEAD_SIZES, (16, 48), Layout),
    *((64, 2768, layout) for layout in Layout),
    (72, 1056, Layout.CPU_TILED),
    (256, 528, Layout.CPU_TILED),
]


@pytest.mark.parametrize(("head_size", "page_size", "layout"), FORMATS)
def test_four_planes_fill_the_region_and_no_byte_holds_two_tokens(
    head_size: int, page_size: int, layout: Layout
) -> None:
    page_format = PageFormat(head_size, page_size, layout)
    places = [(token, dim) for token in range(page_size) for dim in range(head_size)]
    keys = sorted(page_format.key_byte(*place) for place in places)
    assert keys == list(range(page_format.value_offset))
    token_of_byte: dict[int, int] = {}
    nibbles = set()
    for token, dim in places:
        byte, shift = page_format.value_byte(token, dim)
        assert token_of_byte.setdefault(byte, token) == token
        nibbles.add((byte, shift))
    plane = range(page_format.value_offset, page_format.key_scale_offset)
    assert nibbles == {(byte, shift) for byte in plane for shift in (0, 4)}
    assert page_format.key_scale_offset + 2 * page_size == page_format.value_scale_offset
    assert page_format.value_scale_offset + 2 * page_size == page_format.head_bytes
    assert page_format.head_bytes == page_size * k8v4.slot_bytes(head_size)
    assert page_format.key_scale_offset % 2 == page_format.value_scale_offset % 2 == 0


@pytest.mark.parametrize("head_size", k8v4.HEAD_SIZES)
def test_cpu_tiles_are_lines_of_four_dims_and_quads_of_four_tokens(head_size: int) -> None:
    page_format = PageFormat(head_size, 48, Layout.CPU_TILED)
    keys = torch.arange(48 * head_size).view(3, head_size // 4, 16, 4)
    tiles = page_format.value_offset + torch.arange(24 * head_size).view(3, 8 * head_size)
    # Chunks have 32 dims and the last one has the rest. In a tile, every dim takes 8 bytes.
    chunks = [min(32, head_size - first) for first in range(0, head_size, 32)]
    for token in range(48):
        tile, t = divmod(token, 16)
        starts = itertools.accumulate(chunks, initial=0)
        for first, dims in zip(starts, chunks, strict=False):
            quads = tiles[tile, 8 * first : 8 * (first + dims)].view(4, dims // 2, 4)
            for i in range(dims):
                key = keys[tile, (first + i) // 4, t, i % 4]
                assert page_format.key_byte(token, first + i) == key
                byte = quads[t // 4, i % (dims // 2), (0, 2, 1, 3)[t % 4]]
                place = (byte, 4 * (i // (dims // 2)))
                assert page_format.value_byte(token, first + i) == place
    assert page_format.key_sign_flip == 128
    assert PageFormat(head_size, 48, Layout.LINEAR).key_sign_flip == 0


@pytest.mark.parametrize("head_size", [*range(64, 257, 8), 512])
def test_a_slot_has_one_and_a_half_bytes_per_dim_and_two_fp16_numbers(head_size: int) -> None:
    assert k8v4.unsupported_head_size(head_size) is None
    assert k8v4.slot_bytes(head_size) == 1.5 * head_size + 4


@pytest.mark.parametrize(
    ("head_size", "page_size", "message"),
    [
        *(
            (size, 16, f"from 64 to 256 in multiples of 8, and 512, got {size}$")
            for size in (-64, 0, 8, 56, 63, 65, 68, 257, 264, 320, 511, 520, 1024)
        ),
        *(
            (64, size, f"positive multiple of 16 tokens, got {size}$")
            for size in (-16, 0, 1, 8, 17, 100)
        ),
    ],
)
@pytest.mark.parametrize("layout", Layout)
def test_an_unsupported_size_is_rejected_with_the_limits(
    head_size: int, page_size: int, message: str, layout: Layout
) -> None:
    with pytest.raises(ValueError, match=message):
        PageFormat(head_size, page_size, layout)
