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
from vllm_hybrid_kv.kernels.cpu.inline import Int64, inline_llvm
from vllm_hybrid_kv.kernels.cpu.llvm import BF16, F32, I32, I64, LINE, ZEROS, Emitter, vector
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
    e: Emitter, rows: Int64, tiles: Int64, ahead: Int64, count: Int64, dims: Int64, scratch: Int64
) -> None:
    """Write up to 8 rows' scores against `count` key tiles of pages, and prefetch as many."""

    def two_tiles(i: ir.Value, _: list[ir.Value]) -> None:
        bases, next_bases = (
            [
                e.load(I64, e.at(e.at(addresses, i, 2 * TILE_RECORD), TILE_RECORD * t))
                for t in (0, 1)
            ]
            for addresses in (tiles, ahead)
        )
        queries = e.at(scratch, records.QUERIES_AT)
        scores = e.at(e.at(scratch, records.SCORES_AT), i, 2 * LINE)

        def load_pairs(tile: int, i: ir.Value) -> tuple[ir.Value, ir.Value]:
            e.prefetch(e.at(next_bases[tile], i, LINE))
            return key_pairs(e, e.load_line(8, e.at(bases[tile], i, LINE)))

        _choose_rows(e, rows, lambda most: _score_rows(e, most, load_pairs, queries, dims, scores))

    e.loop(e.shift_right(e.at(count, 1), 1), [], two_tiles)


@inline_llvm
def _scores_widened(e: Emitter, rows: Int64, tile: Int64, dims: Int64, scratch: Int64) -> None:
    """Write rows' scores against the two widened key tiles from `tile` on, eight rows at once."""
    keys = e.at(scratch, records.KEYS_AT)
    bases = [keys, e.at(keys, dims, 2 * 16)]

    def load_pairs(tile: int, i: ir.Value) -> tuple[ir.Value, ir.Value]:
        first = e.at(bases[tile], i, 2 * LINE)
        return e.load_line(16, first), e.load_line(16, e.at(first, LINE))

    def eight_rows(i: ir.Value, _: list[ir.Value]) -> None:
        row = e.b.mul(i, I64(_MANY_ROWS))
        queries = e.at(e.at(scratch, records.QUERIES_AT), e.b.mul(row, dims), 2)
        scores = e.at(e.at(e.at(scratch, records.SCORES_AT), row, SCORE_STRIDE), tile, LINE)
        _score_rows(e, _MANY_ROWS, load_pairs, queries, dims, scores)

    e.loop(e.shift_right(e.at(rows, _MANY_ROWS - 1), 3), [], eight_rows)


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
    rows: Int64,
    tiles: Int64,
    ahead: Int64,
    count: Int64,
    dims: Int64,
    scratch: Int64,
    output_stride: Int64,
) -> None:
    """Add up to 8 rows' weights times the values of `count` tiles, and prefetch as many."""
    weights = e.at(scratch, records.WEIGHTS_AT)

    def chunk(i: ir.Value, _: list[ir.Value]) -> None:
        outputs = e.at(e.at(scratch, records.OUTPUTS_AT), i, 2 * LINE)

        def load_quad(tile: ir.Value, quad: int) -> list[ir.Value]:
            offset = e.at(I64(8), tile, TILE_RECORD)
            base, next_base = (e.load(I64, e.b.add(at, offset)) for at in (tiles, ahead))
            e.prefetch(e.at(e.at(next_base, i, 4 * LINE), LINE * quad))
            return value_pairs(e, e.load_line(16, e.at(e.at(base, i, 4 * LINE), LINE * quad)))

        def emit(most: int) -> None:
            _output_rows(e, most, load_quad, count, weights, outputs, output_stride)

        _choose_rows(e, rows, emit)

    e.loop(e.shift_right(dims, 5), [], chunk)


@inline_llvm
def _outputs_widened(
    e: Emitter, rows: Int64, count: Int64, dims: Int64, scratch: Int64, output_stride: Int64
) -> None:
    """Add rows' weights times `count` widened value tiles to their outputs, eight rows at once."""
    two_tiles = e.b.mul(dims, I64(OPERAND // 16))

    def chunk(i: ir.Value, _: list[ir.Value]) -> None:
        values = e.at(e.at(scratch, records.VALUES_AT), i, 2 * OPERAND)
        outputs = e.at(e.at(scratch, records.OUTPUTS_AT), i, 2 * LINE)

        def load_quad(tile: ir.Value, quad: int) -> list[ir.Value]:
            of_tiles = e.b.add(values, e.b.mul(e.shift_right(tile, 1), two_tiles))
            first = e.at(e.at(of_tiles, e.b.and_(tile, I64(1)), 8 * LINE), 2 * LINE * quad)
            return [
                e.load_line(16, e.at(first, OPERAND * half + LINE * pair))
                for pair in range(2)
                for half in range(2)
            ]

        def eight_rows(j: ir.Value, _: list[ir.Value]) -> None:
            row = e.b.mul(j, I64(_MANY_ROWS))
            weights = e.at(e.at(scratch, records.WEIGHTS_AT), row, SCORE_STRIDE)
            to = e.at(outputs, e.b.mul(row, output_stride), 1)
            _output_rows(e, _MANY_ROWS, load_quad, count, weights, to, output_stride)

        e.loop(e.shift_right(e.at(rows, _MANY_ROWS - 1), 3), [], eight_rows)

    e.loop(e.shift_right(dims, 5), [], chunk)


@work_item.inner
def _prepare(item, few, scratch):  # type: ignore[no-untyped-def]
    pass


@work_item.inner
def _attend_few(call, item, scratch, state, first, tiles, ahead, count):  # type: ignore[no-untyped-def]
    memory.noinline()
    now, then = tiles.ctypes.data, ahead.ctypes.data
    _scores_of_page(item.rows, now, then, count, call.dims, scratch)
    work_item.weigh(call, item, scratch, state, first, count, 1.0, softmax.BFLOATS, 0)
    _outputs_of_page(item.rows, now, then, count, call.dims, scratch, call.output_stride)


@work_item.inner
def _attend_many(call, item, scratch, state, first, tiles, ahead, count):  # type: ignore[no-untyped-def]
    memory.noinline()
    for tile in range(0, count, 2):
        bf16_tiles.widen_keys(call, scratch, tiles, ahead, tile, min(tile + 2, count))
        _scores_widened(item.rows, tile, call.dims, scratch)
    work_item.weigh(call, item, scratch, state, first, count, 1.0, softmax.BFLOATS, 0)
    bf16_tiles.widen_values(call, scratch, tiles, ahead, count)
    _outputs_widened(item.rows, count, call.dims, scratch, call.output_stride)


_attend = bf16_tiles.chunk_loop(_FEW_ROWS, _CHUNK_OF_FEW, _prepare, _attend_few, _attend_many)


def work(call_address, scratch):  # type: ignore[no-untyped-def]
    """Process items of a call until none is left; both arguments are addresses."""
    call = records.attention_call_at(call_address)
    count = call.num_items * call.num_kv_heads
    index = memory.fetch_add(call.counters)
    while index < count:
        index = _attend(call, index, scratch)
