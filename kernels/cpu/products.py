# SPDX-License-Identifier: Apache-2.0
"""Integer dot products with AVX-512 VNNI or plain vectors, read directly from `CPU_TILED` pages.

    scores: sums[token] += key bytes [token, 4] . query codes [4]
    outputs: sums[dim] += value codes [dim, 2] . weights [2]

A block of rows keeps its sums in registers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba.core.registry import cpu_target

from vllm_hybrid_kv.kernels.cpu import inline, records, softmax, work_item
from vllm_hybrid_kv.kernels.cpu.encode import half_chunk
from vllm_hybrid_kv.kernels.cpu.inline import Int64, inline_llvm
from vllm_hybrid_kv.kernels.cpu.llvm import (
    F32,
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
from vllm_hybrid_kv.kernels.cpu.records import SCORE_STRIDE, TILE_RECORD

_WORD_DOTS = (
    ("+avx512bw", "avx512.pmaddw.d.512", 1),
    ("+avx2", "avx2.pmadd.wd", 2),
    ("+sse2", "sse2.pmadd.wd", 4),
)
"""x86 instructions that multiply words and add pairs: CPU feature, LLVM name, vectors per line."""


@functools.cache
def _features() -> list[str]:
    """Return the x86 features that numba compiles for; none on other CPUs."""
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    return features.split(",") if triple.startswith("x86") else []


def _dot_words(e: Emitter, sums: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    """Multiply signed words, <32 x i16>, and add the two products of each pair to an int32."""
    for feature, name, parts in _WORD_DOTS:
        if feature in _features():
            lanes = 32 // parts
            products = [
                e.call(
                    f"llvm.x86.{name}",
                    vector(I32, lanes // 2),
                    *(e.shuffle(of, of, range(lanes * i, lanes * (i + 1))) for of in (x, y)),
                )
                for i in range(parts)
            ]
            while len(products) > 1:
                size = 2 * products[0].type.count
                pairs = zip(products[::2], products[1::2], strict=True)
                products = [e.shuffle(low, high, range(size)) for low, high in pairs]
            return e.b.add(sums, products[0])
    wide = e.b.mul(e.b.sext(x, vector(I32, 32)), e.b.sext(y, vector(I32, 32)))
    even, odd = (e.shuffle(wide, wide, range(i, 32, 2)) for i in range(2))
    return e.b.add(sums, e.b.add(even, odd))


def _broadcast(e: Emitter, address: ir.Value) -> ir.Value:
    return e.broadcast(e.load(I32, address))


@dataclass(frozen=True)
class Products:
    """How to multiply with one instruction set.

    Attributes:
        vnni: Use the byte dot product of AVX-512 VNNI.
        rows: Multiply at most this many rows at once, a power of two.
    """

    vnni: bool
    rows: int

    def key_operands(self, e: Emitter, line: ir.Value) -> list[ir.Value]:
        """Split a line of keys (<32 x i16>) into even and odd bytes. VNNI needs no split."""
        if self.vnni:
            return [line]
        return [e.b.and_(line, filled(I16, 255, 32)), e.b.lshr(line, filled(I16, 8, 32))]

    def add_scores(
        self, e: Emitter, sums: ir.Value, keys: list[ir.Value], query: list[ir.Value]
    ) -> ir.Value:
        """Add the dot products of four query codes with the 16 tokens of a line of keys."""
        if self.vnni:
            words = e.b.bitcast(keys[0], vector(I32))
            return e.call("llvm.x86.avx512.vpdpbusd.512", vector(I32), sums, words, query[0])
        for x, y in zip(keys, query, strict=True):
            sums = _dot_words(e, sums, x, e.b.bitcast(y, vector(I16, 32)))
        return sums


def _row_blocks(
    e: Emitter, products: Products, rows: ir.Value, emit: Callable[[int, ir.Value, bool], None]
) -> None:
    """Emit code that processes all rows in blocks.

    `emit(size, first_row, is_first_block)` emits the code for one block.
    """
    sizes = [1 << i for i in range(products.rows.bit_length())]
    e.choose_number(rows, sizes, lambda size: emit(size, I64(0), True), "<=")
    with e.b.if_then(e.b.icmp_signed(">", rows, I64(products.rows))):
        others = e.shift_right(e.b.sub(rows, I64(1)), products.rows.bit_length() - 1)
        with e.each(others) as i:
            emit(products.rows, e.b.mul(e.b.add(i, I64(1)), I64(products.rows)), False)


def functions(products: Products) -> tuple[Any, Any]:
    """Return `scores` and `outputs`, which numba code calls once for each chunk of keys."""

    @inline_llvm
    def scores(
        e: Emitter, rows: Int64, tiles: Int64, ahead: Int64, count: Int64, dims: Int64,
        stride: Int64, scratch: Int64,
    ) -> None:  # fmt: skip
        """Multiply queries with `count` key tiles, and prefetch the keys of the tiles `ahead`."""
        words = 1 if products.vnni else 2

        with e.each(count) as i:
            base, next_base = (e.load(I64, e.at(at, i, TILE_RECORD)) for at in (tiles, ahead))
            column = e.at(e.at(scratch, records.SCORES_AT), i, LINE)

            def block(count: int, row: ir.Value, prefetches: bool) -> None:
                queries = e.at(e.at(scratch, records.QUERIES_AT), e.b.mul(row, stride), 1)
                starts = e.rows(queries, stride, count)

                def four_dims(j: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                    if prefetches:
                        e.prefetch(e.at(next_base, j, LINE))
                    keys = products.key_operands(e, e.load_line(16, e.at(base, j, LINE)))
                    following = []
                    for total, start in zip(sums, starts, strict=True):
                        place = e.at(start, j, 4 * words)
                        query = [_broadcast(e, e.at(place, 4 * word)) for word in range(words)]
                        following.append(products.add_scores(e, total, keys, query))
                    return following

                sums = e.loop(e.shift_right(dims, 2), [filled(I32, 0)] * count, four_dims)
                places = e.rows(e.at(column, row, SCORE_STRIDE), I64(SCORE_STRIDE), count)
                for total, place in zip(sums, places, strict=True):
                    e.store(total, place)

            _row_blocks(e, products, rows, block)

    @inline_llvm
    def outputs(
        e: Emitter, rows: Int64, tiles: Int64, ahead: Int64, count: Int64, dims: Int64,
        output_stride: Int64, state: Int64, scratch: Int64,
    ) -> None:  # fmt: skip
        """Add weights times values of `count` tiles; prefetch the values of the tiles `ahead`."""

        with e.each(e.shift_right(e.at(dims, 31), 5)) as i:
            width = half_chunk(e, i, dims)
            bytes_of_quad = e.b.shl(width, I64(2))
            in_chunk = e.b.icmp_signed(
                "<", constant(I32, range(LANES)), e.broadcast(e.b.trunc(width, I32))
            )

            def block(count_rows: int, row: ir.Value, prefetches: bool) -> None:
                weights = e.at(e.at(scratch, records.WEIGHTS_AT), row, SCORE_STRIDE)
                starts = e.rows(weights, I64(SCORE_STRIDE), count_rows)

                def tile(t: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                    offset = e.at(I64(8), t, TILE_RECORD)
                    base, next_base = (e.load(I64, e.b.add(at, offset)) for at in (tiles, ahead))
                    for quad in range(4):
                        if prefetches:
                            e.prefetch(e.at(e.at(next_base, i, 4 * LINE), LINE * quad))
                        place = e.at(e.at(base, i, 4 * LINE), e.b.mul(bytes_of_quad, I64(quad)), 1)
                        line = e.load_line(16, place)
                        for pair in range(2):
                            codes = [
                                e.b.and_(
                                    e.b.lshr(line, filled(I16, 8 * pair + 4 * half, 32)),
                                    filled(I16, 15, 32),
                                )
                                for half in range(2)
                            ]
                            weight = [
                                e.b.bitcast(
                                    _broadcast(e, e.at(e.at(start, t, 32), 8 * quad + 4 * pair)),
                                    vector(I16, 32),
                                )
                                for start in starts
                            ]
                            sums = [
                                _dot_words(e, sums[2 * r + half], codes[half], weight[r])
                                for r in range(count_rows)
                                for half in range(2)
                            ]
                    return sums

                sums = e.loop(count, [filled(I32, 0)] * (2 * count_rows), tile)
                outputs = e.at(e.at(scratch, records.OUTPUTS_AT), e.b.mul(row, output_stride), 1)
                states = e.at(state, row, records.STATE_BYTES)
                for r, output in enumerate(e.rows(outputs, output_stride, count_rows)):
                    own = e.at(states, records.STATE_BYTES * r)
                    own = e.at(own, 4 * records.STATE_FIELDS.index("weight_step"))
                    step = e.broadcast(e.load(F32, own))
                    low = e.at(output, i, 2 * LINE)
                    for half, place in enumerate((low, e.at(low, width, 4))):
                        x = e.b.sitofp(sums[2 * r + half], vector(F32))
                        x = e.b.select(in_chunk, x, ZEROS)
                        e.store(e.fma(x, step, e.load_floats(place)), place)

            _row_blocks(e, products, rows, block)

    return scores, outputs


def attend(products: Products) -> Any:
    """Build the attention function that uses these products; see `work_item.item_loop`."""
    scores, outputs = functions(products)
    weigh = work_item.weigher(softmax.WORDS)
    words = int(not products.vnni)

    @work_item.inner
    def attend_chunk(call, item, scratch, state, first, tiles, ahead, count):  # type: ignore[no-untyped-def]
        inline.noinline()
        now, then = tiles.ctypes.data, ahead.ctypes.data
        stride = work_item.query_stride(call, words)
        scores(item.rows, now, then, count, call.dims, stride, scratch)
        weigh(call, item, scratch, state, first, count, 0)
        own = state.ctypes.data
        outputs(item.rows, now, then, count, call.dims, call.output_stride, own, scratch)

    return work_item.item_loop(attend_chunk, words=words)
