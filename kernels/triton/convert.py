# SPDX-License-Identifier: Apache-2.0
"""Device functions that convert between numbers and codes.

`decode_values` has a variant in PTX for NVIDIA GPUs. Both variants give the same bits, so the
choice affects speed only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# PTX that decodes two 16-bit words in one register. In the operands, `&` marks an output that is
# written before the last read of the input, so that the two do not share a register.
VALUE_PTX = tl.constexpr(
    "{ .reg .b32 t; shr.u32 t, $4, 8;\n"
    "and.b32 $0, $4, 0x000f000f; and.b32 $1, $4, 0x00f000f0;\n"
    "and.b32 $2, t, 0x000f000f; and.b32 $3, t, 0x00f000f0; }"
)
VALUE_OPERANDS = tl.constexpr("=&r,=r,=r,=r,r")

LOW_CODE_UNIT = 2.0**-24
"""What a code of 1 is as an fp16 number if it is in the lowest four bits: the smallest denormal."""
HIGH_CODE_UNIT = 2.0**-20
"""What a code of 1 is as an fp16 number if it is in the next four bits."""

# After adding 1.5 x 2^23 the last bit of a float32 number is worth 1. So the addition rounds half
# to even, and the low bits of the sum hold the integer.
_INTEGER_ROUNDER = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def rounded(x, LIMIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Clamp float32 `x` to +-LIMIT and round it half to even, into the low bits of an int32.

    If `x` is a product, the clamp also keeps the compiler from fusing the product with the
    addition here. The fused operation would round once instead of twice.
    """
    x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
    return (x + _INTEGER_ROUNDER).to(tl.int32, bitcast=True)


@triton.jit
def half_rounded_up(x):  # type: ignore[no-untyped-def]
    """Round float32 `x`, 0 to 65504, up to the next fp16 number; return its bits as int32."""
    half = x.to(tl.float16)
    bits = half.to(tl.int16, bitcast=True).to(tl.int32)
    return tl.where(half.to(tl.float32) < x, bits + 1, bits)


@triton.jit
def half_to_float(bits):  # type: ignore[no-untyped-def]
    """Convert fp16 numbers, given as their bits in int32, to float32."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def decode_values(words, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """Unpack each int16 into the codes of dims 0 to 3, as fp16 denormals. PTX is for NVIDIA GPUs.

    The unit of dims 0 and 2 is LOW_CODE_UNIT, that of dims 1 and 3 HIGH_CODE_UNIT. Masking the
    bits is enough, because tensor cores multiply denormals exactly.
    """
    if not PTX:
        low = words.to(tl.uint16, bitcast=True)
        high = low >> 8
        return (
            (low & 0xF).to(tl.float16, bitcast=True),
            (low & 0xF0).to(tl.float16, bitcast=True),
            (high & 0xF).to(tl.float16, bitcast=True),
            (high & 0xF0).to(tl.float16, bitcast=True),
        )
    else:  # noqa: RET505
        return tl.inline_asm_elementwise(
            VALUE_PTX, VALUE_OPERANDS, [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip


def is_nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None
