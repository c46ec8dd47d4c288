# SPDX-License-Identifier: Apache-2.0
"""The page format uses every byte of a page once, and rejects unsupported sizes.

`test_cpu_quantise.py` compares the place of each byte with that of the kernels.
"""

import pytest

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.k8v4 import Layout, PageFormat

HEAD_SIZES = [64, 72, 80, 96, 112, 128, 160, 192, 256, 512]
FORMATS = [
    (head_size, page_size, layout)
    for head_size in HEAD_SIZES
    for page_size in (16, 48)
    for layout in (Layout.LINEAR, Layout.CPU_TILED)
    if layout is Layout.LINEAR or head_size % 32 == 0
] + [
    (64, 2768, Layout.CPU_TILED),
    (72, 2768, Layout.LINEAR),
    (80, 1056, Layout.LINEAR),
    (128, 784, Layout.CPU_TILED),
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
    plane = range(page_format.value_offset, page_format.scale_offset)
    assert nibbles == {(byte, shift) for byte in plane for shift in (0, 4)}
    assert page_format.scale_offset + 2 * page_size == page_format.zero_offset
    assert page_format.zero_offset + 2 * page_size == page_format.head_bytes
    assert page_format.head_bytes == page_size * k8v4.slot_bytes(head_size)
    assert page_format.scale_offset % 2 == page_format.zero_offset % 2 == 0


@pytest.mark.parametrize("head_size", [*range(64, 257, 8), 512])
def test_a_slot_has_one_and_a_half_bytes_per_dim_and_two_fp16_numbers(head_size: int) -> None:
    assert k8v4.unsupported_head_size(head_size) is None
    assert k8v4.slot_bytes(head_size) == 1.5 * head_size + 4
    assert (k8v4.cpu_layout(head_size) is Layout.CPU_TILED) == (head_size % 32 == 0)


@pytest.mark.parametrize(
    ("head_size", "page_size", "layout", "message"),
    [
        *(
            (size, 16, Layout.LINEAR, f"from 64 to 256 in multiples of 8, and 512, got {size}$")
            for size in (-64, 0, 8, 56, 63, 65, 68, 257, 264, 320, 511, 520, 1024)
        ),
        *(
            (64, size, Layout.LINEAR, f"positive multiple of 16 tokens, got {size}$")
            for size in (-16, 0, 1, 8, 17, 100)
        ),
        *(
            (size, 16, Layout.CPU_TILED, f"cpu_tiled needs .* multiple of 32, got {size}$")
            for size in (72, 80, 112, 248)
        ),
    ],
)
def test_an_unsupported_size_is_rejected_with_the_limits(
    head_size: int, page_size: int, layout: Layout, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PageFormat(head_size, page_size, layout)
