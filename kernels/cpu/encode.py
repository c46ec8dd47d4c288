# SPDX-License-Identifier: Apache-2.0
"""Encode rotated rows, and write the codes into a `CPU_TILED` page.

`k8v4.PageFormat` defines where each byte goes. The input is in a thread's scratch memory: the
rotated float32 keys of four tokens, then their values, and the results of `write_scales`. Rows are
padded to a multiple of 16 numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
from llvmlite import ir

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.cpu import inline, records, rotation
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
    constant,
    filled,
    vector,
)

ROW_BYTES = 4 * k8v4.MAX_HEAD_SIZE
"""Bytes between two rows."""

VALUE_ROWS = 4 * ROW_BYTES
"""Offset of the values of four tokens from their keys."""

LARGEST_BYTES = 8 * LINE
"""Bytes for the partial maxima of |x|: 16 numbers for each of eight rows, keys first."""

INVERSES = 16
"""Where `write_scales` puts the float32 factors that turn rows into codes, in bytes. Before them
are the fp16 bits of four key scales and four value scales."""

RESULT_BYTES = 48

INFINITY_BITS = 0x7F800000
"""The bits of float32 infinity. Without the sign bit, only a NaN has larger bits."""

_TILE = k8v4.TILE_TOKENS
_BYTE_OF_TOKEN = k8v4.QUAD_BYTE_OF_TOKEN
_ROUNDING_BITS = 0x4B400000  # the float32 `ROUNDING` as bits


def _vectors(e: Emitter, head_size: ir.Value) -> ir.Value:
    """Return how many vectors hold a row."""
    return e.shift_right(e.at(head_size, LANES - 1), 4)


@inline_llvm
def any_above(e: Emitter, limit: int, row: Int64, vectors: Int64) -> Bool:
    """Return whether a row has a NaN or a magnitude above `limit`, given as float32 bits."""

    def larger(i: ir.Value, largest: list[ir.Value]) -> list[ir.Value]:
        return rotation.larger_magnitudes(e, largest, e.load_floats(e.at(row, i, LINE)))

    (largest,) = e.loop(vectors, [filled(I32, 0)], larger)
    flags = e.b.bitcast(e.b.icmp_signed(">", largest, filled(I32, limit)), ir.IntType(LANES))
    return e.b.icmp_unsigned("!=", flags, flags.type(0))


@inline_llvm
def clamp_row(e: Emitter, row: Int64, head_size: Int64, limit: Float32) -> None:
    """Clamp a row to +-limit in place; a NaN becomes -limit."""
    low, high = e.broadcast(e.b.fneg(limit)), e.broadcast(limit)
    with e.each(_vectors(e, head_size)) as i:
        place = e.at(row, i, LINE)
        e.store(e.smaller(e.larger(e.load_floats(place), low), high), place)


@inline_llvm
def encode_query(
    e: Emitter,
    words: Int64,
    row: Int64,
    head_size: Int64,
    largest: Int64,
    unit: Float32,
    to: Int64,
    state: Int64,
) -> None:
    """Round a rotated query row to codes, as `reference.round_query` does, and fill its state.

    Codes are bytes, or 16-bit words if `words`. In words, every four dims are in the order 0, 2, 1,
    3: the first pair multiplies the even bytes of a line of keys, the second pair the odd bytes.
    `row` and its partial maxima `largest` are not yet multiplied by `unit`.
    """
    b = e.b
    top = e.reduce(e.load_floats(largest), e.larger)
    steps = F32(float(k8v4.KEY_STEPS))
    is_positive = b.fcmp_ordered(">", top, F32(0.0))
    factor = e.broadcast(b.select(is_positive, b.fdiv(steps, top), F32(0.0)))

    def store_words(i: ir.Value, codes: ir.Value) -> None:
        order = [4 * (lane // 4) + (0, 2, 1, 3)[lane % 4] for lane in range(LANES)]
        narrow = b.trunc(codes, vector(I16))
        e.store(e.shuffle(narrow, narrow, order), e.at(to, i, 2 * LANES))

    def store_bytes(i: ir.Value, codes: ir.Value) -> None:
        e.store(b.trunc(codes, vector(I8)), e.at(to, i, LANES))

    def sixteen(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        x = e.load_floats(e.at(row, i, LINE))
        raised = b.fadd(b.fmul(x, factor), filled(F32, ROUNDING))
        codes = b.sub(b.bitcast(raised, vector(I32)), filled(I32, _ROUNDING_BITS))
        stores = (store_bytes, store_words)
        e.choose_number(words, (1, 0), lambda wide: stores[wide](i, codes))
        # The last vector may have only eight dims.
        left = e.broadcast(b.trunc(b.sub(head_size, b.shl(i, I64(4))), I32))
        is_dim = b.icmp_signed("<", constant(I32, range(LANES)), left)
        # The second sum adds 0 * x, so it is NaN if any number is NaN or infinite.
        counted = b.select(is_dim, codes, filled(I32, 0))
        return [b.add(sums[0], counted), e.fma(x, filled(F32, 0.0), sums[1])]

    zeros = [filled(I32, 0), filled(F32, 0.0)]
    total, not_finite = e.loop(_vectors(e, head_size), zeros, sixteen)
    step = b.fadd(b.fdiv(b.fmul(top, unit), steps), e.reduce(not_finite, b.fadd))
    raised_by = b.fmul(b.sitofp(e.reduce(total, b.add), F32), F32(128.0))
    for name, number in (("query_step", step), ("raised_by", raised_by)):
        e.store(number, e.at(state, 4 * records.STATE_FIELDS.index(name)))


def _larger_halves(e: Emitter, x: ir.Value, y: ir.Value, segment: int) -> ir.Value:
    """Compare the two halves of each segment, lane by lane. Returns maxima of `x`, then of `y`."""
    half = segment // 2
    first = [start + i for start in range(0, 2 * LANES, segment) for i in range(half)]
    return e.larger(e.shuffle(x, y, first), e.shuffle(x, y, [lane + half for lane in first]))


def _largest_of_eight(e: Emitter, eight: list[ir.Value]) -> ir.Value:
    """Return one vector with the maximum of each of eight vectors."""
    segment = LANES
    while len(eight) > 1:
        pairs = zip(eight[::2], eight[1::2], strict=True)
        eight = [_larger_halves(e, x, y, segment) for x, y in pairs]
        segment //= 2
    (last,) = eight
    even, odd = (e.shuffle(last, last, range(i, LANES, 2)) for i in range(2))
    return e.larger(even, odd)


@inline_llvm
def write_scales(
    e: Emitter, largest: Int64, unit: Float32, nan_tokens: Int64, results: Int64
) -> None:
    """Write the scales of four tokens, and the factors that turn their rows into codes.

    One call serves four tokens. Calls for single tokens would take a quarter of the time of
    encoding. Neither the partial maxima `largest` nor the rows are multiplied by `unit` yet, so the
    factors include it. If bit t of `nan_tokens` is set, the rows of token t are zeros and its
    scales become NaN.
    """
    b = e.b
    factor = e.broadcast(unit, 8)
    steps = constant(F32, 4 * [float(k8v4.KEY_STEPS)] + 4 * [k8v4.VALUE_STEPS])
    tops = _largest_of_eight(e, [e.load_floats(e.at(largest, LINE * i)) for i in range(8)])
    exact = b.fdiv(b.fmul(tops, factor), steps)
    exact = e.smaller(exact, filled(F32, k8v4.SCALE_MAX, 8))
    half = b.fptrunc(exact, vector(F16, 8))
    below = b.fcmp_ordered("<", b.fpext(half, exact.type), exact)
    scale = b.bitcast(half, vector(I16, 8))
    scale = b.add(scale, b.zext(below, scale.type))
    inverse = b.fmul(b.fdiv(filled(F32, 1.0, 8), e.halves_to_floats(scale)), factor)
    is_step = b.icmp_signed(">", scale, filled(I16, 0, 8))
    e.store(b.select(is_step, inverse, filled(F32, 0.0, 8)), e.at(results, INVERSES))
    is_nan = b.bitcast(b.trunc(nan_tokens, ir.IntType(4)), vector(ir.IntType(1), 4))
    is_nan = e.shuffle(is_nan, is_nan, range(8))
    e.store(b.select(is_nan, filled(I16, k8v4.NAN_SCALE_BITS, 8), scale), results)


_RoundRow = Callable[[ir.Value], ir.Value]


def _key_encoder(e: Emitter, results: ir.Value, token: int | ir.Value) -> _RoundRow:
    """Return a function that encodes 16 keys at an address. An int32's low byte is code + 128."""
    inverse = e.broadcast(e.load(F32, e.at(e.at(results, INVERSES), token, 4)))

    def raised_codes(place: ir.Value) -> ir.Value:
        raised = e.b.fadd(e.b.fmul(e.load_floats(place), inverse), filled(F32, ROUNDING + 128))
        return e.b.bitcast(raised, vector(I32))

    return raised_codes


def _value_encoder(e: Emitter, results: ir.Value, token: int | ir.Value) -> _RoundRow:
    """Return a function that encodes the 16 values at an address as codes plus `_ROUNDING_BITS`.

    As in the reference, three steps round: the product, adding 7.5, and converting to an integer.
    The clamp is needed because a value of 8 steps would become 15.5, which rounds to 16.
    """
    inverse = e.broadcast(e.load(F32, e.at(e.at(results, INVERSES + 16), token, 4)))
    middle = filled(F32, k8v4.MIDDLE_VALUE_CODE)

    def raised_codes(place: ir.Value) -> ir.Value:
        steps = e.b.fmul(e.load_floats(place), inverse)
        steps = e.larger(e.smaller(steps, middle), filled(F32, -k8v4.MIDDLE_VALUE_CODE))
        steps = e.b.fadd(steps, middle)
        return e.b.bitcast(e.b.fadd(steps, filled(F32, ROUNDING)), vector(I32))

    return raised_codes


def half_chunk(e: Emitter, chunk: ir.Value, head_size: ir.Value) -> ir.Value:
    """Return how many dims half a chunk has: 16, or fewer in the last chunk."""
    half = e.shift_right(e.b.sub(head_size, e.b.shl(chunk, I64(5))), 1)
    return e.b.select(e.b.icmp_signed("<", half, I64(LANES)), half, I64(LANES))


def _lines_of_keys(
    e: Emitter, head_size: ir.Value, to: ir.Value, lines_of: Callable[[ir.Value], list[ir.Value]]
) -> None:
    """Store keys into a tile. `lines_of(i)` emits 16 dims' bytes, split into the tile's lines."""
    with e.each(_vectors(e, head_size)) as i:
        lines, place = lines_of(i), e.at(to, i, 4 * LINE)
        for line in range(2):
            e.store(lines[line], e.at(place, LINE * line))
        # The last vector may have only eight dims.
        with e.b.if_then(e.b.icmp_signed("<", e.at(e.b.shl(i, I64(4)), 8), head_size)):
            for line in range(2, 4):
                e.store(lines[line], e.at(place, LINE * line))


@inline_llvm
def _store_keys(
    e: Emitter, to: Int64, row: Int64, results: Int64, token: Int64, head_size: Int64
) -> None:
    """Store one token's keys: four bytes in each line of the tile."""
    encoded = _key_encoder(e, results, token)

    def lines_of(i: ir.Value) -> list[ir.Value]:
        codes = e.b.trunc(encoded(e.at(row, i, LINE)), vector(I8))
        words = e.b.bitcast(codes, vector(I32, 4))
        return [e.b.extract_element(words, I32(line)) for line in range(4)]

    _lines_of_keys(e, head_size, to, lines_of)


@inline_llvm
def _store_key_quad(e: Emitter, to: Int64, rows: Int64, results: Int64, head_size: Int64) -> None:
    """Store the keys of a quad's four tokens, which take 16 of the 64 bytes in each line of a tile.

    Each shuffle moves a token's codes inside groups of 16 bytes. If the words were first converted
    to bytes, codes would move between groups, which takes twice the time.
    """
    encoders = [_key_encoder(e, results, token) for token in range(4)]
    zeros = filled(I8, 0, 4 * LANES)

    def lines_of(i: ir.Value) -> list[ir.Value]:
        sources = e.rows(e.at(rows, i, LINE), I64(ROW_BYTES), 4)
        total = zeros
        for token, (encoded, source) in enumerate(zip(encoders, sources, strict=True)):
            codes = e.b.bitcast(encoded(source), zeros.type)
            order = [
                16 * line + 4 * dim if of == token else 4 * LANES
                for line in range(4)
                for of in range(4)
                for dim in range(4)
            ]
            total = e.b.or_(total, e.shuffle(codes, zeros, order))
        lines = e.b.bitcast(total, vector(I32))
        return [e.shuffle(lines, lines, range(4 * line, 4 * line + 4)) for line in range(4)]

    _lines_of_keys(e, head_size, to, lines_of)


@inline_llvm
def _store_values(
    e: Emitter, to: Int64, row: Int64, results: Int64, token: Int64, head_size: Int64, quad: Int64
) -> None:
    """Store one token's values: every fourth byte of one line in each chunk of 32 dims."""
    raised_codes = _value_encoder(e, results, token)
    with e.each(e.shift_right(e.at(head_size, 31), 5)) as i:
        width = half_chunk(e, i, head_size)
        source = e.at(row, i, 2 * LINE)
        low, high = raised_codes(source), raised_codes(e.at(source, width, 4))
        codes = e.b.trunc(e.b.or_(low, e.b.shl(high, filled(I32, 4))), vector(I8))
        line = e.at(e.at(to, i, 4 * LINE), e.b.mul(quad, width), 4)
        with e.each(width) as j:
            e.store(e.b.extract_element(codes, e.b.trunc(j, I32)), e.at(line, j, 4))


@inline_llvm
def _store_value_quad(
    e: Emitter, to: Int64, rows: Int64, results: Int64, head_size: Int64, quad: Int64
) -> None:
    """Store the values of a quad's four tokens, which fill one line in each chunk of 32 dims.

    A 32-bit lane collects a byte (two dims) of each of the four tokens: the results of the four
    encoders are shifted and added. Each result contains `_ROUNDING_BITS`. Their shifted sum is a
    constant, which is subtracted at the end.
    """
    encoders = [_value_encoder(e, results, token) for token in range(4)]
    with e.each(e.shift_right(e.at(head_size, 31), 5)) as i:
        width = half_chunk(e, i, head_size)
        total = filled(I32, 0)
        raised_by = 0
        for token, source in enumerate(e.rows(e.at(rows, i, 2 * LINE), I64(ROW_BYTES), 4)):
            for half, place in enumerate((source, e.at(source, width, 4))):
                shift = 8 * _BYTE_OF_TOKEN[token] + 4 * half
                raised = encoders[token](place)
                total = e.b.add(total, e.b.shl(raised, filled(I32, shift)))
                raised_by += _ROUNDING_BITS << shift
        total = e.b.sub(total, filled(I32, raised_by % 2**32))
        line = e.at(e.at(to, i, 4 * LINE), e.b.mul(quad, width), 4)
        parts = {size: e.shuffle(total, total, range(size)) for size in (16, 12, 8, 4)}
        e.choose_number(width, list(parts), lambda size: e.store(parts[size], line))


@numba.njit
def place(rows, results, token, quad, head_size, region, page_size, t):  # type: ignore[no-untyped-def]
    """Store one of four tokens at position t of a head's region. If `quad`, store all four."""
    plane = region + page_size * head_size
    scales = plane + page_size * (head_size // 2) + 2 * t
    tile, quad_of_tile = t // _TILE * _TILE, t % _TILE // 4
    to_keys = region + tile * head_size + 4 * (t % _TILE)
    to_values = plane + tile * (head_size // 2)
    value_scales = scales + 2 * page_size
    if quad:
        inline.copy_bytes(scales, results, 8)
        inline.copy_bytes(value_scales, results + 8, 8)
        _store_key_quad(to_keys, rows, results, head_size)
        _store_value_quad(to_values, rows + VALUE_ROWS, results, head_size, quad_of_tile)
        return
    inline.copy_bytes(scales, results + 2 * token, 2)
    inline.copy_bytes(value_scales, results + 8 + 2 * token, 2)
    row = rows + token * ROW_BYTES
    _store_keys(to_keys, row, results, token, head_size)
    to = to_values + _BYTE_OF_TOKEN[t % 4]
    _store_values(to, row + VALUE_ROWS, results, token, head_size, quad_of_tile)
