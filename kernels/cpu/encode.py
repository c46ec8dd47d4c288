# SPDX-License-Identifier: Apache-2.0
"""Encode rows of keys and values, and write the codes to their places in a page.

The places are those of `k8v4.PageFormat`. The input is in a thread's scratch memory: four rows of
rotated float32 values, four rows of key codes, and the results of `write_scales`.
Rows extend to a multiple of 16 numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
from llvmlite import ir

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.cpu import inline, records
from vllm_hybrid_kv.kernels.cpu.inline import Bool, Float32, Int64, inline_llvm
from vllm_hybrid_kv.kernels.cpu.llvm import (
    F16,
    F32,
    I8,
    I16,
    I32,
    I64,
    LANES,
    LINE,
    ROUNDING,
    Emitter,
    filled,
    vector,
)

ROW_BYTES = 4 * k8v4.MAX_HEAD_SIZE
"""Bytes between two rows of values."""

KEY_BYTES = k8v4.MAX_HEAD_SIZE
"""Bytes between two rows of key codes."""

EXTREMES_BYTES = 2 * LINE
"""Bytes of the extremes of one token: sixteen smallest numbers, then sixteen largest."""

SCALE_BITS, ZERO_BITS, ZEROS, INVERSES = 0, 8, 16, 32
"""Offsets in the scales of four tokens: fp16 bits of the scales and of the zeros, the zeros as
float32, and the factors of the codes."""

RESULT_BYTES = 48

INFINITY_BITS = 0x7F800000
"""The bits of a float32 infinity; a larger magnitude is a NaN."""

_MAGNITUDE_BITS = 0x7FFFFFFF
"""A mask for a float32 without its sign."""

_TILE = k8v4.TILE_TOKENS
_BYTE_OF_TOKEN = k8v4.QUAD_BYTE_OF_TOKEN
_ROUNDING_BITS = 0x4B400000  # of `ROUNDING`


def _vectors(e: Emitter, head_size: ir.Value) -> ir.Value:
    """Return the vectors of a row, rounded up."""
    return e.shift_right(e.at(head_size, LANES - 1), 4)


@inline_llvm
def any_magnitude_above(
    e: Emitter, limit: int, dtype_code: Int64, source: Int64, row: Int64, head_size: Int64
) -> Bool:
    """Return whether a row holds a NaN or a magnitude above a limit, the bits of a bf16 number.

    `row` is `source` after `row_ops.widen_row`; bf16 is compared in `source`, 32 numbers at a time.
    """
    is_bfloat16 = e.b.icmp_signed("==", dtype_code, I64(records.BFLOAT16))
    narrow = e.b.and_(is_bfloat16, e.is_multiple(head_size, 2 * LANES))

    def largest_above(bits: int) -> list[ir.Value]:
        lanes = 8 * LINE // bits
        element = ir.IntType(bits)

        def line(i: ir.Value, largest: list[ir.Value]) -> list[ir.Value]:
            x = e.load_line(bits, e.at(row if bits == 32 else source, i, LINE))
            x = e.b.and_(x, filled(element, _MAGNITUDE_BITS >> (32 - bits), lanes))
            return [e.b.select(e.b.icmp_signed(">", largest[0], x), largest[0], x)]

        lines = e.shift_right(head_size, 5) if bits == 16 else _vectors(e, head_size)
        (largest,) = e.loop(lines, [filled(element, 0, lanes)], line)
        above = e.b.icmp_signed(">", largest, filled(element, limit >> (32 - bits), lanes))
        flags = e.b.bitcast(above, ir.IntType(lanes))
        return [e.b.icmp_unsigned("!=", flags, flags.type(0))]

    return e.choose((16, 32), lambda _: narrow, largest_above)[0]


@inline_llvm
def clamp_row(e: Emitter, row: Int64, head_size: Int64, limit: Float32) -> None:
    """Clamp a row to +-limit in place; a NaN becomes -limit."""
    low, high = e.broadcast(e.b.fneg(limit)), e.broadcast(limit)
    with e.each(_vectors(e, head_size)) as i:
        place = e.at(row, i, LINE)
        e.store(e.smaller(e.larger(e.load_floats(place), low), high), place)


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
        with e.each(_vectors(e, head_size)) as i:
            codes = _key_codes(e, e.load_floats(e.at(row, i, LINE)), may_be_nan)
            e.store(codes, e.at(to, i, LANES))

    e.choose((True, False), lambda _: has_nan, encode)


def _larger_halves(e: Emitter, x: ir.Value, y: ir.Value, segment: int) -> ir.Value:
    """Return the maxima of the two halves of each segment of lanes, of `x` and then of `y`."""
    half = segment // 2
    first = [start + i for start in range(0, 2 * LANES, segment) for i in range(half)]
    return e.larger(e.shuffle(x, y, first), e.shuffle(x, y, [lane + half for lane in first]))


def _largest_of_eight(e: Emitter, eight: list[ir.Value]) -> ir.Value:
    """Return the maximum of each of eight vectors, as one vector of eight."""
    segment = LANES
    while len(eight) > 1:
        pairs = zip(eight[::2], eight[1::2], strict=True)
        eight = [_larger_halves(e, x, y, segment) for x, y in pairs]
        segment //= 2
    (last,) = eight
    even, odd = (e.shuffle(last, last, range(i, LANES, 2)) for i in range(2))
    return e.larger(even, odd)


def _nearest_half(e: Emitter, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return the nearest fp16 bits of x as int16, and their number as float32."""
    half = e.b.fptrunc(x, vector(F16, 4))
    return e.b.bitcast(half, vector(I16, 4)), e.b.fpext(half, x.type)


@inline_llvm
def write_scales(
    e: Emitter, extremes: Int64, unit: Float32, nan_tokens: Int64, results: Int64
) -> None:
    """Write the scales and zeros of four tokens, and the numbers that their codes need.

    For one token alone this would take as long as a quarter of all its codes.

    `extremes` are those of four finite rows not yet multiplied by `rotation.unit`. The float32
    zeros and factors are for such rows too: a power of two changes no rounding. If bit t of
    `nan_tokens` is set, token t gets a NaN scale and codes of 0.
    """
    b = e.b

    def bits(number: int) -> ir.Constant:
        return filled(I16, number, 4)

    def floats(number: float) -> ir.Constant:
        return filled(F32, number, 4)

    starts = [e.at(extremes, token * EXTREMES_BYTES) for token in range(4)]
    smallest = [b.fneg(e.load_floats(start)) for start in starts]
    largest = [e.load_floats(e.at(start, LINE)) for start in starts]
    eight = _largest_of_eight(e, smallest + largest)
    factor = e.broadcast(unit, 4)
    lo = b.fmul(b.fneg(e.shuffle(eight, eight, range(4))), factor)
    hi = b.fmul(e.shuffle(eight, eight, range(4, 2 * 4)), factor)

    # Down to the next fp16 number: towards 0 if positive, and +0 for both zeros.
    half, number = _nearest_half(e, lo)
    step = b.select(b.icmp_signed("<", half, bits(0)), bits(1), bits(-1))
    half = b.select(b.fcmp_ordered(">", number, lo), b.add(half, step), half)
    half = b.select(b.icmp_signed("==", half, bits(-0x8000)), bits(0), half)
    zero = e.halves_to_floats(half)
    exact = b.fdiv(b.fsub(hi, zero), floats(k8v4.VALUE_LEVELS - 1))
    scale, number = _nearest_half(e, exact)
    scale = b.add(scale, b.zext(b.fcmp_ordered("<", number, exact), scale.type))
    inverse = b.fdiv(floats(1.0), e.halves_to_floats(scale))
    is_step = b.icmp_signed(">", scale, bits(0))
    inverse = b.select(is_step, b.fmul(inverse, factor), floats(0.0))

    is_nan = b.bitcast(b.trunc(nan_tokens, ir.IntType(4)), vector(ir.IntType(1), 4))
    for offset, result, of_nan in (
        (SCALE_BITS, scale, bits(k8v4.NAN_SCALE_BITS)),
        (ZERO_BITS, half, bits(0)),
        (ZEROS, b.fdiv(zero, factor), floats(0.0)),
        (INVERSES, inverse, floats(0.0)),
    ):
        e.store(b.select(is_nan, of_nan, result), e.at(results, offset))


def _value_encoder(
    e: Emitter, results: ir.Value, token: int | ir.Value
) -> Callable[[ir.Value], ir.Value]:
    """Return a function from the address of sixteen values to their codes plus `_ROUNDING_BITS`.

    The codes are `round_half_even((x - zero) * inverse)` as int32, with three roundings as in the
    reference: adding `ROUNDING` is the third. Codes of numbers between the row's extremes need no
    clamp.
    """
    zero, inverse = (
        e.broadcast(e.load(F32, e.at(e.at(results, offset), token, 4)))
        for offset in (ZEROS, INVERSES)
    )

    def raised_codes(place: ir.Value) -> ir.Value:
        steps = e.b.fmul(e.b.fsub(e.load_floats(place), zero), inverse)
        return e.b.bitcast(e.b.fadd(steps, filled(F32, ROUNDING)), vector(I32))

    return raised_codes


@inline_llvm
def _pack_values(
    e: Emitter, to: Int64, row: Int64, results: Int64, token: Int64, head_size: Int64
) -> None:
    """Write the value codes of a row, even dims in the low nibbles."""
    raised_codes = _value_encoder(e, results, token)
    with e.each(_vectors(e, head_size)) as i:
        codes = e.b.trunc(raised_codes(e.at(row, i, LINE)), vector(I8))
        even, odd = (e.shuffle(codes, codes, range(half, LANES, 2)) for half in range(2))
        e.store(e.b.or_(even, e.b.shl(odd, filled(I8, 4, LANES // 2))), e.at(to, i, 8))


@inline_llvm
def _store_tiled_keys(e: Emitter, to: Int64, keys: Int64, head_size: Int64) -> None:
    """Store one token's key codes to every line of four dims, a pair of dims at a time."""
    with e.each(e.shift_right(head_size, 2)) as i:
        for pair in range(2):
            codes = e.load(I16, e.at(e.at(keys, i, 4), 2 * pair))
            e.store(codes, e.at(e.at(to, i, LINE), 8 * pair))


@inline_llvm
def _store_tiled_values(
    e: Emitter, to: Int64, row: Int64, results: Int64, token: Int64, head_size: Int64
) -> None:
    """Store one token's value codes, every fourth byte of a line of 32 dims."""
    raised_codes = _value_encoder(e, results, token)
    with e.each(e.shift_right(head_size, 5)) as i:
        sources = (e.at(e.at(row, i, 2 * LINE), half * LINE) for half in range(2))
        low, high = (e.b.trunc(raised_codes(source), vector(I8)) for source in sources)
        codes = e.b.or_(low, e.b.shl(high, filled(I8, 4)))
        for lane in range(LANES):
            byte = e.b.extract_element(codes, I32(lane))
            e.store(byte, e.at(e.at(to, i, 4 * LINE), 4 * lane))


@inline_llvm
def _store_key_quad(e: Emitter, to: Int64, keys: Int64, head_size: Int64) -> None:
    """Store the key codes of the four tokens of a quad, 16 bytes of each line of four dims."""
    half = LANES // 2
    with e.each(e.shift_right(head_size, 4)) as i:
        sources = e.rows(e.at(keys, i, LANES), I64(KEY_BYTES), 4)
        w, x, y, z = (e.load(vector(I16, half), source) for source in sources)
        low, high = e.shuffle(w, x, range(2 * half)), e.shuffle(y, z, range(2 * half))
        mixed = e.shuffle(low, high, [part * half + j for j in range(half) for part in range(4)])
        for line in range(4):
            part = e.shuffle(mixed, mixed, range(half * line, half * (line + 1)))
            e.store(part, e.at(e.at(to, i, 4 * LINE), LINE * line))


@inline_llvm
def _store_value_quad(e: Emitter, to: Int64, rows: Int64, results: Int64, head_size: Int64) -> None:
    """Store the value codes of the four tokens of a quad, a line of each chunk of 32 dims.

    A 32-bit lane holds the bytes of one pair of dims of all four tokens. The codes are added at
    their shifts, and the sum of what they were raised by is subtracted once.
    """
    with e.each(e.shift_right(head_size, 5)) as i:
        total = filled(I32, 0)
        raised_by = 0
        for token, source in enumerate(e.rows(e.at(rows, i, 2 * LINE), I64(ROW_BYTES), 4)):
            raised_codes = _value_encoder(e, results, token)
            for half in range(2):
                shift = 8 * _BYTE_OF_TOKEN[token] + 4 * half
                raised = raised_codes(e.at(source, half * LINE))
                total = e.b.add(total, e.b.shl(raised, filled(I32, shift)))
                raised_by += _ROUNDING_BITS << shift
        e.store(e.b.sub(total, filled(I32, raised_by % 2**32)), e.at(to, i, 4 * LINE))


@numba.njit
def place(keys, rows, results, token, quad, head_size, region, page_size, t, tiled):  # type: ignore[no-untyped-def]
    """Store one of four tokens, or with `quad` all, at position t of a head's region.

    Overwrites the key codes of a token that is stored alone.
    """
    plane = region + page_size * head_size
    scales = plane + page_size * (head_size // 2) + 2 * t
    scale_bits, zero_bits = results + SCALE_BITS, results + ZERO_BITS
    tile, quad_of_tile = t // _TILE * _TILE, t % _TILE // 4
    to_keys = region + tile * head_size + 16 * quad_of_tile
    to_values = plane + tile * (head_size // 2) + 64 * quad_of_tile
    if quad:
        inline.copy_bytes(scales, scale_bits, 8)
        inline.copy_bytes(scales + 2 * page_size, zero_bits, 8)
        _store_key_quad(to_keys, keys, head_size)
        _store_value_quad(to_values, rows, results, head_size)
        return
    inline.copy_bytes(scales, scale_bits + 2 * token, 2)
    inline.copy_bytes(scales + 2 * page_size, zero_bits + 2 * token, 2)
    keys, row = keys + token * KEY_BYTES, rows + token * ROW_BYTES
    if tiled:
        _store_tiled_keys(to_keys + 2 * (t % 4), keys, head_size)
        _store_tiled_values(to_values + _BYTE_OF_TOKEN[t % 4], row, results, token, head_size)
    else:
        inline.copy_bytes(region + t * head_size, keys, head_size)
        # By way of the buffer, because the last vector may be half outside the row.
        _pack_values(keys, row, results, token, head_size)
        inline.copy_bytes(plane + t * (head_size // 2), keys, head_size // 2)
