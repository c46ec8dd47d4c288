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
from vllm_hybrid_kv.kernels.cpu.lanes import (
    BYTES,
    F32,
    FLOATS,
    I8,
    I16,
    I32,
    LANES,
    WORDS,
    broadcast,
    load_vector,
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
def largest_bfloat16(typing_context: Any, so_far: Any, address: Any) -> Any:
    """Return per pair of lanes the larger of `so_far` and of 32 bf16 magnitudes at an address."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        pairs = vector(I16, 2 * LANES)
        found = load_vector(b, I16, 2 * LANES, args[1])
        found = b.and_(found, splat(I16, MAGNITUDE_BITS >> 16, 2 * LANES))
        return b.bitcast(more_word(b, b.bitcast(args[0], pairs), found), vector(I32))

    return WORDS(WORDS, types.intp), emit


def _any(b: ir.IRBuilder, flags: ir.Value) -> ir.Value:
    """Emit whether any of a vector of bits is set."""
    every = ir.IntType(flags.type.count)
    return b.icmp_unsigned("!=", b.bitcast(flags, every), every(0))


@intrinsic
def any_above(typing_context: Any, magnitudes: Any, limit: Any) -> Any:
    """Return whether one of sixteen float32 magnitudes, as bits, is above those of a limit."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        limit = broadcast(b, b.trunc(args[1], I32))
        return _any(b, b.icmp_signed(">", args[0], limit))

    return types.boolean(WORDS, types.int64), emit


@intrinsic
def any_bfloat16_above(typing_context: Any, magnitudes: Any, limit: Any) -> Any:
    """Return whether one of 32 bf16 magnitudes is above a limit, which is the bits of a float32."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        pairs = vector(I16, 2 * LANES)
        upper = b.trunc(b.lshr(args[1], args[1].type(16)), I16)
        limit = broadcast(b, upper, 2 * LANES)
        return _any(b, b.icmp_signed(">", b.bitcast(args[0], pairs), limit))

    return types.boolean(WORDS, types.int64), emit


def _key_codes(b: ir.IRBuilder, x: ir.Value, may_be_nan: bool) -> ir.Value:
    def word(number: int) -> ir.Constant:
        return splat(I32, number)

    bits = b.bitcast(x, vector(I32))
    sign = b.and_(b.lshr(bits, word(24)), word(0x80))
    magnitude = b.and_(bits, word(MAGNITUDE_BITS))
    top = word(0x43E00000)  # 448
    clamped = b.select(b.icmp_signed("<", magnitude, top), magnitude, top)
    tie_to_even = b.and_(b.lshr(clamped, word(20)), word(1))
    rounded = b.add(b.add(clamped, word(0x7FFFF)), tie_to_even)
    normal = b.sub(b.lshr(rounded, word(20)), word((127 - 7) << 3))
    raised = b.fadd(b.bitcast(clamped, vector(F32)), splat(F32, 2.0**14))
    steps = b.sub(b.bitcast(raised, vector(I32)), word(0x46800000))
    code = b.select(b.icmp_signed("<", clamped, word(0x3C800000)), steps, normal)
    if may_be_nan:
        is_nan = b.icmp_signed(">", magnitude, word(INFINITY_BITS))
        code = b.select(is_nan, word(0x7F), code)
    return b.trunc(b.or_(code, sign), vector(I8))


@intrinsic
def key_codes(typing_context: Any, x: Any) -> Any:
    """Return sixteen e4m3fn codes, rounded half to even and clamped to +-448; x holds no NaN.

    Above 2^-6 the code is the float32's upper bits, rounded where they are cut and with the
    exponent's bias moved from 127 to 7. Below, it counts steps of 2^-9, which is what the last
    bit of a float32 near 2^14 counts, so that one addition rounds.
    """

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _key_codes(b, args[0], may_be_nan=False)

    return BYTES(FLOATS), emit


@intrinsic
def key_codes_or_nan(typing_context: Any, x: Any) -> Any:
    """Return the same where x may hold NaN, whose codes are 0x7F and 0xFF."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _key_codes(b, args[0], may_be_nan=True)

    return BYTES(FLOATS), emit


_ROUNDING = 1.5 * 2.0**23
_ROUNDING_BITS = 0x4B400000


def _raised_codes(b: ir.IRBuilder, x: ir.Value, zero: ir.Value, inverse: ir.Value) -> ir.Value:
    """Emit `round_half_even((x - zero) * inverse)` above `_ROUNDING_BITS`, as int32.

    Three roundings, as the reference does them; the addition of a number whose last bit counts
    ones is the third. Nothing is clamped: x is between the row's extremes, which are 0 and 15
    steps but for the rounding of single operations.
    """
    steps = b.fmul(b.fsub(x, zero), inverse)
    return b.bitcast(b.fadd(steps, splat(F32, _ROUNDING)), vector(I32))


@intrinsic
def value_codes(typing_context: Any, x: Any, zero: Any, inverse: Any) -> Any:
    """Return sixteen codes of numbers of a row, given the row's zero and its factor."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        x, zero, inverse = args
        return b.trunc(_raised_codes(b, x, broadcast(b, zero), broadcast(b, inverse)), vector(I8))

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
def store_quad(
    typing_context: Any, to: Any, row: Any, row_bytes: Any, zeros: Any, inverses: Any
) -> Any:
    """Store the codes of 32 values of each of the four tokens of a quad, 64 bytes.

    Reads the float32 rows of the tokens, `row_bytes` apart, and at two addresses their zeros and
    factors. A 32-bit lane holds the bytes of one pair of dims, of all four tokens; the codes are
    added in their places, and what they were raised by is taken off at once.
    """

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        to, row, row_bytes, zeros, inverses = args
        i64 = ir.IntType(64)

        def number(address: ir.Value, token: int) -> ir.Value:
            at = b.inttoptr(b.add(address, i64(4 * token)), F32.as_pointer())
            return broadcast(b, b.load(at, align=4))

        total = splat(I32, 0)
        raised_by = 0
        for token in range(4):
            zero, inverse = number(zeros, token), number(inverses, token)
            start = b.add(row, b.mul(row_bytes, i64(token)))
            for half in range(2):
                at = b.add(start, i64(half * 4 * LANES))
                x = b.bitcast(load_vector(b, I32, LANES, at), vector(F32))
                shift = 8 * k8v4.QUAD_BYTE_OF_TOKEN[token] + 4 * half
                raised = _raised_codes(b, x, zero, inverse)
                total = b.add(total, b.shl(raised, splat(I32, shift)))
                raised_by += _ROUNDING_BITS << shift
        total = b.sub(total, splat(I32, raised_by % 2**32))
        b.store(total, b.inttoptr(to, total.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp, types.intp), emit


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
