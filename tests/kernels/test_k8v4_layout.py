# SPDX-License-Identifier: Apache-2.0
"""The page format uses every byte of a page once, and rejects unsupported sizes."""

import pytest

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.k8v4 import Layout, PageFormat

HEAD_SIZES = [64, 72, 80, 96, 112, 128, 160, 192, 256, 512]


def layouts_of(head_size: int) -> list[Layout]:
    return [Layout.LINEAR] + [Layout.CPU_TILED] * (head_size % 32 == 0)


FORMATS = [
    PageFormat(head_size, page_size, layout)
    for head_size in HEAD_SIZES
    for page_size in (16, 48)
    for layout in layouts_of(head_size)
] + [
    PageFormat(64, 2768, Layout.CPU_TILED),
    PageFormat(72, 2768, Layout.LINEAR),
    PageFormat(80, 1056, Layout.LINEAR),
    PageFormat(128, 784, Layout.CPU_TILED),
    PageFormat(256, 528, Layout.CPU_TILED),
]


def name(page_format: PageFormat) -> str:
    return f"{page_format.layout.value}-{page_format.head_size}x{page_format.page_size}"


@pytest.mark.parametrize("page_format", FORMATS, ids=name)
def test_every_byte_of_the_key_plane_holds_one_key(page_format: PageFormat) -> None:
    tokens, dims = range(page_format.page_size), range(page_format.head_size)
    used = sorted(page_format.key_byte(t, d) for t in tokens for d in dims)
    assert used == list(range(page_format.value_offset))


@pytest.mark.parametrize("page_format", FORMATS, ids=name)
def test_every_nibble_holds_one_value_and_no_byte_holds_two_tokens(page_format: PageFormat) -> None:
    tokens, dims = range(page_format.page_size), range(page_format.head_size)
    token_of_byte: dict[int, int] = {}
    nibbles = set()
    for t in tokens:
        for d in dims:
            byte, shift = page_format.value_byte(t, d)
            assert token_of_byte.setdefault(byte, t) == t
            nibbles.add((byte, shift))
    plane = range(page_format.value_offset, page_format.scale_offset)
    assert nibbles == {(byte, shift) for byte in plane for shift in (0, 4)}


@pytest.mark.parametrize("page_format", FORMATS, ids=name)
def test_the_four_planes_fill_the_region_and_fp16_numbers_are_aligned(
    page_format: PageFormat,
) -> None:
    page_size = page_format.page_size
    assert page_format.scale_offset + 2 * page_size == page_format.zero_offset
    assert page_format.zero_offset + 2 * page_size == page_format.head_bytes
    assert page_format.head_bytes == page_size * k8v4.slot_bytes(page_format.head_size)
    assert page_format.scale_offset % 2 == page_format.zero_offset % 2 == 0


@pytest.mark.parametrize("head_size", [64, 72, 128])
def test_a_linear_token_is_contiguous_with_even_dims_in_the_low_nibbles(head_size: int) -> None:
    page_format = PageFormat(head_size, 32, Layout.LINEAR)
    for token in (0, 1, 31):
        keys = [page_format.key_byte(token, dim) for dim in range(head_size)]
        assert keys == [token * head_size + dim for dim in range(head_size)]
        values = [page_format.value_byte(token, dim) for dim in range(head_size)]
        first = 32 * head_size + token * head_size // 2
        assert values == [(first + dim // 2, 4 * (dim % 2)) for dim in range(head_size)]


@pytest.mark.parametrize("head_size", [64, 96, 256])
def test_the_halves_of_16_byte_lanes_are_a_dim_pair_of_sixteen_tokens(head_size: int) -> None:
    page_format = PageFormat(head_size, 32, Layout.CPU_TILED)
    holder = {page_format.key_byte(t, d): (t, d) for t in range(32) for d in range(head_size)}
    for tile in range(2):
        for pair in range(head_size // 2):
            line = 16 * head_size * tile + 64 * (pair // 2)
            half = [line + 16 * lane + 8 * (pair % 2) + i for lane in range(4) for i in range(8)]
            assert [holder[byte] for byte in half] == [
                (16 * tile + token, 2 * pair + odd) for token in range(16) for odd in range(2)
            ]


@pytest.mark.parametrize("head_size", [64, 160, 256])
def test_shifted_words_of_a_quad_are_pairs_of_neighbouring_tokens(head_size: int) -> None:
    page_format = PageFormat(head_size, 32, Layout.CPU_TILED)
    holder = {page_format.value_byte(t, d): (t, d) for t in range(32) for d in range(head_size)}
    for quad in range(8):
        for chunk in range(head_size // 32):
            quad_start = (quad // 4) * 8 * head_size + 256 * chunk + 64 * (quad % 4)
            for i in range(16):
                for shift, first_token, dim in (
                    (0, 0, 32 * chunk + i),
                    (4, 0, 32 * chunk + 16 + i),
                    (8, 2, 32 * chunk + i),
                    (12, 2, 32 * chunk + 16 + i),
                ):
                    for word in range(2):  # neighbours 2i and 2i + 1
                        byte = page_format.value_offset + quad_start + 4 * i + 2 * word
                        token, held_dim = holder[byte + shift // 8, shift % 8]
                        assert (token, held_dim) == (4 * quad + first_token + word, dim)


@pytest.mark.parametrize(("head_size", "expected"), [(64, 100), (128, 196), (256, 388), (512, 772)])
def test_a_slot_has_one_and_a_half_bytes_per_dim_and_two_fp16_numbers(
    head_size: int, expected: int
) -> None:
    assert k8v4.slot_bytes(head_size) == expected


@pytest.mark.parametrize("head_size", [-64, 0, 8, 56, 63, 65, 68, 257, 264, 320, 511, 520, 1024])
def test_an_unsupported_head_size_is_rejected_with_the_limits(head_size: int) -> None:
    with pytest.raises(
        ValueError, match=f"from 64 to 256 in multiples of 8, and 512, got {head_size}$"
    ):
        k8v4.slot_bytes(head_size)
    with pytest.raises(ValueError, match=f"got {head_size}$"):
        PageFormat(head_size, 16, Layout.LINEAR)


@pytest.mark.parametrize("head_size", [*range(64, 257, 8), 512])
def test_a_supported_head_size_is_accepted(head_size: int) -> None:
    assert k8v4.unsupported_head_size(head_size) is None
    assert PageFormat(head_size, 16, k8v4.cpu_layout(head_size)).head_bytes > 0


@pytest.mark.parametrize("page_size", [-16, 0, 1, 8, 17, 100])
def test_a_page_size_that_is_not_a_multiple_of_16_is_rejected(page_size: int) -> None:
    with pytest.raises(ValueError, match=f"positive multiple of 16 tokens, got {page_size}$"):
        PageFormat(64, page_size, Layout.LINEAR)


@pytest.mark.parametrize("head_size", [72, 80, 112, 248])
def test_the_tiled_layout_rejects_a_head_size_that_is_not_a_multiple_of_32(head_size: int) -> None:
    assert k8v4.cpu_layout(head_size) is Layout.LINEAR
    with pytest.raises(ValueError, match=f"cpu_tiled needs .* multiple of 32, got {head_size}$"):
        PageFormat(head_size, 16, Layout.CPU_TILED)
