# SPDX-License-Identifier: Apache-2.0
"""Paged attention with the AVX-512 BF16 dot product, for bf16 queries and `CPU_TILED` pages.

    sums[column] += pair[column, 0] * row[0] + pair[column, 1] * row[1]

A block of rows keeps its sums in registers. For few rows the operands come straight from the page;
for more rows they are widened to scratch memory once.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from vllm_hybrid_kv.kernels.cpu import bf16_tiles, memory, records, softmax, work_item
from vllm_hybrid_kv.kernels.cpu.bf16_tiles import OPERAND, key_pairs, value_pairs
from vllm_hybrid_kv.kernels.cpu.compile_cache import cached_callback
from vllm_hybrid_kv.kernels.cpu.llvm import (
    BF16,
    F32,
    I32,
    I64,
    LINE,
    ZEROS,
    Emitter,
    Int64,
    inline_llvm,
    vector,
)
from vllm_hybrid_kv.kernels.cpu.records import SCORE_STRIDE, TILE_RECORD

_FEW_ROWS = 8
"""Most rows whose operands come straight from the page."""

_MANY_ROWS = 8
"""Rows that are multiplied at once with widened operands."""

_CHUNK_OF_FEW = 64


def _dot(e: Emitter, sums: ir.Value, operand: ir.Value, pair: ir.Value) -> ir.Value:
    kind = vector(BF16, 32)
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    left, right = e.b.bitcast(operand, kind), e.b.bitcast(pair, kind)
    return e.call(name, vector(F32), sums, left, right)


def _pair(e: Emitter, address: ir.Value) -> ir.Value:
    return e.broadcast(e.load(I32, address))


def _choose_rows(e: Emitter, count: ir.Value, emit: Callable[[int], None]) -> None:
    """Emit code for the smallest block of rows that holds `count` rows."""
    e.choose((1, 2, 4, 8), lambda rows: e.b.icmp_signed("<=", count, I64(rows)), emit)


def _score_rows(
    e: Emitter,
    rows: int,
    load_pairs: Callable[[int, ir.Value], tuple[ir.Value, ir.Value]],
    queries: ir.Value,
    dims: ir.Value,
    scores: ir.Value,
) -> None:
    """Write scores of `rows` queries against two tiles.

    `load_pairs(tile, i)` returns the operands of the tile's dims 4 i to 4 i + 3.
    """
    starts = e.rows(queries, e.b.mul(dims, I64(2)), rows)

    def four_dims(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        operands = [load_pairs(tile, i) for tile in range(2)]
        for pair in range(2):
            query = [_pair(e, e.at(e.at(start, i, 8), 4 * pair)) for start in starts]
            sums = [
                _dot(e, sums[2 * row + tile], operands[tile][pair], query[row])
                for row in range(rows)
                for tile in range(2)
            ]
        return sums

    sums = e.loop(e.shift_right(dims, 2), [ZEROS] * (2 * rows), four_dims)
    for row, place in enumerate(e.rows(scores, I64(SCORE_STRIDE), rows)):
        for tile in range(2):
            e.store(sums[2 * row + tile], e.at(place, LINE * tile))


@inline_llvm
def _scores_of_page(
    e: Emitter, count: Int64, tiles: Int64, ahead: Int64, queries: Int64, dims: Int64, scores: Int64
) -> None:
    """Write `count` rows' scores against two key tiles of a page, and prefetch those of `ahead`."""
    bases = [e.load(I64, e.at(tiles, TILE_RECORD * t)) for t in range(2)]
    next_bases = [e.load(I64, e.at(ahead, TILE_RECORD * t)) for t in range(2)]

    def load_pairs(tile: int, i: ir.Value) -> tuple[ir.Value, ir.Value]:
        e.prefetch(e.at(next_bases[tile], i, LINE))
        return key_pairs(e, e.load_line(8, e.at(bases[tile], i, LINE)))

    _choose_rows(e, count, lambda rows: _score_rows(e, rows, load_pairs, queries, dims, scores))


@inline_llvm
def _scores_widened(e: Emitter, keys: Int64, queries: Int64, dims: Int64, scores: Int64) -> None:
    """Write eight rows' scores against two widened key tiles, one after the other."""
    bases = [keys, e.at(keys, dims, 2 * 16)]

    def load_pairs(tile: int, i: ir.Value) -> tuple[ir.Value, ir.Value]:
        first = e.at(bases[tile], i, 2 * LINE)
        return e.load_line(16, first), e.load_line(16, e.at(first, LINE))

    _score_rows(e, _MANY_ROWS, load_pairs, queries, dims, scores)


def _output_rows(
    e: Emitter,
    rows: int,
    load_quad: Callable[[ir.Value, int], list[ir.Value]],
    tiles: ir.Value,
    weights: ir.Value,
    outputs: ir.Value,
    output_stride: ir.Value,
) -> None:
    """Add `rows` rows' weights of `tiles` tiles times values to 32 dims of their outputs.

    `load_quad(tile, quad)` returns a quad's operands in the order of `value_pairs`.
    """
    starts = e.rows(weights, I64(SCORE_STRIDE), rows)
    places = [
        e.at(row, LINE * half) for row in e.rows(outputs, output_stride, rows) for half in range(2)
    ]

    def tile(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        for quad in range(4):
            operands = load_quad(i, quad)
            for pair in range(2):
                offset = 8 * quad + 4 * pair
                weight = [_pair(e, e.at(e.at(start, i, 32), offset)) for start in starts]
                sums = [
                    _dot(e, sums[2 * row + half], operands[2 * pair + half], weight[row])
                    for row in range(rows)
                    for half in range(2)
                ]
        return sums

    before = [e.load_floats(place) for place in places]
    for total, place in zip(e.loop(tiles, before, tile), places, strict=True):
        e.store(total, place)


@inline_llvm
def _outputs_of_page(
    e: Emitter,
    count: Int64,
    tiles: Int64,
    num_tiles: Int64,
    chunk: Int64,
    ahead: Int64,
    weights: Int64,
    outputs: Int64,
    output_stride: Int64,
) -> None:
    """Add `count` rows' weights times a page's values to 32 dims; prefetch the tiles of `ahead`."""

    def load_quad(i: ir.Value, quad: int) -> list[ir.Value]:
        offset = e.at(I64(8), i, TILE_RECORD)
        base = e.load(I64, e.b.add(tiles, offset))
        next_base = e.load(I64, e.b.add(ahead, offset))
        e.prefetch(e.at(e.at(next_base, chunk, 4 * LINE), LINE * quad))
        place = e.at(e.at(base, chunk, 4 * LINE), LINE * quad)
        return value_pairs(e, e.load_line(16, place))

    place = e.at(outputs, chunk, 2 * LINE)
    _choose_rows(
        e,
        count,
        lambda rows: _output_rows(e, rows, load_quad, num_tiles, weights, place, output_stride),
    )


@inline_llvm
def _outputs_widened(
    e: Emitter,
    values: Int64,
    num_tiles: Int64,
    chunk: Int64,
    dims: Int64,
    weights: Int64,
    outputs: Int64,
    output_stride: Int64,
) -> None:
    """Add eight rows' weights times widened value tiles to 32 dims of their outputs."""
    of_chunk = e.at(values, chunk, 2 * OPERAND)
    two_tiles = e.b.mul(dims, I64(OPERAND // 16))

    def load_quad(i: ir.Value, quad: int) -> list[ir.Value]:
        of_tiles = e.b.add(of_chunk, e.b.mul(e.shift_right(i, 1), two_tiles))
        first = e.at(e.at(of_tiles, e.b.and_(i, I64(1)), 8 * LINE), 2 * LINE * quad)
        return [
            e.load_line(16, e.at(first, OPERAND * half + LINE * pair))
            for pair in range(2)
            for half in range(2)
        ]

    place = e.at(outputs, chunk, 2 * LINE)
    _output_rows(e, _MANY_ROWS, load_quad, num_tiles, weights, place, output_stride)


@work_item.inner
def _scores_of_few(call, item, scratch, tiles, ahead, count):  # type: ignore[no-untyped-def]
    memory.noinline()
    for tile in range(0, count, 2):
        _scores_of_page(
            item.rows,
            tiles.ctypes.data + TILE_RECORD * tile,
            ahead.ctypes.data + TILE_RECORD * tile,
            scratch + records.QUERIES_AT,
            call.dims,
            scratch + records.SCORES_AT + LINE * tile,
        )


@work_item.inner
def _outputs_of_few(call, item, scratch, tiles, ahead, count):  # type: ignore[no-untyped-def]
    memory.noinline()
    for chunk in range(call.dims // 32):
        _outputs_of_page(
            item.rows,
            tiles.ctypes.data,
            count,
            chunk,
            ahead.ctypes.data,
            scratch + records.WEIGHTS_AT,
            scratch + records.OUTPUTS_AT,
            call.output_stride,
        )


@work_item.inner
def _scores_of_many(call, item, scratch, tiles, ahead, count):  # type: ignore[no-untyped-def]
    memory.noinline()
    for tile in range(0, count, 2):
        bf16_tiles.widen_keys(call, scratch, tiles, ahead, tile, min(tile + 2, count))
        for row in range(0, item.rows, _MANY_ROWS):
            _scores_widened(
                scratch + records.KEYS_AT,
                scratch + records.QUERIES_AT + row * 2 * call.dims,
                call.dims,
                scratch + records.SCORES_AT + row * SCORE_STRIDE + LINE * tile,
            )


@work_item.inner
def _outputs_of_many(call, item, scratch, tiles, ahead, count):  # type: ignore[no-untyped-def]
    memory.noinline()
    bf16_tiles.widen_values(call, scratch, tiles, ahead, count)
    for chunk in range(call.dims // 32):
        for row in range(0, item.rows, _MANY_ROWS):
            _outputs_widened(
                scratch + records.VALUES_AT,
                count,
                chunk,
                call.dims,
                scratch + records.WEIGHTS_AT + row * SCORE_STRIDE,
                scratch + records.OUTPUTS_AT + row * call.output_stride,
                call.output_stride,
            )


@work_item.inner
def _prepare(item, few, scratch):  # type: ignore[no-untyped-def]
    pass


@work_item.inner
def _attend_few(call, item, scratch, state, first, tiles, ahead, count):  # type: ignore[no-untyped-def]
    _scores_of_few(call, item, scratch, tiles, ahead, count)
    work_item.weigh(call, item, scratch, state, first, count, 1.0, softmax.BFLOATS, 0)
    _outputs_of_few(call, item, scratch, tiles, ahead, count)


@work_item.inner
def _attend_many(call, item, scratch, state, first, tiles, ahead, count):  # type: ignore[no-untyped-def]
    _scores_of_many(call, item, scratch, tiles, ahead, count)
    work_item.weigh(call, item, scratch, state, first, count, 1.0, softmax.BFLOATS, 0)
    _outputs_of_many(call, item, scratch, tiles, ahead, count)


_attend = bf16_tiles.chunk_loop(_FEW_ROWS, _CHUNK_OF_FEW, _prepare, _attend_few, _attend_many)


@cached_callback
def work(call_address, scratch):  # type: ignore[no-untyped-def]
    """Process items of a call until none is left; both arguments are addresses."""
    call = records.attention_call_at(call_address)
    count = call.num_items * call.num_kv_heads
    index = memory.fetch_add(call.counters)
    while index < count:
        index = _attend(call, index, scratch)
