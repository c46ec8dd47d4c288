# SPDX-License-Identifier: Apache-2.0
"""Products with keys and values in float32 and plain LLVM vectors, for any CPU and layout.

A tile of 16 tokens is decoded to float32 in scratch memory and multiplied from there. Keys are
decoded through fp16, whose conversion instruction knows denormals: an e4m3 code moved into
fp16's fields is 2^-8 of the key, which `KEY_SCALE` in the scale of the scores makes good.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.extending import intrinsic

from vllm_hybrid_kv.kernels.cpu.emit import (
    F32,
    I8,
    I16,
    I32,
    I64,
    LANES,
    NOTHING,
    Emitter,
    constant,
    every,
    procedure,
    vector,
)

KEY_SCALE = 256.0
"""How much larger keys are than what the decoders here make of them."""

KEY_STRIDE = 2 * 4 * LANES
"""Bytes between dims of decoded keys: two tiles of tokens stand side by side."""


def _halves_of_codes(e: Emitter, codes: ir.Value) -> ir.Value:
    """Move e4m3 codes in 16-bit lanes (upper byte 0) into fp16's fields."""
    b = e.b
    magnitude = b.shl(b.and_(codes, every(I16, 0x7F)), every(I16, 7))
    return b.or_(magnitude, b.shl(b.and_(codes, every(I16, 0x80)), every(I16, 8)))


@intrinsic
def decode_tiled_keys(context: Any, tile: Any, to: Any, dims: Any) -> Any:
    """Decode the key tile of a `CPU_TILED` page to float32 [D, 16], rows `KEY_STRIDE` apart."""

    def emit(e: Emitter, tile: ir.Value, to: ir.Value, dims: ir.Value) -> None:
        def line(i: ir.Value, _: Any) -> list[ir.Value]:
            words = e.load(vector(I16, 2 * LANES), e.at(tile, i, 4 * LANES))
            for pair in range(2):
                lanes = [8 * quad + 4 * pair + t for quad in range(4) for t in range(4)]
                of_pair = e.b.shuffle_vector(words, words, constant(I32, lanes))
                row = e.at(to, e.b.add(e.b.mul(i, I64(4)), I64(2 * pair)), KEY_STRIDE)
                even = _halves_of_codes(e, e.b.and_(of_pair, every(I16, 0xFF)))
                odd = _halves_of_codes(e, e.b.lshr(of_pair, every(I16, 8)))
                e.store(e.halves_to_floats(even), row)
                e.store(e.halves_to_floats(odd), e.at(row, KEY_STRIDE))
            return []

        e.loop(e.b.ashr(dims, I64(2)), [], line)

    return procedure(emit, 3)


@intrinsic
def decode_linear_keys(context: Any, tile: Any, to: Any, dims: Any) -> Any:
    """Decode 16 tokens' keys of a `LINEAR` page to float32 [D, 16], rows `KEY_STRIDE` apart."""

    def emit(e: Emitter, tile: ir.Value, to: ir.Value, dims: ir.Value) -> None:
        def dim(i: ir.Value, _: Any) -> list[ir.Value]:
            codes = ir.Constant(vector(I8), ir.Undefined)
            address = e.b.add(tile, i)
            for token in range(LANES):
                code = e.load(I8, address)
                codes = e.b.insert_element(codes, code, I32(token))
                address = e.b.add(address, dims)
            halves = _halves_of_codes(e, e.b.zext(codes, vector(I16)))
            e.store(e.halves_to_floats(halves), e.at(to, i, KEY_STRIDE))
            return []

        e.loop(dims, [], dim)

    return procedure(emit, 3)


@intrinsic
def decode_tiled_values(context: Any, tile: Any, to: Any, dims: Any) -> Any:
    """Decode the value codes of a `CPU_TILED` tile to float32 [16, D]."""

    def emit(e: Emitter, tile: ir.Value, to: ir.Value, dims: ir.Value) -> None:
        def quad(i: ir.Value, _: Any) -> list[ir.Value]:
            words = e.load(vector(I32), e.at(tile, i, 64))
            chunk, token = e.b.ashr(i, I64(2)), e.b.mul(e.b.and_(i, I64(3)), I64(4))
            line = e.at(e.at(to, chunk, 128), e.b.mul(token, dims), 4)
            for of_quad, byte in enumerate((0, 2, 1, 3)):
                for half in range(2):
                    shift = 8 * byte + 4 * half
                    codes = e.b.lshr(words, every(I32, shift)) if shift else words
                    codes = e.b.and_(codes, every(I32, 15))
                    place = e.at(line, e.b.mul(dims, I64(of_quad)), 4)
                    e.store(e.b.uitofp(codes, vector(F32)), e.at(place, 64 * half))
            return []

        e.loop(e.b.ashr(dims, I64(3)), [], quad)

    return procedure(emit, 3)


@intrinsic
def decode_linear_values(context: Any, tile: Any, to: Any, dims: Any, stride: Any) -> Any:
    """Decode 16 tokens' value codes of a `LINEAR` page to float32, rows `stride` bytes apart."""

    def emit(e: Emitter, tile: ir.Value, to: ir.Value, dims: ir.Value, stride: ir.Value) -> None:
        eights = e.b.ashr(dims, I64(3))

        def token(t: ir.Value, _: Any) -> list[ir.Value]:
            source = e.at(tile, e.b.mul(t, eights), 4)
            line = e.b.add(to, e.b.mul(t, stride))

            def eight(i: ir.Value, _: Any) -> list[ir.Value]:
                word = e.splat(e.load(I32, e.at(source, i, 4)), 8)
                codes = e.b.lshr(word, constant(I32, [4 * k for k in range(8)]))
                codes = e.b.and_(codes, every(I32, 15, 8))
                e.store(e.b.uitofp(codes, vector(F32, 8)), e.at(line, i, 32))
                return []

            e.loop(eights, [], eight)
            return []

        e.loop(I64(LANES), [], token)

    return procedure(emit, 4)


def _dot(rows: int) -> Any:
    """Return an intrinsic's answer: `rows` queries times 32 tokens of decoded keys."""

    def emit(
        e: Emitter,
        queries: ir.Value,
        query_stride: ir.Value,
        keys: ir.Value,
        dims: ir.Value,
        scores: ir.Value,
        score_stride: ir.Value,
    ) -> None:
        starts = [e.b.add(queries, e.b.mul(query_stride, I64(r))) for r in range(rows)]

        def dim(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            line = e.at(keys, i, KEY_STRIDE)
            key = [e.load(vector(F32), e.at(line, 64 * tile)) for tile in range(2)]
            query = [e.splat(e.load(F32, e.at(start, i, 4))) for start in starts]
            return [
                e.fma(query[r], key[tile], sums[2 * r + tile])
                for r in range(rows)
                for tile in range(2)
            ]

        sums = e.loop(dims, [NOTHING] * (2 * rows), dim)
        for r in range(rows):
            line = e.b.add(scores, e.b.mul(score_stride, I64(r)))
            for tile in range(2):
                e.store(sums[2 * r + tile], e.at(line, 64 * tile))

    return procedure(emit, 6)


@intrinsic
def dot_one(
    context: Any, queries: Any, query_stride: Any, keys: Any, dims: Any, scores: Any, stride: Any
) -> Any:
    """Write the products of one query with 32 decoded keys."""
    return _dot(1)


@intrinsic
def dot_two(
    context: Any, queries: Any, query_stride: Any, keys: Any, dims: Any, scores: Any, stride: Any
) -> Any:
    """Write the products of two queries with 32 decoded keys."""
    return _dot(2)


@intrinsic
def dot_four(
    context: Any, queries: Any, query_stride: Any, keys: Any, dims: Any, scores: Any, stride: Any
) -> Any:
    """Write the products of four queries with 32 decoded keys."""
    return _dot(4)


def _accumulate(rows: int) -> Any:
    """Return an intrinsic's answer: add `rows` rows of weights times decoded values."""

    def emit(
        e: Emitter,
        weights: ir.Value,
        weight_stride: ir.Value,
        values: ir.Value,
        tokens: ir.Value,
        outputs: ir.Value,
        stride: ir.Value,
    ) -> None:
        starts = [e.b.add(weights, e.b.mul(weight_stride, I64(r))) for r in range(rows)]

        def sixteen_dims(column: ir.Value, _: Any) -> list[ir.Value]:
            first = e.at(values, column, 64)

            def two_tokens(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                line = e.b.add(first, e.b.mul(e.b.mul(i, I64(2)), stride))
                value = [e.load(vector(F32), line), e.load(vector(F32), e.b.add(line, stride))]
                return [
                    e.fma(
                        e.splat(e.load(F32, e.at(e.at(starts[r], i, 8), 4 * odd))),
                        value[odd],
                        sums[2 * r + odd],
                    )
                    for r in range(rows)
                    for odd in range(2)
                ]

            # Even and odd tokens have sums of their own, so that no addition waits for another.
            sums = e.loop(e.b.ashr(tokens, I64(1)), [NOTHING] * (2 * rows), two_tokens)
            for r in range(rows):
                place = e.at(e.b.add(outputs, e.b.mul(stride, I64(r))), column, 64)
                new = e.b.fadd(sums[2 * r], sums[2 * r + 1])
                e.store(e.b.fadd(e.load(vector(F32), place), new), place)
            return []

        e.loop(e.b.ashr(stride, I64(6)), [], sixteen_dims)

    return procedure(emit, 6)


@intrinsic
def accumulate_one(
    context: Any, weights: Any, weight_stride: Any, values: Any, tokens: Any, outputs: Any, row: Any
) -> Any:
    """Add one row of weights times decoded values to its output; `row` bytes a row."""
    return _accumulate(1)


@intrinsic
def accumulate_two(
    context: Any, weights: Any, weight_stride: Any, values: Any, tokens: Any, outputs: Any, row: Any
) -> Any:
    """Add two rows of weights times decoded values to their outputs; `row` bytes a row."""
    return _accumulate(2)


@intrinsic
def accumulate_four(
    context: Any, weights: Any, weight_stride: Any, values: Any, tokens: Any, outputs: Any, row: Any
) -> Any:
    """Add four rows of weights times decoded values to their outputs; `row` bytes a row."""
    return _accumulate(4)
