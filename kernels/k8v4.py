# SPDX-License-Identifier: Apache-2.0
"""The k8v4 page format: 8-bit keys and 4-bit values. The single source of truth.

A page holds one kernel block (`N` tokens) of one layer, in one region per KV head. In every
layout, a region is `N * slot_bytes(D)` bytes long and consists of four planes:

    keys [N * D]  |  values [N * D/2]  |  key scales [N] fp16  |  value scales [N] fp16

Each key and value is rotated (see `rotation_stages`) before it is rounded to codes. To decode:

    key = rotate(code * key_scale), code from -127 to 127
    value = rotate((code - 7.5) * value_scale), code from 0 to 15

A layout places a token's bytes inside their planes. One byte never holds bits of two tokens, so
that writing a token is never a read-modify-write.

Bytes per token and head: D + D/2 + 4 (196 at D = 128, 772 at D = 512). vLLM's own TurboQuant k8v4
has slots of the same size, so both formats lead to the same memory plan.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

FORMAT_VERSION = 2
"""Increase this whenever the same bytes in a page get another meaning."""

KEY_STEPS = 127
"""Largest magnitude of a key code."""

VALUE_LEVELS = 16
"""Number of value codes: 0 to 15."""

VALUE_STEPS = VALUE_LEVELS / 2
"""Largest magnitude of a value, in steps of its scale. The outermost codes stand for 7.5 steps, and
magnitudes up to half a step larger are rounded to them."""

MIDDLE_VALUE_CODE = (VALUE_LEVELS - 1) / 2
"""The value 0 as a code. It lies between the codes 7 and 8."""

SCALE_MAX = 65504.0
"""The largest scale: the largest finite fp16 number."""

KEY_MAX = KEY_STEPS * SCALE_MAX
"""Keys are clamped to plus or minus this, before and after the rotation."""

VALUE_MAX = VALUE_STEPS * SCALE_MAX
"""Values are clamped to plus or minus this, before and after the rotation."""

NAN_SCALE_BITS = 0x7E00
"""The bits of both fp16 scales of a token whose key or value holds a NaN."""

TILE_TOKENS = 16
"""Tokens in a tile of `Layout.CPU_TILED`. Every page size is a multiple of this."""

HEAD_SIZES = (*range(64, 257, 8), 512)
"""The head sizes (dims per head) that the format supports."""

MAX_HEAD_SIZE = HEAD_SIZES[-1]


class Layout(enum.Enum):
    """Where a token's bytes are inside the key and value planes of a page.

    `LINEAR`, for GPUs: a token's bytes are contiguous. Key (t, d) is byte `t * D + d`, a signed
    code. Value (t, d) is in byte `t * D/2 + d // 2`, even dims in the low nibble.

    `CPU_TILED`, for CPUs: tiles of 16 tokens, one after another. Integer dot products sum over
    four neighbouring bytes or two neighbouring words, so a tile puts these next to each other:

    * keys: a tile is `[D/4, 16, 4]`: each line of 64 bytes holds four dims of 16 tokens. A byte is
      the code plus 128, because the dot product of AVX-512 multiplies unsigned by signed bytes.
      Sixteen lines are one operand of an AMX tile product.
    * values: a tile is `[D/32, 4, 64]`: each chunk of 32 dims has four quads of four tokens. The
      64 bytes of a quad are `[16, 4]`. The four bytes of row `i` hold dim `i` (low nibbles) and dim
      `16 + i` (high nibbles) of tokens 0, 2, 1 and 3, in this order. The lowest nibbles of the
      row's two 16-bit words are thus dim `i` of tokens 0 and 1. After a shift right by 4 bits they
      are dim `16 + i` of tokens 0 and 1; by 8 and 12 bits, the same dims of tokens 2 and 3.
      If D is not a multiple of 32, the last chunk holds D % 32 dims in proportionally fewer bytes.
    """

    LINEAR = "linear"
    CPU_TILED = "cpu_tiled"


QUAD_BYTE_OF_TOKEN = (0, 2, 1, 3)
"""Entry `t % 4` says which of every four bytes in a `CPU_TILED` quad belongs to token `t`."""


def slot_bytes(head_size: int) -> int:
    """Return how many bytes a page needs for one token of one KV head: `D + D/2 + 4`.

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


def rotation_stages(head_size: int) -> tuple[tuple[int, int], ...]:
    """Return the stages of a head's rotation as pairs (radix, stride).

    The rotation acts on blocks of 2^k dims, with the largest 2^k that divides `head_size`. Stages
    have radix 4 and strides 1, 4, 16 and so on; if k is odd, one of radix 2 follows. A stage of
    radix 4 and stride s takes the numbers in dims d, d + s, d + 2s and d + 3s, and replaces each
    number x by sum / 2 - x. A stage of radix 2 replaces a and b, s dims apart, by (a + b) / sqrt(2)
    and (a - b) / sqrt(2). A stage is its own inverse, and stages commute.
    """
    block = head_size & -head_size
    stages, stride = [], 1
    while block >= 4 * stride:
        stages.append((4, stride))
        stride *= 4
    if block > stride:
        stages.append((2, stride))
    return tuple(stages)


def rotation_unit(head_size: int) -> float:
    """Return 1 / sqrt(block). Kernels multiply by it once, after the sums of all stages."""
    return float((head_size & -head_size) ** -0.5)


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

    @property
    def head_bytes(self) -> int:
        """Bytes of one KV head's region: `N * slot_bytes(D)`."""
        return self.page_size * slot_bytes(self.head_size)

    @property
    def value_offset(self) -> int:
        """Start of the value plane; keys start at 0."""
        return self.page_size * self.head_size

    @property
    def key_scale_offset(self) -> int:
        return self.value_offset + self.page_size * self.head_size // 2

    @property
    def value_scale_offset(self) -> int:
        return self.key_scale_offset + 2 * self.page_size

    @property
    def key_sign_flip(self) -> int:
        """XOR a key's signed code with this to get its byte: 128 adds 128, 0 changes nothing."""
        return 128 if self.layout is Layout.CPU_TILED else 0

    def key_byte(self, token: int, dim: int) -> int:
        """Return the offset of key (token, dim) in the region."""
        if self.layout is Layout.LINEAR:
            return token * self.head_size + dim
        tile, t = divmod(token, TILE_TOKENS)
        line, of_line = divmod(dim, 4)
        return TILE_TOKENS * self.head_size * tile + 64 * line + 4 * t + of_line

    def value_byte(self, token: int, dim: int) -> tuple[int, int]:
        """Return the offset of value (token, dim) in the region, and its nibble's shift, 0 or 4."""
        half = self.head_size // 2
        if self.layout is Layout.LINEAR:
            return self.value_offset + token * half + dim // 2, 4 * (dim % 2)
        tile, t = divmod(token, TILE_TOKENS)
        chunk, rest = divmod(dim, 32)
        width = min(32, self.head_size - 32 * chunk) // 2
        high, i = divmod(rest, width)
        quad, of_quad = divmod(t, 4)
        byte = TILE_TOKENS * half * tile + 256 * chunk + 4 * width * quad + 4 * i
        return self.value_offset + byte + QUAD_BYTE_OF_TOKEN[of_quad], 4 * high
