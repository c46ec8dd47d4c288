# SPDX-License-Identifier: Apache-2.0
"""Conversions between numbers and codes, as device functions, and the variant for each device.

All variants of a conversion give the same bits, or the same numbers times a power of two that is
named here. The choice of a variant affects speed only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# PTX on two 16-bit words in a register. `&` marks an output that is written before the last read
# of the input; otherwise it could share the input's register.
VALUE_PTX = tl.constexpr(
    "{ .reg .b32 t; shr.u32 t, $4, 8;\n"
    "and.b32 $0, $4, 0x000f000f; and.b32 $1, $4, 0x00f000f0;\n"
    "and.b32 $2, t, 0x000f000f; and.b32 $3, t, 0x00f000f0; }"
)
VALUE_OPERANDS = tl.constexpr("=&r,=r,=r,=r,r")

LOW_CODE_UNIT = 2.0**-24
"""Value of a code of 1 in the lowest four bits of an fp16 number: fp16's smallest denormal."""
HIGH_CODE_UNIT = 2.0**-20
"""Value of a code of 1 in the next four bits."""

# Adding 1.5 x 2^23 leaves float32 a last bit of 1: numbers are rounded half to even, and the low
# bits hold the integer.
_INTEGER_ROUNDER = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def rounded(x, LIMIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return float32 `x` clamped to +-LIMIT and rounded half to even, in the low bits of int32.

    Clamping also prevents the compiler from fusing a product that is `x` with the sum here: a
    fused one rounds once instead of twice.
    """
    x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
    return (x + _INTEGER_ROUNDER).to(tl.int32, bitcast=True)


@triton.jit
def half_rounded_up(x):  # type: ignore[no-untyped-def]
    """Return the bits, int32, of the smallest fp16 number >= float32 `x` from 0 to 65504."""
    half = x.to(tl.float16)
    bits = half.to(tl.int16, bitcast=True).to(tl.int32)
    return tl.where(half.to(tl.float32) < x, bits + 1, bits)


@triton.jit
def half_to_float(bits):  # type: ignore[no-untyped-def]
    """Return fp16 numbers as float32 from their bits in int32."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def decode_values(words, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the four codes of each int16 as fp16 denormals, dims 0 to 3; with PTX by NVIDIA's.

    Dims 0 and 2 are in LOW_CODE_UNIT, 1 and 3 in HIGH_CODE_UNIT: a mask is enough, because tensor
    cores multiply denormals exactly.
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
