# SPDX-License-Identifier: Apache-2.0
"""The k8v4 page format: fp8 (e4m3fn) keys and 4-bit values. The single source of truth.

A page holds one kernel block of `N` tokens of one layer, one region after another for each KV
head. In every layout, a region is `N * slot_bytes(D)` bytes long and made of four planes:

    keys [N * D]  |  values [N * D/2]  |  scale [N] fp16  |  zero [N] fp16

A key byte is the e4m3fn code of the key clamped to +-448. Values are rotated among the dims of a
head and then stored as 4-bit codes, `v = rotate(code * scale + zero)`; see `rotation_strides`. A
layout places a token's bytes inside their planes. One byte never holds bits of two tokens, so that
writing a token is never a read-modify-write.

Bytes per token and head: D + D/2 + 4 (196 at D = 128, 772 at D = 512). A slot of vLLM's own
TurboQuant k8v4 has as many, so that both lead to the same memory plan.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

FORMAT_VERSION = 1
"""Raised with every change that gives the same bytes another meaning."""

KEY_MAX = 448.0
"""Largest finite e4m3fn number; keys are clamped to it, infinities included."""

VALUE_MAX = 65504.0
"""Largest finite fp16 number; values are clamped to it, infinities included."""

VALUE_LEVELS = 16
"""Number of value codes: 0 to 15."""

MIDDLE_VALUE_CODE = (VALUE_LEVELS - 1) / 2

NAN_SCALE_BITS = 0x7E00
"""The fp16 scale of a token whose key or value held a NaN."""

TILE_TOKENS = 16
"""Tokens of a tile of `Layout.CPU_TILED`; every page size is a multiple of it."""

HEAD_SIZES = (*range(64, 257, 8), 512)
"""The supported numbers of dims of a head."""

MAX_HEAD_SIZE = HEAD_SIZES[-1]


class Layout(enum.Enum):
    """The places of a token's bytes inside the key and value planes of a page.

    `LINEAR`: a token's bytes are contiguous. Key (t, d) is byte `t * D + d`. Value (t, d) is in
    byte `t * D/2 + d // 2`, even dims in the low nibble. For every head size.

    `CPU_TILED`: tiles of 16 tokens, one after another, for the dot product and tile instructions
    of CPUs, which multiply pairs of neighbours. For head sizes that are a multiple of 32.

    * keys: a tile is `[D/4, 4, 2, 4, 2]`: four dims in 64 bytes, and in them quad of tokens,
      dim pair, token of the quad, dim of the pair. Widening to bf16 interleaves lower and upper
      bytes within 16 bytes: then the lower halves of a line are its first dim pair for tokens 0
      to 15, and the upper halves its second. Sixteen dim pairs are one operand of AMX.
    * values: a tile is `[D/32, 4, 64]`: chunks of 32 dims, four quads of four tokens. The 64
      bytes of a quad are `[16, 4]`: dim `i` of the chunk's first half in the low nibble and
      `16 + i` in the high one, tokens in the order 0, 2, 1, 3. In 16-bit words, shifts of 0, 4,
      8, 12 bits select pairs of neighbouring tokens: (0, 1) of the low dims, (0, 1) of the high
      dims, (2, 3) of the low, (2, 3) of the high.
    """

    LINEAR = "linear"
    CPU_TILED = "cpu_tiled"


QUAD_BYTE_OF_TOKEN = (0, 2, 1, 3)
"""Byte of token `t % 4` inside the four bytes of one dim of a `CPU_TILED` quad."""


def slot_bytes(head_size: int) -> int:
    """Return the bytes of one token of one KV head, `D + D/2 + 4`.

    Raises:
        ValueError: The format does not support the head size.
    """
    reason = unsupported_head_size(head_size)
    if reason is not None:
        raise ValueError(reason)
    return head_size + head_size // 2 + 4


def unsupported_head_size(head_size: int) -> str | None:
    """Return why a head size is not supported, or None if it is."""
    if head_size in HEAD_SIZES:
        return None
    return f"k8v4 stores head sizes from 64 to 256 in multiples of 8, and 512, got {head_size}"


def rotation_strides(head_size: int) -> tuple[int, ...]:
    """Return the strides of the stages that rotate a head's values: powers of four from 1 on.

    The last stride s is the largest with `head_size` a multiple of 4 s. The stage of stride s takes
    the dims `d, d + s, d + 2 s, d + 3 s` of each aligned run of 4 s, and each of the four becomes
    half of their sum minus itself. A stage is its own inverse, stages commute, and equal values
    stay unchanged.
    """
    strides, stride = [], 1
    while head_size % (4 * stride) == 0:
        strides.append(stride)
        stride *= 4
    return tuple(strides)


def cpu_layout(head_size: int) -> Layout:
    """Return the layout of CPU pages of this head size."""
    return Layout.CPU_TILED if head_size % 32 == 0 else Layout.LINEAR


@dataclass(frozen=True)
class PageFormat:
    """Sizes and offsets of one KV head's region of a page, in bytes from the region's start.

    Attributes:
        head_size: D, dims of a head.
        page_size: N, tokens of a page; a multiple of 16.
        layout: The arrangement inside the planes.
    """

    head_size: int
    page_size: int
    layout: Layout

    def __post_init__(self) -> None:
        slot_bytes(self.head_size)
        if self.page_size <= 0 or self.page_size % TILE_TOKENS:
            raise ValueError(
                f"a k8v4 page holds a positive multiple of {TILE_TOKENS} tokens, "
                f"got {self.page_size}"
            )
        if self.layout is Layout.CPU_TILED and self.head_size % 32:
            raise ValueError(
                f"the layout {self.layout.value} needs a head size that is a multiple of 32, "
                f"got {self.head_size}"
            )

    @property
    def head_bytes(self) -> int:
        """Bytes of one KV head's region: `N * slot_bytes(D)`."""
        return self.page_size * slot_bytes(self.head_size)

    @property
    def value_offset(self) -> int:
        """Start of the value plane; keys start at 0."""
        return self.page_size * self.head_size

    @property
    def scale_offset(self) -> int:
        """Start of the fp16 scales."""
        return self.value_offset + self.page_size * self.head_size // 2

    @property
    def zero_offset(self) -> int:
        """Start of the fp16 zeros."""
        return self.scale_offset + 2 * self.page_size

    def key_byte(self, token: int, dim: int) -> int:
        """Return the byte of key (token, dim)."""
        if self.layout is Layout.LINEAR:
            return token * self.head_size + dim
        tile, t = divmod(token, TILE_TOKENS)
        quad, of_quad = divmod(t, 4)
        line, rest = divmod(dim, 4)
        pair, odd = divmod(rest, 2)
        byte = TILE_TOKENS * self.head_size * tile + 64 * line + 16 * quad + 8 * pair
        return byte + 2 * of_quad + odd

    def value_byte(self, token: int, dim: int) -> tuple[int, int]:
        """Return the byte of value (token, dim) and the shift of its nibble, 0 or 4."""
        half = self.head_size // 2
        if self.layout is Layout.LINEAR:
            return self.value_offset + token * half + dim // 2, 4 * (dim % 2)
        tile, t = divmod(token, TILE_TOKENS)
        chunk, rest = divmod(dim, 32)
        high, i = divmod(rest, 16)
        quad, of_quad = divmod(t, 4)
        byte = TILE_TOKENS * half * tile + 256 * chunk + 64 * quad + 4 * i
        return self.value_offset + byte + QUAD_BYTE_OF_TOKEN[of_quad], 4 * high
