# SPDX-License-Identifier: Apache-2.0
"""Keys and values to codes and codes to their places, sixteen at a time, inside numba code.

Plain LLVM vector code as in `lanes`, with no fast-math flag: each operation rounds once, and
nothing is fused.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from vllm_hybrid_kv.kernels import k8v4

from .lanes import (
    BYTES,
    F32,
    FLOATS,
    I8,
    I16,
    I32,
    LANES,
    WORDS,
    broadcast,
    less,
    load_vector,
    more,
    more_word,
    splat,
    vector,
)

MAGNITUDE_BITS = 0x7FFFFFFF
"""What is left of a float32 without its sign."""

INFINITY_BITS = 0x7F800000
"""The bits of a float32 infinity; a larger magnitude is a NaN."""


@intrinsic
def largest_magnitude(typing_context: Any, so_far: Any, x: Any) -> Any:
    """Return per lane the larger of `so_far` and the bits of |x|; above `INFINITY_BITS`: NaN."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        bits = b.and_(b.bitcast(args[1], vector(I32)), splat(I32, MAGNITUDE_BITS))
        return more_word(b, args[0], bits)

    return WORDS(WORDS, FLOATS), emit


@intrinsic
def key_codes(typing_context: Any, x: Any) -> Any:
    """Return sixteen e4m3fn codes, rounded half to even and clamped to +-448.

    Above 2^-6 the code is the float32's upper bits, rounded where they are cut and with the
    exponent's bias moved from 127 to 7. Below, it counts steps of 2^-9, which is what the last
    bit of a float32 near 2^14 counts, so that one addition rounds.
    """

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        def word(number: int) -> ir.Constant:
            return splat(I32, number)

        bits = b.bitcast(args[0], vector(I32))
        sign = b.and_(b.lshr(bits, word(24)), word(0x80))
        magnitude = b.and_(bits, word(MAGNITUDE_BITS))
        is_nan = b.icmp_signed(">", magnitude, word(INFINITY_BITS))
        top = word(0x43E00000)  # 448
        clamped = b.select(b.icmp_signed("<", magnitude, top), magnitude, top)
        tie_to_even = b.and_(b.lshr(clamped, word(20)), word(1))
        rounded = b.add(b.add(clamped, word(0x7FFFF)), tie_to_even)
        normal = b.sub(b.lshr(rounded, word(20)), word((127 - 7) << 3))
        raised = b.fadd(b.bitcast(clamped, vector(F32)), splat(F32, 2.0**14))
        steps = b.sub(b.bitcast(raised, vector(I32)), word(0x46800000))
        code = b.select(b.icmp_signed("<", clamped, word(0x3C800000)), steps, normal)
        code = b.or_(b.select(is_nan, word(0x7F), code), sign)
        return b.trunc(code, vector(I8))

    return BYTES(FLOATS), emit


@intrinsic
def value_codes(typing_context: Any, x: Any, zero: Any, inverse: Any) -> Any:
    """Return sixteen codes `round_half_even((x - zero) * inverse)`, kept in 0..15.

    Three roundings, as the reference does them. Clamping first does not change what is rounded.
    The addition of 1.5 * 2^23, whose last bit counts ones, is what rounds.
    """

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        x, zero, inverse = args
        steps = b.fmul(b.fsub(x, broadcast(b, zero)), broadcast(b, inverse))
        top = float(k8v4.VALUE_LEVELS - 1)
        steps = less(b, more(b, steps, splat(F32, 0.0)), splat(F32, top))
        raised = b.fadd(steps, splat(F32, 1.5 * 2.0**23))
        return b.trunc(b.bitcast(raised, vector(I32)), vector(I8))

    return BYTES(FLOATS, types.float32, types.float32), emit


@intrinsic
def nibbles(typing_context: Any, low: Any, high: Any) -> Any:
    """Return `low | high << 4` of sixteen pairs of codes."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return b.or_(args[0], b.shl(args[1], splat(I8, 4)))

    return BYTES(BYTES, BYTES), emit


@intrinsic
def store_packed(typing_context: Any, address: Any, codes: Any) -> Any:
    """Store sixteen codes as eight bytes, even lanes in the low nibbles."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        address, codes = args
        even = b.shuffle_vector(codes, codes, ir.Constant(vector(I32, 8), [*range(0, 16, 2)]))
        odd = b.shuffle_vector(codes, codes, ir.Constant(vector(I32, 8), [*range(1, 16, 2)]))
        packed = b.or_(even, b.shl(odd, splat(I8, 4, 8)))
        b.store(packed, b.inttoptr(address, packed.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.intp, BYTES), emit


def _interleave(b: ir.IRBuilder, parts: list[ir.Value]) -> ir.Value:
    """Return element 0 of each of four vectors, then element 1 of each, and so on."""
    count = parts[0].type.count
    both = [*range(2 * count)]
    low = b.shuffle_vector(parts[0], parts[1], ir.Constant(vector(I32, 2 * count), both))
    high = b.shuffle_vector(parts[2], parts[3], ir.Constant(vector(I32, 2 * count), both))
    order = [part * count + i for i in range(count) for part in range(4)]
    return b.shuffle_vector(low, high, ir.Constant(vector(I32, 4 * count), order))


@intrinsic
def store_interleaved(typing_context: Any, address: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Store four times sixteen bytes as `a[0] b[0] c[0] d[0] a[1] ...`, 64 bytes."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        mixed = _interleave(b, list(args[1:]))
        b.store(mixed, b.inttoptr(args[0], mixed.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.intp, BYTES, BYTES, BYTES, BYTES), emit


@intrinsic
def scatter_keys(typing_context: Any, to: Any, source: Any, token_bytes: Any) -> Any:
    """Place sixteen key codes of each of the four tokens of a quad in their tile.

    Reads sixteen bytes at `source` and at three multiples of `token_bytes` after it. Writes
    four times sixteen bytes, one into each line of four dims, 64 bytes apart.
    """

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        to, source, token_bytes = args
        i64 = ir.IntType(64)
        starts = [b.add(source, b.mul(token_bytes, i64(token))) for token in range(4)]
        mixed = _interleave(b, [load_vector(b, I16, LANES // 2, start) for start in starts])
        for line in range(4):
            pairs = [*range(8 * line, 8 * line + 8)]
            part = b.shuffle_vector(mixed, mixed, ir.Constant(vector(I32, 8), pairs))
            at = b.inttoptr(b.add(to, i64(64 * line)), part.type.as_pointer())
            b.store(part, at, align=1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), emit


@intrinsic
def float_bits(typing_context: Any, x: Any) -> Any:
    """Return the bits of a float32."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return b.bitcast(args[0], I32)

    return types.uint32(types.float32), emit


@intrinsic
def bits_float(typing_context: Any, bits: Any) -> Any:
    """Return the float32 with these bits."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return b.bitcast(args[0], F32)

    return types.float32(types.uint32), emit
