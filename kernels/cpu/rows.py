# SPDX-License-Identifier: Apache-2.0
"""What every path does to a row of queries, scores or outputs, sixteen numbers at a time.

Rows stand in scratch memory at addresses that are multiples of 64 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from vllm_hybrid_kv.kernels.cpu.emit import (
    F16,
    F32,
    I16,
    I32,
    I64,
    LANES,
    NOTHING,
    Emitter,
    every,
    procedure,
    vector,
)

_EIGHT = LANES // 2  # head sizes are multiples of eight, not of sixteen


def _floats_of_bfloat16(e: Emitter, address: ir.Value) -> ir.Value:
    wide = e.b.zext(e.load(vector(I16, _EIGHT), address), vector(I32, _EIGHT))
    return e.b.bitcast(e.b.shl(wide, every(I32, 16, _EIGHT)), vector(F32, _EIGHT))


def _floats_of_float16(e: Emitter, address: ir.Value) -> ir.Value:
    return e.halves_to_floats(e.load(vector(I16, _EIGHT), address))


def _row_loader(kind: str) -> Callable[[Emitter, ir.Value, ir.Value, ir.Value], None]:
    def emit(e: Emitter, source: ir.Value, to: ir.Value, dims: ir.Value) -> None:
        def eight(i: ir.Value, _: Any) -> list[ir.Value]:
            if kind == "float32":
                x = e.load(vector(F32, _EIGHT), e.at(source, i, 32))
            elif kind == "bfloat16":
                x = _floats_of_bfloat16(e, e.at(source, i, 16))
            else:
                x = _floats_of_float16(e, e.at(source, i, 16))
            e.store(x, e.at(to, i, 32))
            return []

        e.loop(e.b.ashr(dims, I64(3)), [], eight)

    return emit


@intrinsic
def load_bfloat16(context: Any, source: Any, to: Any, dims: Any) -> Any:
    """Widen a row of bf16 to float32."""
    return procedure(_row_loader("bfloat16"), 3)


@intrinsic
def load_float16(context: Any, source: Any, to: Any, dims: Any) -> Any:
    """Widen a row of fp16 to float32."""
    return procedure(_row_loader("float16"), 3)


@intrinsic
def load_float32(context: Any, source: Any, to: Any, dims: Any) -> Any:
    """Copy a row of float32."""
    return procedure(_row_loader("float32"), 3)


def _store_row(kind: str) -> Any:
    """Return an intrinsic's answer: store `(row + add) * factor` as bf16, fp16 or float32."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        e = Emitter(builder)
        source, to, dims, add, factor = values
        add, factor = e.splat(add, _EIGHT), e.splat(factor, _EIGHT)

        def eight(i: ir.Value, _: Any) -> list[ir.Value]:
            x = e.load(vector(F32, _EIGHT), e.at(source, i, 32))
            x = e.b.fmul(e.b.fadd(x, add), factor)
            if kind == "float32":
                e.store(x, e.at(to, i, 32))
            elif kind == "bfloat16":
                e.store(e.floats_to_bfloat16(x), e.at(to, i, 16))
            else:
                e.store(e.b.fptrunc(x, vector(F16, _EIGHT)), e.at(to, i, 16))
            return []

        e.loop(e.b.ashr(dims, I64(3)), [], eight)
        return context.get_dummy_value()

    i64, f32 = types.int64, types.float32
    return types.void(i64, i64, i64, f32, f32), code


@intrinsic
def store_bfloat16(context: Any, source: Any, to: Any, dims: Any, add: Any, factor: Any) -> Any:
    """Store `(row + add) * factor` as bf16."""
    return _store_row("bfloat16")


@intrinsic
def store_float16(context: Any, source: Any, to: Any, dims: Any, add: Any, factor: Any) -> Any:
    """Store `(row + add) * factor` as fp16."""
    return _store_row("float16")


@intrinsic
def store_float32(context: Any, source: Any, to: Any, dims: Any, add: Any, factor: Any) -> Any:
    """Store `(row + add) * factor` as float32."""
    return _store_row("float32")


@intrinsic
def add_scaled(context: Any, to: Any, row: Any, dims: Any, factor: Any) -> Any:
    """Add `row * factor` to a row of float32."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        e = Emitter(builder)
        to, row, dims, factor = values
        factor = e.splat(factor, _EIGHT)

        def eight(i: ir.Value, _: Any) -> list[ir.Value]:
            kind = vector(F32, _EIGHT)
            x = e.load(kind, e.at(row, i, 32))
            e.store(e.fma(x, factor, e.load(kind, e.at(to, i, 32))), e.at(to, i, 32))
            return []

        e.loop(e.b.ashr(dims, I64(3)), [], eight)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(i64, i64, i64, types.float32), code


@intrinsic
def widen_scales(
    context: Any, scales: Any, zeros: Any, to_scales: Any, to_zeros: Any, middle: Any
) -> Any:
    """Widen a tile's fp16 scales, and its zeros plus `middle` times the scales, to float32."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        e = Emitter(builder)
        scales, zeros, to_scales, to_zeros, middle = values
        scale = e.halves_to_floats(e.load(vector(I16), scales))
        zero = e.halves_to_floats(e.load(vector(I16), zeros))
        e.store(scale, to_scales)
        e.store(e.fma(scale, e.splat(middle), zero), to_zeros)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(i64, i64, i64, i64, types.float32), code


@intrinsic
def copy_bfloat16(context: Any, source: Any, to: Any, dims: Any) -> Any:
    """Copy a row of bf16."""

    def emit(e: Emitter, source: ir.Value, to: ir.Value, dims: ir.Value) -> None:
        def eight(i: ir.Value, _: Any) -> list[ir.Value]:
            e.store(e.load(vector(I16, _EIGHT), e.at(source, i, 16)), e.at(to, i, 16))
            return []

        e.loop(e.b.ashr(dims, I64(3)), [], eight)

    return procedure(emit, 3)


@intrinsic
def fill(context: Any, to: Any, lines: Any) -> Any:
    """Write zeros to `lines` cache lines, at least one."""

    def emit(e: Emitter, to: ir.Value, lines: ir.Value) -> None:
        def line(i: ir.Value, _: Any) -> list[ir.Value]:
            e.store(NOTHING, e.at(to, i, 64))
            return []

        e.loop(lines, [], line)

    return procedure(emit, 2)


@intrinsic
def add_limbs(context: Any, to: Any, upper: Any, lower: Any, vectors: Any, factor: Any) -> Any:
    """Add `(256 * upper + lower) * factor` to a row of float32; sums of int32, below 2^23 each."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        e = Emitter(builder)
        to, upper, lower, vectors, factor = values
        factor = e.splat(factor)

        def sixteen(i: ir.Value, _: Any) -> list[ir.Value]:
            high = e.load(vector(I32), e.at(upper, i, 64))
            low = e.load(vector(I32), e.at(lower, i, 64))
            both = e.b.add(e.b.shl(high, every(I32, 8)), low)
            place = e.at(to, i, 64)
            x = e.b.sitofp(both, vector(F32))
            e.store(e.fma(x, factor, e.load(vector(F32), place)), place)
            return []

        e.loop(vectors, [], sixteen)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(i64, i64, i64, i64, types.float32), code
