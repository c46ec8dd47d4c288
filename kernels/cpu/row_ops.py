# SPDX-License-Identifier: Apache-2.0
"""Operations on a row of queries, scores or outputs in scratch memory, vector by vector.

Rows begin at multiples of 64 bytes.
"""

from __future__ import annotations

from llvmlite import ir

from vllm_hybrid_kv.kernels.cpu.inline import Float32, Int64, inline_llvm
from vllm_hybrid_kv.kernels.cpu.llvm import (
    F16,
    F32,
    I16,
    I32,
    LANES,
    LINE,
    ZEROS,
    Emitter,
    filled,
    vector,
)
from vllm_hybrid_kv.kernels.cpu.records import BFLOAT16, FLOAT16, FLOAT32

_EIGHT = LANES // 2  # head sizes are multiples of eight, not of sixteen


def _load_floats(e: Emitter, dtype_code: int, address: ir.Value, lanes: int) -> ir.Value:
    if dtype_code == FLOAT32:
        return e.load_floats(address, lanes)
    bits = e.load(vector(I16, lanes), address)
    return e.bfloat16_to_floats(bits) if dtype_code == BFLOAT16 else e.halves_to_floats(bits)


@inline_llvm
def widen_row(e: Emitter, dtype_code: Int64, source: Int64, to: Int64, dims: Int64) -> None:
    """Write a row as float32, and its last 8 numbers again if `dims` is no multiple of 16."""

    def widen(code: int) -> None:
        width = 4 if code == FLOAT32 else 2

        def sixteen(i: ir.Value, _: list[ir.Value]) -> None:
            e.store(_load_floats(e, code, e.at(source, i, width * LANES), LANES), e.at(to, i, LINE))

        vectors = e.shift_right(dims, 4)
        e.loop(vectors, [], sixteen)
        with e.b.if_then(e.b.not_(e.is_multiple(dims, LANES))):
            last = _load_floats(e, code, e.at(source, vectors, width * LANES), _EIGHT)
            twice = e.shuffle(last, last, 2 * [*range(_EIGHT)])
            e.store(twice, e.at(to, vectors, LINE))

    e.choose_number(dtype_code, (BFLOAT16, FLOAT16, FLOAT32), widen)


@inline_llvm
def store_row(
    e: Emitter,
    dtype_code: Int64,
    source: Int64,
    to: Int64,
    dims: Int64,
    add: Float32,
    factor: Float32,
) -> None:
    """Store `(row + add) * factor` of a float32 row as a dtype."""
    add, factor = e.broadcast(add, _EIGHT), e.broadcast(factor, _EIGHT)

    def store(code: int) -> None:
        def eight(i: ir.Value, _: list[ir.Value]) -> None:
            x = e.load_floats(e.at(source, i, 32), _EIGHT)
            x = e.b.fmul(e.b.fadd(x, add), factor)
            if code == FLOAT32:
                e.store(x, e.at(to, i, 32))
            elif code == BFLOAT16:
                e.store(e.floats_to_bfloat16(x), e.at(to, i, 16))
            else:
                e.store(e.b.fptrunc(x, vector(F16, _EIGHT)), e.at(to, i, 16))

        e.loop(e.shift_right(dims, 3), [], eight)

    e.choose_number(dtype_code, (BFLOAT16, FLOAT16, FLOAT32), store)


@inline_llvm
def copy_bfloat16(e: Emitter, source: Int64, to: Int64, dims: Int64) -> None:
    """Copy a row of bf16."""

    def eight(i: ir.Value, _: list[ir.Value]) -> None:
        e.store(e.load(vector(I16, _EIGHT), e.at(source, i, 16)), e.at(to, i, 16))

    e.loop(e.shift_right(dims, 3), [], eight)


@inline_llvm
def add_scaled(e: Emitter, to: Int64, row: Int64, dims: Int64, factor: Float32) -> None:
    """Add `row * factor` to a row of float32."""
    factor = e.broadcast(factor, _EIGHT)

    def eight(i: ir.Value, _: list[ir.Value]) -> None:
        x = e.load_floats(e.at(row, i, 32), _EIGHT)
        e.store(e.fma(x, factor, e.load_floats(e.at(to, i, 32), _EIGHT)), e.at(to, i, 32))

    e.loop(e.shift_right(dims, 3), [], eight)


@inline_llvm
def add_limbs(
    e: Emitter, to: Int64, upper: Int64, lower: Int64, vectors: Int64, factor: Float32
) -> None:
    """Add `(256 * upper + lower) * factor` to a row of float32; sums of int32, below 2^23 each."""
    factor = e.broadcast(factor)

    def sixteen(i: ir.Value, _: list[ir.Value]) -> None:
        high = e.load(vector(I32), e.at(upper, i, LINE))
        low = e.load(vector(I32), e.at(lower, i, LINE))
        both = e.b.add(e.b.shl(high, filled(I32, 8)), low)
        place = e.at(to, i, LINE)
        x = e.b.sitofp(both, vector(F32))
        e.store(e.fma(x, factor, e.load_floats(place)), place)

    e.loop(vectors, [], sixteen)


@inline_llvm
def clear_lines(e: Emitter, to: Int64, lines: Int64) -> None:
    """Write zeros to `lines` cache lines, at least one."""
    e.loop(lines, [], lambda i, _: e.store(ZEROS, e.at(to, i, LINE)))


@inline_llvm
def widen_scales(
    e: Emitter, scales: Int64, zeros: Int64, to_scales: Int64, to_zeros: Int64, middle: Float32
) -> None:
    """Write a tile's fp16 scales, and its zeros plus `middle` times the scales, as float32."""
    scale = e.halves_to_floats(e.load(vector(I16), scales))
    zero = e.halves_to_floats(e.load(vector(I16), zeros))
    e.store(scale, to_scales)
    e.store(e.fma(scale, e.broadcast(middle), zero), to_zeros)
