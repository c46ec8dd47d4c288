# SPDX-License-Identifier: Apache-2.0
"""Paged attention with the AVX-512 BF16 dot product, for bf16 queries and `CPU_TILED` pages.

    sums[column] += pair[column, 0] * row[0] + pair[column, 1] * row[1]

A block of rows keeps its sums in registers. For few rows the operands come straight from the page;
for more rows they are widened to scratch memory once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from llvmlite import ir

from vllm_hybrid_kv.kernels.cpu import bf16_tiles, inline, records, softmax, work_item
from vllm_hybrid_kv.kernels.cpu.bf16_tiles import OPERAND, key_pairs, value_pairs
from vllm_hybrid_kv.kernels.cpu.inline import Int64, inline_llvm
from vllm_hybrid_kv.kernels.cpu.llvm import BF16, F32, I32, I64, LINE, ZEROS, Emitter, vector
from vllm_hybrid_kv.kernels.cpu.records import SCORE_STRIDE, TILE_RECORD

_FEW_ROWS = 8
"""Most rows whose operands come straight from the page."""

_BLOCKS = (1, 2, 4, 8)
"""Sizes of blocks of rows; the smallest that holds all rows is computed."""

_MANY_ROWS = 8
"""Rows that are multiplied at once with widened operands."""


def _dot(e: Emitter, sums: ir.Value, operand: ir.Value, pair: ir.Value) -> ir.Value:
    kind = vector(BF16, 32)
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    left, right = e.b.bitcast(operand, kind), e.b.bitcast(pair, kind)
    return e.call(name, vector(F32), sums, left, right)


def _accumulate(
    e: Emitter,
    steps: ir.Value,
    rows: Sequence[ir.Value],
    row_bytes: int,
    sums: Sequence[ir.Value],
    operands_of: Callable[[ir.Value], Iterable[Sequence[ir.Value]]],
) -> list[ir.Value]:
    """Return two sums of each row plus its pairs times the operands of two columns of sixteen.

    A step takes `row_bytes` of each row; `operands_of(step)` gives the two operands of each pair.
    """

    def step(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        for pair, operands in enumerate(operands_of(i)):
            places = [e.at(e.at(row, i, row_bytes), 4 * pair) for row in rows]
            pairs = [e.broadcast(e.load(I32, place)) for place in places]
            sums = [_dot(e, total, operands[n % 2], pairs[n // 2]) for n, total in enumerate(sums)]
        return sums

    return e.loop(steps, sums, step)


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

    def operands_of(i: ir.Value) -> Iterable[Sequence[ir.Value]]:
        return zip(load_pairs(0, i), load_pairs(1, i), strict=True)

    starts = e.rows(queries, e.b.mul(dims, I64(2)), rows)
    steps = e.shift_right(dims, 2)
    sums = _accumulate(e, steps, starts, 8, [ZEROS] * (2 * rows), operands_of)
    for n, total in enumerate(sums):
        e.store(total, e.at(scores, SCORE_STRIDE * (n // 2) + LINE * (n % 2)))


@inline_llvm
def _scores_of_page(
    e: Emitter, rows: Int64, tiles: Int64, ahead: Int64, count: Int64, dims: Int64, scratch: Int64
) -> None:
    """Write up to 8 rows' scores against `count` key tiles of pages, and prefetch as many."""
    with e.each(e.shift_right(e.at(count, 1), 1)) as two_tiles:
        bases, next_bases = (
            [
                e.load(I64, e.at(e.at(of, two_tiles, 2 * TILE_RECORD), TILE_RECORD * t))
                for t in (0, 1)
            ]
            for of in (tiles, ahead)
        )
        queries = e.at(scratch, records.QUERIES_AT)
        scores = e.at(e.at(scratch, records.SCORES_AT), two_tiles, 2 * LINE)

        def load_pairs(tile: int, i: ir.Value) -> tuple[ir.Value, ir.Value]:
            e.prefetch(e.at(next_bases[tile], i, LINE))
            return key_pairs(e, e.load_line(8, e.at(bases[tile], i, LINE)))

        def emit(most: int) -> None:
            _score_rows(e, most, load_pairs, queries, dims, scores)

        e.choose_number(rows, _BLOCKS, emit, "<=")


@inline_llvm
def _scores_widened(e: Emitter, rows: Int64, tile: Int64, dims: Int64, scratch: Int64) -> None:
    """Write rows' scores against the two widened key tiles from `tile` on, eight rows at once."""
    keys = e.at(scratch, records.KEYS_AT)
    bases = [keys, e.at(keys, dims, 2 * 16)]

    def load_pairs(tile: int, i: ir.Value) -> tuple[ir.Value, ir.Value]:
        first = e.at(bases[tile], i, 2 * LINE)
        return e.load_line(16, first), e.load_line(16, e.at(first, LINE))

    with e.each(e.shift_right(e.at(rows, _MANY_ROWS - 1), 3)) as i:
        row = e.b.mul(i, I64(_MANY_ROWS))
        queries = e.at(e.at(scratch, records.QUERIES_AT), e.b.mul(row, dims), 2)
        scores = e.at(e.at(e.at(scratch, records.SCORES_AT), row, SCORE_STRIDE), tile, LINE)
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

    def operands_of(i: ir.Value) -> Iterable[Sequence[ir.Value]]:
        for quad in range(4):
            operands = load_quad(i, quad)
            yield operands[:2]
            yield operands[2:]

    starts = e.rows(weights, I64(SCORE_STRIDE), rows)
    places = [e.at(row, at) for row in e.rows(outputs, output_stride, rows) for at in (0, LINE)]
    before = [e.load_floats(place) for place in places]
    sums = _accumulate(e, tiles, starts, 32, before, operands_of)
    for total, place in zip(sums, places, strict=True):
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
    with e.each(e.shift_right(dims, 5)) as i:
        outputs = e.at(e.at(scratch, records.OUTPUTS_AT), i, 2 * LINE)

        def load_quad(tile: ir.Value, quad: int) -> list[ir.Value]:
            offset = e.at(I64(8), tile, TILE_RECORD)
            base, next_base = (e.load(I64, e.b.add(at, offset)) for at in (tiles, ahead))
            e.prefetch(e.at(e.at(next_base, i, 4 * LINE), LINE * quad))
            return value_pairs(e, e.load_line(16, e.at(e.at(base, i, 4 * LINE), LINE * quad)))

        def emit(most: int) -> None:
            _output_rows(e, most, load_quad, count, weights, outputs, output_stride)

        e.choose_number(rows, _BLOCKS, emit, "<=")


@inline_llvm
def _outputs_widened(
    e: Emitter, rows: Int64, count: Int64, dims: Int64, scratch: Int64, output_stride: Int64
) -> None:
    """Add rows' weights times `count` widened value tiles to their outputs, eight rows at once."""
    two_tiles = e.b.mul(dims, I64(OPERAND // 16))
    blocks = e.shift_right(e.at(rows, _MANY_ROWS - 1), 3)
    with e.each(e.shift_right(dims, 5)) as i:
        values = e.at(e.at(scratch, records.VALUES_AT), i, 2 * OPERAND)
        outputs = e.at(e.at(scratch, records.OUTPUTS_AT), i, 2 * LINE)

        def load_quad(tile: ir.Value, quad: int) -> list[ir.Value]:
            of_tiles = e.b.add(values, e.b.mul(e.shift_right(tile, 1), two_tiles))
            first = e.at(e.at(of_tiles, e.b.and_(tile, I64(1)), 8 * LINE), 2 * LINE * quad)
            offsets = (0, OPERAND, LINE, OPERAND + LINE)
            return [e.load_line(16, e.at(first, offset)) for offset in offsets]

        with e.each(blocks) as j:
            row = e.b.mul(j, I64(_MANY_ROWS))
            weights = e.at(e.at(scratch, records.WEIGHTS_AT), row, SCORE_STRIDE)
            to = e.at(outputs, e.b.mul(row, output_stride), 1)
            _output_rows(e, _MANY_ROWS, load_quad, count, weights, to, output_stride)


_weigh = work_item.weigher(softmax.BFLOATS)


@work_item.inner
def _attend_few(call, item, scratch, state, first, tiles, ahead, count):  # type: ignore[no-untyped-def]
    inline.noinline()
    now, then = tiles.ctypes.data, ahead.ctypes.data
    _scores_of_page(item.rows, now, then, count, call.dims, scratch)
    _weigh(call, item, scratch, state, first, count, 0)
    _outputs_of_page(item.rows, now, then, count, call.dims, scratch, call.output_stride)


@work_item.inner
def _attend_many(call, item, scratch, state, first, tiles, ahead, count):  # type: ignore[no-untyped-def]
    inline.noinline()
    for tile in range(0, count, 2):
        bf16_tiles.widen_keys(call, scratch, tiles, ahead, tile, min(tile + 2, count))
        _scores_widened(item.rows, tile, call.dims, scratch)
    _weigh(call, item, scratch, state, first, count, 0)
    bf16_tiles.widen_values(call, scratch, tiles, ahead, count)
    _outputs_widened(item.rows, count, call.dims, scratch, call.output_stride)


_attend = work_item.item_loop(_FEW_ROWS, 64, _attend_few, _attend_many)


def work(call_address, scratch):  # type: ignore[no-untyped-def]
    """Process items of a call until none is left; both arguments are addresses."""
    _attend(records.attention_call_at(call_address), scratch)
