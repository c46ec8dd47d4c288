# SPDX-License-Identifier: Apache-2.0
"""Conversions between numbers and codes, as device functions, and the variant for each device.

All variants of a conversion give the same bits, or the same numbers times a power of two that is
named here. The choice of a variant affects speed only.
"""

from __future__ import annotations

import enum

import torch
import triton
import triton.language as tl

from vllm_hybrid_kv.kernels import k8v4


class KeyDecoder(enum.IntEnum):
    """How e4m3fn codes are widened to fp16."""

    PORTABLE = 0
    """Integer arithmetic in Triton, for every device and for the interpreter."""
    INTEGER_PTX = 1
    """The same arithmetic in PTX for compute capability 7.5 and later, two words at a time."""
    NATIVE_PTX = 2
    """The conversion instruction of compute capability 8.9 and later."""


# PTX on two 16-bit words in a register. `&` marks an output that is written before the last read
# of the input; otherwise it could share the input's register.
INTEGER_KEY_PTX = tl.constexpr(
    "{ .reg .b32 a, b, c;\n"
    "shl.b32 a, $2, 7; shl.b32 b, $2, 8; shr.u32 c, $2, 1;\n"
    "and.b32 a, a, 0x3f803f80; lop3.b32 $0, b, 0x80008000, a, 0xEA;\n"
    "and.b32 c, c, 0x3f803f80; lop3.b32 $1, $2, 0x80008000, c, 0xEA; }"
)
INTEGER_KEY_OPERANDS = tl.constexpr("=&r,=r,r")
NATIVE_KEY_PTX = tl.constexpr(
    "{ .reg .b32 a, b; .reg .b16 l, h;\n"
    "prmt.b32 a, $2, 0, 0x4420; prmt.b32 b, $2, 0, 0x4431;\n"
    "cvt.u16.u32 l, a; cvt.u16.u32 h, b;\n"
    "cvt.rn.f16x2.e4m3x2 $0, l; cvt.rn.f16x2.e4m3x2 $1, h; }"
)
NATIVE_KEY_OPERANDS = tl.constexpr("=r,=r,r")
VALUE_PTX = tl.constexpr(
    "{ .reg .b32 t; shr.u32 t, $4, 8;\n"
    "and.b32 $0, $4, 0x000f000f; and.b32 $1, $4, 0x00f000f0;\n"
    "and.b32 $2, t, 0x000f000f; and.b32 $3, t, 0x00f000f0; }"
)
VALUE_OPERANDS = tl.constexpr("=&r,=r,=r,=r,r")

_PORTABLE = tl.constexpr(int(KeyDecoder.PORTABLE))
_INTEGER_PTX = tl.constexpr(int(KeyDecoder.INTEGER_PTX))

INTEGER_KEY_UNIT = tl.constexpr(256.0)
"""Factor that integer arithmetic omits: fp16's exponent bias is 15 and e4m3fn's is 7, so moving a
code's exponent and mantissa bits into their fp16 position gives the key times 2^-8."""

LOW_CODE_UNIT = 2.0**-24
"""Value of a code of 1 in the lowest four bits of an fp16 number: fp16's smallest denormal."""
HIGH_CODE_UNIT = 2.0**-20
"""Value of a code of 1 in the next four bits."""

_KEY_MAX_BITS = tl.constexpr(0x43E00000)  # float32 448
_INFINITY_BITS = tl.constexpr(0x7F800000)
_SMALLEST_NORMAL_BITS = tl.constexpr(0x3C800000)  # float32 2^-6
# Adding 2^14 leaves float32 a last bit of 2^-9, which is e4m3fn's step below 2^-6.
_DENORMAL_ROUNDER = tl.constexpr(2.0**14)
_DENORMAL_ROUNDER_BITS = tl.constexpr(0x46800000)
_EXPONENT_BIAS = tl.constexpr((127 - 7) << 3)
_NAN_CODE = tl.constexpr(0x7F)
assert k8v4.KEY_MAX == 448.0


@triton.jit
def encode_keys(x, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the e4m3fn codes, uint8, of float32 `x` clamped to +-448; NaNs keep their sign.

    NATIVE uses Triton's conversion, which needs compute capability 8.9. Otherwise the bits are
    computed with integers. Both round to nearest even.
    """
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Magnitudes of floats have the order of their bits.
    clamped = tl.minimum(magnitude, _KEY_MAX_BITS)
    if NATIVE:
        narrow = clamped.to(tl.float32, bitcast=True).to(tl.float8e4nv)
        code = narrow.to(tl.uint8, bitcast=True).to(tl.int32)
    else:
        normal = ((clamped + 0x7FFFF + ((clamped >> 20) & 1)) >> 20) - _EXPONENT_BIAS
        tiny = clamped.to(tl.float32, bitcast=True) + _DENORMAL_ROUNDER
        denormal = tiny.to(tl.int32, bitcast=True) - _DENORMAL_ROUNDER_BITS
        code = tl.where(clamped < _SMALLEST_NORMAL_BITS, denormal, normal)
    code = tl.where(magnitude > _INFINITY_BITS, _NAN_CODE, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def half_rounded_down(x):  # type: ignore[no-untyped-def]
    """Return the bits, int32, of the largest fp16 number <= float32 `x`, finite in fp16."""
    half = x.to(tl.float16)
    bits = half.to(tl.int16, bitcast=True).to(tl.int32)
    # One step towards minus infinity in sign-magnitude; both zeros step to the smallest
    # negative number.
    back = half.to(tl.float32)
    stepped = tl.where(back > 0, bits - 1, tl.where(back < 0, bits + 1, -0x7FFF))
    return tl.where(back > x, stepped, bits)


@triton.jit
def half_to_float(bits):  # type: ignore[no-untyped-def]
    """Return fp16 numbers as float32 from their bits in int32."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def decode_keys(words, DECODER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the two e4m3fn codes of each int16 as fp16: even dims, odd dims.

    All decoders except NATIVE_PTX return exactly key / INTEGER_KEY_UNIT, and 480 for NaN.
    """
    if DECODER == _PORTABLE:
        bits = words.to(tl.uint16, bitcast=True)
        even = ((bits << 8) & 0x8000) | ((bits << 7) & 0x3F80)
        odd = (bits & 0x8000) | ((bits >> 1) & 0x3F80)
        return even.to(tl.float16, bitcast=True), odd.to(tl.float16, bitcast=True)
    elif DECODER == _INTEGER_PTX:  # noqa: RET505 - only one branch is compiled, which returns
        return tl.inline_asm_elementwise(
            INTEGER_KEY_PTX, INTEGER_KEY_OPERANDS, [words],
            dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            NATIVE_KEY_PTX, NATIVE_KEY_OPERANDS, [words],
            dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip


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


def has_native_e4m3(device: torch.device) -> bool:
    """Return whether a device converts float32 to e4m3fn in hardware.

    AMD's gfx942 converts to e4m3fnuz, another format, so it uses the integer arithmetic.
    """
    return is_nvidia(device) and torch.cuda.get_device_capability(device) >= (8, 9)


def key_decoder_for(device: torch.device) -> KeyDecoder:
    """Return the fastest key decoder of a device."""
    if not is_nvidia(device):
        return KeyDecoder.PORTABLE
    return KeyDecoder.NATIVE_PTX if has_native_e4m3(device) else KeyDecoder.INTEGER_PTX
