# SPDX-License-Identifier: Apache-2.0
"""Encode rows of keys and values, and write the codes to their places in a page.

The places are those of `k8v4.PageFormat`. The input is in a thread's scratch memory: four rows of
rotated float32 values, four rows of key codes, and the results of `value_scales.write_scales`.
Rows extend to a multiple of 16 numbers.
"""

from __future__ import annotations

import numba
from llvmlite import ir

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.cpu import memory, records, value_scales
from vllm_hybrid_kv.kernels.cpu.inline import Bool, Float32, Int64, inline_llvm
from vllm_hybrid_kv.kernels.cpu.llvm import (
    F32,
    I8,
    I16,
    I32,
    I64,
    LANES,
    LINE,
    Emitter,
    filled,
    vector,
)

ROW_BYTES = 4 * k8v4.MAX_HEAD_SIZE
"""Bytes between two rows of values."""

KEY_BYTES = k8v4.MAX_HEAD_SIZE
"""Bytes between two rows of key codes."""

INFINITY_BITS = 0x7F800000
"""The bits of a float32 infinity; a larger magnitude is a NaN."""

_MAGNITUDE_BITS = 0x7FFFFFFF
"""A mask for a float32 without its sign."""

_TILE = k8v4.TILE_TOKENS
_BYTE_OF_TOKEN = k8v4.QUAD_BYTE_OF_TOKEN
_ROUNDING = 1.5 * 2.0**23
_ROUNDING_BITS = 0x4B400000


def _vectors(e: Emitter, head_size: ir.Value) -> ir.Value:
    """Return the vectors of a row, rounded up."""
    return e.shift_right(e.at(head_size, LANES - 1), 4)


@inline_llvm
def any_magnitude_above(
    e: Emitter, limit: int, dtype_code: Int64, source: Int64, row: Int64, head_size: Int64
) -> Bool:
    """Return whether a row holds a magnitude above a limit, or a NaN.

    Args:
        e: Emits the code.
        limit: The bits of a float32 that is a bf16 number.
        dtype_code: Of the source. bf16 is compared in place, 32 numbers at a time.
        source: Address of the row before `row_ops.widen_row`.
        row: Address of the row after it.
        head_size: D.
    """
    is_bfloat16 = e.b.icmp_signed("==", dtype_code, I64(records.BFLOAT16))
    narrow = e.b.and_(is_bfloat16, e.is_multiple(head_size, 2 * LANES))

    def largest_above(bits: int) -> list[ir.Value]:
        dropped = 32 - bits
        lanes = 8 * LINE // bits
        element = ir.IntType(bits)

        def line(i: ir.Value, largest: list[ir.Value]) -> list[ir.Value]:
            x = e.load_line(bits, e.at(row if bits == 32 else source, i, LINE))
            x = e.b.and_(x, filled(element, _MAGNITUDE_BITS >> dropped, lanes))
            return [e.larger_integer(largest[0], x)]

        lines = e.shift_right(head_size, 5) if bits == 16 else _vectors(e, head_size)
        (largest,) = e.loop(lines, [filled(element, 0, lanes)], line)
        above = e.b.icmp_signed(">", largest, filled(element, limit >> dropped, lanes))
        flags = e.b.bitcast(above, ir.IntType(lanes))
        return [e.b.icmp_unsigned("!=", flags, flags.type(0))]

    return e.choose((16, 32), lambda _: narrow, largest_above)[0]


@inline_llvm
def clamp_row(e: Emitter, row: Int64, head_size: Int64, limit: Float32) -> None:
    """Clamp a row to +-limit in place; a NaN becomes -limit."""
    low, high = e.broadcast(e.b.fneg(limit)), e.broadcast(limit)

    def sixteen(i: ir.Value, _: list[ir.Value]) -> None:
        place = e.at(row, i, LINE)
        e.store(e.smaller(e.larger(e.load_floats(place), low), high), place)

    e.loop(_vectors(e, head_size), [], sixteen)


def _key_codes(e: Emitter, x: ir.Value, may_be_nan: bool) -> ir.Value:
    """Return sixteen e4m3fn codes, rounded half to even and clamped to +-448.

    Above 2^-6 the code is the float32's upper bits, rounded at the cut and with the exponent's
    bias moved from 127 to 7. Below, it counts steps of 2^-9, the last bit of a float32 near 2^14,
    so that one addition rounds. A NaN's codes are 0x7F and 0xFF; x holds none unless `may_be_nan`.
    """
    b = e.b

    def word(number: int) -> ir.Constant:
        return filled(I32, number)

    bits = b.bitcast(x, vector(I32))
    sign = b.and_(b.lshr(bits, word(24)), word(0x80))
    magnitude = b.and_(bits, word(_MAGNITUDE_BITS))
    top = word(0x43E00000)  # 448
    clamped = b.select(b.icmp_signed("<", magnitude, top), magnitude, top)
    tie_to_even = b.and_(b.lshr(clamped, word(20)), word(1))
    rounded = b.add(b.add(clamped, word(0x7FFFF)), tie_to_even)
    normal = b.sub(b.lshr(rounded, word(20)), word((127 - 7) << 3))
    raised = b.fadd(b.bitcast(clamped, vector(F32)), filled(F32, 2.0**14))
    steps = b.sub(b.bitcast(raised, vector(I32)), word(0x46800000))
    code = b.select(b.icmp_signed("<", clamped, word(0x3C800000)), steps, normal)
    if may_be_nan:
        is_nan = b.icmp_signed(">", magnitude, word(INFINITY_BITS))
        code = b.select(is_nan, word(0x7F), code)
    return b.trunc(b.or_(code, sign), vector(I8))


@inline_llvm
def encode_keys(e: Emitter, row: Int64, head_size: Int64, to: Int64, has_nan: Bool) -> None:
    """Write the e4m3fn codes of a row."""

    def encode(may_be_nan: bool) -> None:
        def sixteen(i: ir.Value, _: list[ir.Value]) -> None:
            e.store(
                _key_codes(e, e.load_floats(e.at(row, i, LINE)), may_be_nan), e.at(to, i, LANES)
            )

        e.loop(_vectors(e, head_size), [], sixteen)

    e.choose((True, False), lambda _: has_nan, encode)


def _raised_codes(e: Emitter, x: ir.Value, zero: ir.Value, inverse: ir.Value) -> ir.Value:
    """Return `round_half_even((x - zero) * inverse)` above `_ROUNDING_BITS`, as int32.

    Three roundings, as in the reference; the third is the addition of a number whose last bit
    counts ones. Nothing is clamped: x is between the row's extremes, which are 0 and 15 steps but
    for the rounding of single operations.
    """
    steps = e.b.fmul(e.b.fsub(x, zero), inverse)
    return e.b.bitcast(e.b.fadd(steps, filled(F32, _ROUNDING)), vector(I32))


def _broadcast_zero_and_inverse(
    e: Emitter, results: ir.Value, token: int | ir.Value
) -> list[ir.Value]:
    """Return a token's zero and the factor of its codes."""
    offsets = (value_scales.ZEROS, value_scales.INVERSES)
    return [e.broadcast(e.load(F32, e.at(e.at(results, at), token, 4))) for at in offsets]


@inline_llvm
def _pack_values(
    e: Emitter, to: Int64, row: Int64, results: Int64, token: Int64, head_size: Int64
) -> None:
    """Write the value codes of a row, even dims in the low nibbles."""
    zero_and_inverse = _broadcast_zero_and_inverse(e, results, token)

    def sixteen(i: ir.Value, _: list[ir.Value]) -> None:
        raised = _raised_codes(e, e.load_floats(e.at(row, i, LINE)), *zero_and_inverse)
        codes = e.b.trunc(raised, vector(I8))
        even, odd = (e.shuffle(codes, codes, range(half, LANES, 2)) for half in range(2))
        e.store(e.b.or_(even, e.b.shl(odd, filled(I8, 4, LANES // 2))), e.at(to, i, 8))

    e.loop(_vectors(e, head_size), [], sixteen)


@inline_llvm
def _store_tiled_keys(e: Emitter, to: Int64, keys: Int64, head_size: Int64) -> None:
    """Store one token's key codes to every line of four dims, a pair of dims at a time."""

    def line(i: ir.Value, _: list[ir.Value]) -> None:
        for pair in range(2):
            codes = e.load(I16, e.at(e.at(keys, i, 4), 2 * pair))
            e.store(codes, e.at(e.at(to, i, LINE), 8 * pair))

    e.loop(e.shift_right(head_size, 2), [], line)


@inline_llvm
def _store_tiled_values(
    e: Emitter, to: Int64, row: Int64, results: Int64, token: Int64, head_size: Int64
) -> None:
    """Store one token's value codes, every fourth byte of a line of 32 dims."""
    zero_and_inverse = _broadcast_zero_and_inverse(e, results, token)

    def chunk(i: ir.Value, _: list[ir.Value]) -> None:
        source = e.at(row, i, 2 * LINE)
        low, high = (
            e.b.trunc(
                _raised_codes(e, e.load_floats(e.at(source, half * LINE)), *zero_and_inverse),
                vector(I8),
            )
            for half in range(2)
        )
        codes = e.b.or_(low, e.b.shl(high, filled(I8, 4)))
        for lane in range(LANES):
            byte = e.b.extract_element(codes, I32(lane))
            e.store(byte, e.at(e.at(to, i, 4 * LINE), 4 * lane))

    e.loop(e.shift_right(head_size, 5), [], chunk)


@inline_llvm
def _store_key_quad(e: Emitter, to: Int64, keys: Int64, head_size: Int64) -> None:
    """Store the key codes of the four tokens of a quad, 16 bytes of each line of four dims."""
    half = LANES // 2

    def sixteen_dims(i: ir.Value, _: list[ir.Value]) -> None:
        sources = e.rows(e.at(keys, i, LANES), I64(KEY_BYTES), 4)
        w, x, y, z = (e.load(vector(I16, half), source) for source in sources)
        low, high = e.shuffle(w, x, range(2 * half)), e.shuffle(y, z, range(2 * half))
        mixed = e.shuffle(low, high, [part * half + j for j in range(half) for part in range(4)])
        for line in range(4):
            part = e.shuffle(mixed, mixed, range(half * line, half * (line + 1)))
            e.store(part, e.at(e.at(to, i, 4 * LINE), LINE * line))

    e.loop(e.shift_right(head_size, 4), [], sixteen_dims)


@inline_llvm
def _store_value_quad(e: Emitter, to: Int64, rows: Int64, results: Int64, head_size: Int64) -> None:
    """Store the value codes of the four tokens of a quad, a line of each chunk of 32 dims.

    A 32-bit lane holds the bytes of one pair of dims of all four tokens. The codes are added at
    their shifts, and the sum of what they were raised by is subtracted once.
    """

    def chunk(i: ir.Value, _: list[ir.Value]) -> None:
        total = filled(I32, 0)
        raised_by = 0
        for token, source in enumerate(e.rows(e.at(rows, i, 2 * LINE), I64(ROW_BYTES), 4)):
            zero_and_inverse = _broadcast_zero_and_inverse(e, results, token)
            for half in range(2):
                shift = 8 * _BYTE_OF_TOKEN[token] + 4 * half
                x = e.load_floats(e.at(source, half * LINE))
                raised = _raised_codes(e, x, *zero_and_inverse)
                total = e.b.add(total, e.b.shl(raised, filled(I32, shift)))
                raised_by += _ROUNDING_BITS << shift
        e.store(e.b.sub(total, filled(I32, raised_by % 2**32)), e.at(to, i, 4 * LINE))

    e.loop(e.shift_right(head_size, 5), [], chunk)


@numba.njit
def place_token(keys, rows, results, token, head_size, region, page_size, t, tiled):  # type: ignore[no-untyped-def]
    """Store one of the four tokens at position t of a head's region; overwrites its key codes."""
    plane = region + page_size * head_size
    scales = plane + page_size * (head_size // 2) + 2 * t
    memory.copy_bytes(scales, results + value_scales.SCALE_BITS + 2 * token, 2)
    memory.copy_bytes(scales + 2 * page_size, results + value_scales.ZERO_BITS + 2 * token, 2)
    keys, row = keys + token * KEY_BYTES, rows + token * ROW_BYTES
    if tiled:
        tile, quad = t // _TILE * _TILE, t % _TILE // 4
        to = region + tile * head_size + 16 * quad + 2 * (t % 4)
        _store_tiled_keys(to, keys, head_size)
        to = plane + tile * (head_size // 2) + 64 * quad + _BYTE_OF_TOKEN[t % 4]
        _store_tiled_values(to, row, results, token, head_size)
    else:
        memory.copy_bytes(region + t * head_size, keys, head_size)
        # By way of the buffer, because the last vector may be half outside the row.
        _pack_values(keys, row, results, token, head_size)
        memory.copy_bytes(plane + t * (head_size // 2), keys, head_size // 2)


@numba.njit
def place_quad(keys, rows, results, head_size, region, page_size, t):  # type: ignore[no-untyped-def]
    """Store the four tokens of a quad of `Layout.CPU_TILED`; `t` is the first one's position."""
    plane = region + page_size * head_size
    scales = plane + page_size * (head_size // 2) + 2 * t
    memory.copy_bytes(scales, results + value_scales.SCALE_BITS, 8)
    memory.copy_bytes(scales + 2 * page_size, results + value_scales.ZERO_BITS, 8)
    tile, quad = t // _TILE * _TILE, t % _TILE // 4
    _store_key_quad(region + tile * head_size + 16 * quad, keys, head_size)
    _store_value_quad(plane + tile * (head_size // 2) + 64 * quad, rows, results, head_size)
