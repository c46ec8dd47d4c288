# SPDX-License-Identifier: Apache-2.0
"""Paged attention in float32 and plain LLVM vectors, for any CPU, query dtype and page layout.

A tile of 16 tokens is decoded to float32 in scratch memory and multiplied from there. Keys are
decoded through fp16, whose conversion instruction handles denormals: an e4m3 code moved into
fp16's fields is 2^-8 of the key. `_KEY_SCALE` in the scale of the scores compensates for it.
"""

from __future__ import annotations

import sys

from llvmlite import ir

from vllm_hybrid_kv.kernels.cpu import inline, records, softmax, work_item
from vllm_hybrid_kv.kernels.cpu.inline import Int64, inline_llvm
from vllm_hybrid_kv.kernels.cpu.llvm import (
    F32,
    I8,
    I16,
    I32,
    I64,
    LANES,
    LINE,
    ZEROS,
    Emitter,
    constant,
    filled,
    vector,
)
from vllm_hybrid_kv.kernels.cpu.records import QUERY_STRIDE, SCORE_STRIDE, TILE
from vllm_hybrid_kv.kernels.k8v4 import QUAD_BYTE_OF_TOKEN

_KEY_SCALE = 256.0
"""Factor from decoded keys to keys."""

_KEY_STRIDE = 2 * LINE
"""Bytes between dims of decoded keys: two tiles of tokens, one after the other."""

_BLOCKS = (1, 2, 3, 4)
"""Numbers of rows that the products take at once."""


def _halves_of_codes(e: Emitter, codes: ir.Value) -> ir.Value:
    """Move e4m3 codes in 16-bit lanes (upper byte 0) into fp16's fields."""
    b = e.b
    magnitude = b.shl(b.and_(codes, filled(I16, 0x7F)), filled(I16, 7))
    return b.or_(magnitude, b.shl(b.and_(codes, filled(I16, 0x80)), filled(I16, 8)))


@inline_llvm
def _decode_tiled_keys(e: Emitter, tile: Int64, to: Int64, dims: Int64) -> None:
    """Decode the key tile of a `CPU_TILED` page to float32 [D, 16], rows `_KEY_STRIDE` apart."""
    with e.each(e.shift_right(dims, 2)) as i:
        words = e.load_line(16, e.at(tile, i, 4 * LANES))
        for pair in range(2):
            lanes = [8 * quad + 4 * pair + t for quad in range(4) for t in range(4)]
            of_pair = e.shuffle(words, words, lanes)
            row = e.at(e.at(to, i, 4 * _KEY_STRIDE), 2 * pair * _KEY_STRIDE)
            even = _halves_of_codes(e, e.b.and_(of_pair, filled(I16, 0xFF)))
            odd = _halves_of_codes(e, e.b.lshr(of_pair, filled(I16, 8)))
            e.store(e.halves_to_floats(even), row)
            e.store(e.halves_to_floats(odd), e.at(row, _KEY_STRIDE))


@inline_llvm
def _decode_linear_keys(e: Emitter, tile: Int64, to: Int64, dims: Int64) -> None:
    """Decode 16 tokens' keys of a `LINEAR` page to float32 [D, 16], rows `_KEY_STRIDE` apart."""
    with e.each(dims) as i:
        codes = ir.Constant(vector(I8), ir.Undefined)
        for token, address in enumerate(e.rows(e.b.add(tile, i), dims, LANES)):
            codes = e.b.insert_element(codes, e.load(I8, address), I32(token))
        halves = _halves_of_codes(e, e.b.zext(codes, vector(I16)))
        e.store(e.halves_to_floats(halves), e.at(to, i, _KEY_STRIDE))


@inline_llvm
def _decode_tiled_values(e: Emitter, tile: Int64, to: Int64, dims: Int64) -> None:
    """Decode the value codes of a `CPU_TILED` tile to float32 [16, D]."""
    with e.each(e.shift_right(dims, 3)) as i:
        words = e.load_line(32, e.at(tile, i, LINE))
        chunk, token = e.shift_right(i, 2), e.b.mul(e.b.and_(i, I64(3)), I64(4))
        line = e.at(e.at(to, chunk, 2 * LINE), e.b.mul(token, dims), 4)
        for row, byte in zip(
            e.rows(line, e.b.mul(dims, I64(4)), 4), QUAD_BYTE_OF_TOKEN, strict=True
        ):
            for half in range(2):
                codes = e.b.lshr(words, filled(I32, 8 * byte + 4 * half))
                codes = e.b.and_(codes, filled(I32, 15))
                e.store(e.b.uitofp(codes, vector(F32)), e.at(row, LINE * half))


@inline_llvm
def _decode_linear_values(e: Emitter, tile: Int64, to: Int64, dims: Int64, stride: Int64) -> None:
    """Decode 16 tokens' value codes of a `LINEAR` page to float32, rows `stride` bytes apart."""
    eights = e.shift_right(dims, 3)
    with e.each(I64(LANES)) as token, e.each(eights) as i:
        source = e.at(e.at(tile, e.b.mul(token, eights), 4), i, 4)
        codes = e.b.lshr(e.broadcast(e.load(I32, source), 8), constant(I32, range(0, 32, 4)))
        codes = e.b.and_(codes, filled(I32, 15, 8))
        place = e.at(e.b.add(to, e.b.mul(token, stride)), i, 32)
        e.store(e.b.uitofp(codes, vector(F32, 8)), place)


@inline_llvm
def _dot(e: Emitter, count: Int64, queries: Int64, keys: Int64, dims: Int64, scores: Int64) -> None:
    """Write the products of up to 4 queries with 32 tokens of decoded keys."""

    def emit(rows: int) -> None:
        starts = e.rows(queries, I64(QUERY_STRIDE), rows)

        def dim(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            line = e.at(keys, i, _KEY_STRIDE)
            key = [e.load_floats(e.at(line, LINE * tile)) for tile in range(2)]
            query = [e.broadcast(e.load(F32, e.at(start, i, 4))) for start in starts]
            return [e.fma(query[n // 2], key[n % 2], total) for n, total in enumerate(sums)]

        for n, total in enumerate(e.loop(dims, [ZEROS] * (2 * rows), dim)):
            e.store(total, e.at(scores, SCORE_STRIDE * (n // 2) + LINE * (n % 2)))

    e.choose_number(count, _BLOCKS, emit, "<=")


@inline_llvm
def _accumulate(
    e: Emitter,
    count: Int64,
    weights: Int64,
    values: Int64,
    tokens: Int64,
    outputs: Int64,
    stride: Int64,
) -> None:
    """Add up to 4 rows of weights times decoded values to outputs; rows `stride` bytes apart."""

    def emit(rows: int) -> None:
        starts = e.rows(weights, I64(SCORE_STRIDE), rows)
        with e.each(e.shift_right(stride, 6)) as column:
            first = e.at(values, column, LINE)

            def two_tokens(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                line = e.b.add(first, e.b.mul(e.b.mul(i, I64(2)), stride))
                value = [e.load_floats(line), e.load_floats(e.b.add(line, stride))]
                places = [e.at(e.at(start, i, 8), 4 * odd) for start in starts for odd in range(2)]
                weight = [e.broadcast(e.load(F32, place)) for place in places]
                return [e.fma(weight[n], value[n % 2], total) for n, total in enumerate(sums)]

            # Even and odd tokens have separate sums, so that no addition waits for another.
            sums = e.loop(e.shift_right(tokens, 1), [ZEROS] * (2 * rows), two_tokens)
            for row, output in enumerate(e.rows(outputs, stride, rows)):
                place = e.at(output, column, LINE)
                added = e.b.fadd(sums[2 * row], sums[2 * row + 1])
                e.store(e.b.fadd(e.load_floats(place), added), place)

    e.choose_number(count, _BLOCKS, emit, "<=")


_weigh = work_item.weigher(softmax.FLOATS, _KEY_SCALE)


@work_item.inner
def _attend_chunk(call, item, scratch, state, first, tiles, ahead, count):  # type: ignore[no-untyped-def]
    inline.noinline()
    keys, values = scratch + records.KEYS_AT, scratch + records.VALUES_AT
    for tile in range(0, count, 2):
        for i in range(tile, min(tile + 2, count)):
            to = keys + LINE * (i - tile)
            if call.tiled:
                _decode_tiled_keys(tiles[i].keys, to, call.dims)
            else:
                _decode_linear_keys(tiles[i].keys, to, call.dims)
        for row in range(0, item.rows, 4):
            queries = scratch + records.QUERIES_AT + row * QUERY_STRIDE
            scores = scratch + records.SCORES_AT + row * SCORE_STRIDE + LINE * tile
            _dot(item.rows - row, queries, keys, call.dims, scores)
    _weigh(call, item, scratch, state, first, count, 0)
    for i in range(count):
        to = values + i * TILE * call.output_stride
        if call.tiled:
            _decode_tiled_values(tiles[i].values, to, call.dims)
        else:
            _decode_linear_values(tiles[i].values, to, call.dims, call.output_stride)
    for row in range(0, item.rows, 4):
        weights = scratch + records.WEIGHTS_AT + row * SCORE_STRIDE
        outputs = scratch + records.OUTPUTS_AT + row * call.output_stride
        _accumulate(item.rows - row, weights, values, TILE * count, outputs, call.output_stride)


_attend = work_item.item_loop(sys.maxsize, 64, _attend_chunk, _attend_chunk, portable=True)


def work(call_address, scratch):  # type: ignore[no-untyped-def]
    """Process items of a call until none is left; both arguments are addresses."""
    _attend(records.attention_call_at(call_address), scratch)
