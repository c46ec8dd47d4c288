# SPDX-License-Identifier: Apache-2.0
"""Paged attention in float32 and plain LLVM vectors, for any CPU, query dtype and page layout.

A tile of 16 tokens is decoded to float32 in scratch memory and multiplied from there. Keys are
decoded through fp16, whose conversion instruction handles denormals: an e4m3 code moved into
fp16's fields is 2^-8 of the key. `_KEY_SCALE` in the scale of the scores compensates for it.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.cpu import memory, records, softmax, work_item
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
from vllm_hybrid_kv.kernels.cpu.records import SCORE_STRIDE, TILE

_CHUNK = 64
_TILES = _CHUNK // TILE
_QUERY_STRIDE = 4 * records.MAX_DIMS

_KEY_SCALE = 256.0
"""Factor from decoded keys to keys."""

_KEY_STRIDE = 2 * LINE
"""Bytes between dims of decoded keys: two tiles of tokens, one after the other."""

_ROWS = (4, 2, 1)
"""Numbers of rows that the products take at once."""


def _halves_of_codes(e: Emitter, codes: ir.Value) -> ir.Value:
    """Move e4m3 codes in 16-bit lanes (upper byte 0) into fp16's fields."""
    b = e.b
    magnitude = b.shl(b.and_(codes, filled(I16, 0x7F)), filled(I16, 7))
    return b.or_(magnitude, b.shl(b.and_(codes, filled(I16, 0x80)), filled(I16, 8)))


@inline_llvm
def _decode_tiled_keys(e: Emitter, tile: Int64, to: Int64, dims: Int64) -> None:
    """Decode the key tile of a `CPU_TILED` page to float32 [D, 16], rows `_KEY_STRIDE` apart."""

    def line(i: ir.Value, _: list[ir.Value]) -> None:
        words = e.load_line(16, e.at(tile, i, 4 * LANES))
        for pair in range(2):
            lanes = [8 * quad + 4 * pair + t for quad in range(4) for t in range(4)]
            of_pair = e.shuffle(words, words, lanes)
            row = e.at(to, e.b.add(e.b.mul(i, I64(4)), I64(2 * pair)), _KEY_STRIDE)
            even = _halves_of_codes(e, e.b.and_(of_pair, filled(I16, 0xFF)))
            odd = _halves_of_codes(e, e.b.lshr(of_pair, filled(I16, 8)))
            e.store(e.halves_to_floats(even), row)
            e.store(e.halves_to_floats(odd), e.at(row, _KEY_STRIDE))

    e.loop(e.shift_right(dims, 2), [], line)


@inline_llvm
def _decode_linear_keys(e: Emitter, tile: Int64, to: Int64, dims: Int64) -> None:
    """Decode 16 tokens' keys of a `LINEAR` page to float32 [D, 16], rows `_KEY_STRIDE` apart."""

    def dim(i: ir.Value, _: list[ir.Value]) -> None:
        codes = ir.Constant(vector(I8), ir.Undefined)
        address = e.b.add(tile, i)
        for token in range(LANES):
            codes = e.b.insert_element(codes, e.load(I8, address), I32(token))
            address = e.b.add(address, dims)
        halves = _halves_of_codes(e, e.b.zext(codes, vector(I16)))
        e.store(e.halves_to_floats(halves), e.at(to, i, _KEY_STRIDE))

    e.loop(dims, [], dim)


@inline_llvm
def _decode_tiled_values(e: Emitter, tile: Int64, to: Int64, dims: Int64) -> None:
    """Decode the value codes of a `CPU_TILED` tile to float32 [16, D]."""

    def quad(i: ir.Value, _: list[ir.Value]) -> None:
        words = e.load_line(32, e.at(tile, i, LINE))
        chunk, token = e.shift_right(i, 2), e.b.mul(e.b.and_(i, I64(3)), I64(4))
        line = e.at(e.at(to, chunk, 2 * LINE), e.b.mul(token, dims), 4)
        for of_quad, byte in enumerate(k8v4.QUAD_BYTE_OF_TOKEN):
            for half in range(2):
                shift = 8 * byte + 4 * half
                codes = e.b.lshr(words, filled(I32, shift)) if shift else words
                codes = e.b.and_(codes, filled(I32, 15))
                place = e.at(line, e.b.mul(dims, I64(of_quad)), 4)
                e.store(e.b.uitofp(codes, vector(F32)), e.at(place, LINE * half))

    e.loop(e.shift_right(dims, 3), [], quad)


@inline_llvm
def _decode_linear_values(e: Emitter, tile: Int64, to: Int64, dims: Int64, stride: Int64) -> None:
    """Decode 16 tokens' value codes of a `LINEAR` page to float32, rows `stride` bytes apart."""
    eights = e.shift_right(dims, 3)

    def token(t: ir.Value, _: list[ir.Value]) -> None:
        source = e.at(tile, e.b.mul(t, eights), 4)
        line = e.b.add(to, e.b.mul(t, stride))

        def eight(i: ir.Value, _: list[ir.Value]) -> None:
            word = e.broadcast(e.load(I32, e.at(source, i, 4)), 8)
            codes = e.b.lshr(word, constant(I32, [4 * k for k in range(8)]))
            codes = e.b.and_(codes, filled(I32, 15, 8))
            e.store(e.b.uitofp(codes, vector(F32, 8)), e.at(line, i, 32))

        e.loop(eights, [], eight)

    e.loop(I64(LANES), [], token)


@inline_llvm
def _dot(e: Emitter, count: Int64, queries: Int64, keys: Int64, dims: Int64, scores: Int64) -> None:
    """Write the products of 4, 2 or 1 queries with 32 tokens of decoded keys."""

    def emit(rows: int) -> None:
        starts = e.rows(queries, I64(_QUERY_STRIDE), rows)

        def dim(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            line = e.at(keys, i, _KEY_STRIDE)
            key = [e.load_floats(e.at(line, LINE * tile)) for tile in range(2)]
            query = [e.broadcast(e.load(F32, e.at(start, i, 4))) for start in starts]
            return [
                e.fma(query[row], key[tile], sums[2 * row + tile])
                for row in range(rows)
                for tile in range(2)
            ]

        sums = e.loop(dims, [ZEROS] * (2 * rows), dim)
        for row, line in enumerate(e.rows(scores, I64(SCORE_STRIDE), rows)):
            for tile in range(2):
                e.store(sums[2 * row + tile], e.at(line, LINE * tile))

    e.choose_number(count, _ROWS, emit)


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
    """Add 4, 2 or 1 rows of weights times decoded values to outputs; rows `stride` bytes apart."""

    def emit(rows: int) -> None:
        starts = e.rows(weights, I64(SCORE_STRIDE), rows)

        def sixteen_dims(column: ir.Value, _: list[ir.Value]) -> None:
            first = e.at(values, column, LINE)

            def two_tokens(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                line = e.b.add(first, e.b.mul(e.b.mul(i, I64(2)), stride))
                value = [e.load_floats(line), e.load_floats(e.b.add(line, stride))]
                return [
                    e.fma(
                        e.broadcast(e.load(F32, e.at(e.at(start, i, 8), 4 * odd))),
                        value[odd],
                        sums[2 * row + odd],
                    )
                    for row, start in enumerate(starts)
                    for odd in range(2)
                ]

            # Even and odd tokens have separate sums, so that no addition waits for another.
            sums = e.loop(e.shift_right(tokens, 1), [ZEROS] * (2 * rows), two_tokens)
            for row, output in enumerate(e.rows(outputs, stride, rows)):
                place = e.at(output, column, LINE)
                added = e.b.fadd(sums[2 * row], sums[2 * row + 1])
                e.store(e.b.fadd(e.load_floats(place), added), place)

        e.loop(e.shift_right(stride, 6), [], sixteen_dims)

    e.choose_number(count, _ROWS, emit)


@work_item.inner
def _rows_at_once(rows_left):  # type: ignore[no-untyped-def]
    return 4 if rows_left >= 4 else 2 if rows_left >= 2 else 1


@work_item.inner
def _scores(call, item, scratch, tiles, count):  # type: ignore[no-untyped-def]
    memory.noinline()
    keys = scratch + records.KEYS_AT
    for first in range(0, count, 2):
        for i in range(first, min(first + 2, count)):
            to = keys + LINE * (i - first)
            if call.tiled:
                _decode_tiled_keys(tiles[i].keys, to, call.dims)
            else:
                _decode_linear_keys(tiles[i].keys, to, call.dims)
        row = 0
        while row < item.rows:
            rows = _rows_at_once(item.rows - row)
            queries = scratch + records.QUERIES_AT + row * _QUERY_STRIDE
            scores = scratch + records.SCORES_AT + row * SCORE_STRIDE + LINE * first
            _dot(rows, queries, keys, call.dims, scores)
            row += rows


@work_item.inner
def _outputs(call, item, scratch, tiles, count):  # type: ignore[no-untyped-def]
    memory.noinline()
    values = scratch + records.VALUES_AT
    for i in range(count):
        to = values + i * TILE * call.output_stride
        if call.tiled:
            _decode_tiled_values(tiles[i].values, to, call.dims)
        else:
            _decode_linear_values(tiles[i].values, to, call.dims, call.output_stride)
    row = 0
    while row < item.rows:
        rows = _rows_at_once(item.rows - row)
        weights = scratch + records.WEIGHTS_AT + row * SCORE_STRIDE
        outputs = scratch + records.OUTPUTS_AT + row * call.output_stride
        _accumulate(rows, weights, values, TILE * count, outputs, call.output_stride)
        row += rows


@work_item.inner
def _attend(call, item, head, scratch):  # type: ignore[no-untyped-def]
    state = np.empty(records.ROW_BLOCK, records.ROW_STATE)
    tiles = np.empty(_TILES, records.TILE_ADDRESSES)
    work_item.begin(call, item, head, scratch, state, _QUERY_STRIDE, widen=True)
    first, last = work_item.keys_of_item(call, item)
    while first < last:
        count = work_item.tiles_of_chunk(first, last, np.int64(_CHUNK))
        work_item.find_tiles(call, item, head, first, count, tiles)
        work_item.load_scales(scratch, tiles, count, 0.0)
        _scores(call, item, scratch, tiles, count)
        work_item.weigh(call, item, scratch, state, first, count, _KEY_SCALE, softmax.FLOATS, 0)
        _outputs(call, item, scratch, tiles, count)
        first = work_item.next_chunk(first, np.int64(_CHUNK))
    work_item.finish(call, item, head, scratch, state)


def work(call_address, scratch):  # type: ignore[no-untyped-def]
    """Process items of a call until none is left; both arguments are addresses."""
    call = records.attention_call_at(call_address)
    count = call.num_items * call.num_kv_heads
    index = memory.fetch_add(call.counters)
    while index < count:
        item, head = divmod(index, call.num_kv_heads)
        _attend(call, work_item.item_at(call, item), head, scratch)
        index = memory.fetch_add(call.counters)
