# SPDX-License-Identifier: Apache-2.0
"""Scores and outputs with the AVX-512 BF16 dot product.

    sums[column] += pair[column, 0] * row[0] + pair[column, 1] * row[1]

A block of rows has its sums in registers. Operands come straight from the page where few rows
need them, or from scratch memory where `widen` put them for many.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.extending import intrinsic

from vllm_hybrid_kv.kernels.cpu.emit import (
    BF16,
    F32,
    I8,
    I16,
    I32,
    I64,
    NOTHING,
    Emitter,
    procedure,
    vector,
)
from vllm_hybrid_kv.kernels.cpu.widen import LINE, OPERAND, TILE_RECORD, key_pairs, value_pairs


def _dot(e: Emitter, sums: ir.Value, operand: ir.Value, pair: ir.Value) -> ir.Value:
    kind = vector(BF16, 32)
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    left, right = e.b.bitcast(operand, kind), e.b.bitcast(pair, kind)
    return e.call(name, vector(F32), sums, left, right)


def _pair(e: Emitter, address: ir.Value) -> ir.Value:
    return e.splat(e.load(I32, address))


def _score_rows(
    e: Emitter,
    rows: int,
    bases: list[ir.Value],
    line: Callable[[ir.Value, ir.Value], tuple[ir.Value, ir.Value]],
    queries: ir.Value,
    dims: ir.Value,
    scores: ir.Value,
    score_stride: ir.Value,
) -> None:
    """Write scores of `rows` queries against the tiles at `bases`."""
    query_stride = e.b.mul(dims, I64(2))
    starts = [e.b.add(queries, e.b.mul(query_stride, I64(r))) for r in range(rows)]

    def four_dims(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        operands = [line(base, i) for base in bases]
        for pair in range(2):
            query = [_pair(e, e.at(e.at(start, i, 8), 4 * pair)) for start in starts]
            sums = [
                _dot(e, sums[r * len(bases) + t], operands[t][pair], query[r])
                for r in range(rows)
                for t in range(len(bases))
            ]
        return sums

    sums = e.loop(e.b.ashr(dims, I64(2)), [NOTHING] * (rows * len(bases)), four_dims)
    for r in range(rows):
        for t in range(len(bases)):
            place = e.b.add(scores, e.b.mul(score_stride, I64(r)))
            e.store(sums[r * len(bases) + t], e.at(place, LINE * t))


def _scores_of_page(rows: int) -> Any:
    @intrinsic
    def scores_of_page(
        context: Any, tiles: Any, ahead: Any, queries: Any, dims: Any, scores: Any, stride: Any
    ) -> Any:
        """Write scores against two key tiles of a page, and ask for those at `ahead`.

        `tiles` and `ahead` are addresses of tiles' records.
        """

        def emit(
            e: Emitter,
            tiles: ir.Value,
            ahead: ir.Value,
            queries: ir.Value,
            dims: ir.Value,
            scores: ir.Value,
            stride: ir.Value,
        ) -> None:
            bases = [e.load(I64, e.at(tiles, TILE_RECORD * t)) for t in range(2)]
            soon = [e.load(I64, e.at(ahead, TILE_RECORD * t)) for t in range(2)]

            def line(base: ir.Value, i: ir.Value) -> tuple[ir.Value, ir.Value]:
                e.prefetch(e.at(soon[bases.index(base)], i, LINE))
                return key_pairs(e, e.load(vector(I8, 64), e.at(base, i, LINE)))

            _score_rows(e, rows, bases, line, queries, dims, scores, stride)

        return procedure(emit, 6)

    return scores_of_page


scores_of_page_1 = _scores_of_page(1)
scores_of_page_2 = _scores_of_page(2)
scores_of_page_4 = _scores_of_page(4)
scores_of_page_8 = _scores_of_page(8)


@intrinsic
def scores_widened(
    context: Any, keys: Any, queries: Any, dims: Any, scores: Any, stride: Any
) -> Any:
    """Write eight rows' scores against two widened key tiles that follow one another."""

    def emit(
        e: Emitter,
        keys: ir.Value,
        queries: ir.Value,
        dims: ir.Value,
        scores: ir.Value,
        stride: ir.Value,
    ) -> None:
        def line(base: ir.Value, i: ir.Value) -> tuple[ir.Value, ir.Value]:
            first = e.at(base, i, 2 * LINE)
            kind = vector(I8, 64)
            return e.load(kind, first), e.load(kind, e.at(first, LINE))

        bases = [keys, e.at(keys, dims, 2 * 16)]
        _score_rows(e, 8, bases, line, queries, dims, scores, stride)

    return procedure(emit, 5)


def _output_rows(
    e: Emitter,
    rows: int,
    quads: Callable[[ir.Value, int], list[ir.Value]],
    tiles: ir.Value,
    weights: ir.Value,
    weight_stride: ir.Value,
    outputs: ir.Value,
    output_stride: ir.Value,
) -> None:
    """Add `rows` rows' weights of `tiles` tiles times values to 32 dims of their outputs.

    `quads(tile, quad)` are a quad's operands, as `widen.value_pairs` has them.
    """
    starts = [e.b.add(weights, e.b.mul(weight_stride, I64(r))) for r in range(rows)]
    places = [
        e.at(e.b.add(outputs, e.b.mul(output_stride, I64(r))), LINE * half)
        for r in range(rows)
        for half in range(2)
    ]

    def tile(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        for quad in range(4):
            operands = quads(i, quad)
            for pair in range(2):
                offset = 8 * quad + 4 * pair
                weight = [_pair(e, e.at(e.at(start, i, 32), offset)) for start in starts]
                sums = [
                    _dot(e, sums[2 * r + half], operands[2 * pair + half], weight[r])
                    for r in range(rows)
                    for half in range(2)
                ]
        return sums

    before = [e.load(vector(F32), place) for place in places]
    for total, place in zip(e.loop(tiles, before, tile), places, strict=True):
        e.store(total, place)


def _outputs_of_page(rows: int) -> Any:
    @intrinsic
    def outputs_of_page(
        context: Any,
        tiles: Any,
        count: Any,
        chunk: Any,
        ahead: Any,
        weights: Any,
        weight_stride: Any,
        outputs: Any,
        stride: Any,
    ) -> Any:
        """Add weights times the values of `count` tiles of pages to a chunk of 32 dims.

        `tiles` and `ahead` are addresses of tiles' records; the latter are asked for.
        """

        def emit(
            e: Emitter,
            tiles: ir.Value,
            count: ir.Value,
            chunk: ir.Value,
            ahead: ir.Value,
            weights: ir.Value,
            weight_stride: ir.Value,
            outputs: ir.Value,
            stride: ir.Value,
        ) -> None:
            def quads(i: ir.Value, quad: int) -> list[ir.Value]:
                offset = e.at(I64(8), i, TILE_RECORD)
                base = e.load(I64, e.b.add(tiles, offset))
                soon = e.load(I64, e.b.add(ahead, offset))
                e.prefetch(e.at(e.at(soon, chunk, 4 * LINE), LINE * quad))
                place = e.at(e.at(base, chunk, 4 * LINE), LINE * quad)
                return value_pairs(e, e.load(vector(I16, 32), place))

            place = e.at(outputs, chunk, 2 * LINE)
            _output_rows(e, rows, quads, count, weights, weight_stride, place, stride)

        return procedure(emit, 8)

    return outputs_of_page


outputs_of_page_1 = _outputs_of_page(1)
outputs_of_page_2 = _outputs_of_page(2)
outputs_of_page_4 = _outputs_of_page(4)
outputs_of_page_8 = _outputs_of_page(8)


@intrinsic
def outputs_widened(
    context: Any,
    values: Any,
    count: Any,
    chunk: Any,
    dims: Any,
    weights: Any,
    weight_stride: Any,
    outputs: Any,
    stride: Any,
) -> Any:
    """Add eight rows' weights times `count` widened value tiles to a chunk of 32 dims."""

    def emit(
        e: Emitter,
        values: ir.Value,
        count: ir.Value,
        chunk: ir.Value,
        dims: ir.Value,
        weights: ir.Value,
        weight_stride: ir.Value,
        outputs: ir.Value,
        stride: ir.Value,
    ) -> None:
        of_chunk = e.at(values, chunk, 2 * OPERAND)
        two_tiles = e.b.mul(dims, I64(OPERAND // 16))

        def quads(i: ir.Value, quad: int) -> list[ir.Value]:
            of_tiles = e.b.add(of_chunk, e.b.mul(e.b.ashr(i, I64(1)), two_tiles))
            first = e.at(e.at(of_tiles, e.b.and_(i, I64(1)), 8 * LINE), 2 * LINE * quad)
            return [
                e.load(vector(I8, 64), e.at(first, OPERAND * half + LINE * pair))
                for pair in range(2)
                for half in range(2)
            ]

        place = e.at(outputs, chunk, 2 * LINE)
        _output_rows(e, 8, quads, count, weights, weight_stride, place, stride)

    return procedure(emit, 8)
