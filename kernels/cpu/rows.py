# SPDX-License-Identifier: Apache-2.0
"""What every path does to a row of queries, scores or outputs, sixteen numbers at a time.

Rows stand in scratch memory at addresses that are multiples of 64 bytes.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .emit import (
    BF16,
    F16,
    F32,
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

LOG2_E = math.log2(math.e)

STATE_BYTES = 16
"""Running numbers of a row, float32: largest score, sum of weights, sum of weight x zero, sum of
rounded weight x scale."""

MIDDLE_CODE = 7.5
"""Middle of the value codes. Rounded weights multiply `code - MIDDLE_CODE` only, which halves
what their rounding costs."""

_EIGHT = LANES // 2  # head sizes are multiples of eight, not of sixteen


def _floats_of_bfloat16(e: Emitter, address: ir.Value) -> ir.Value:
    wide = e.b.zext(e.load(vector(I16, _EIGHT), address), vector(I32, _EIGHT))
    return e.b.bitcast(e.b.shl(wide, every(I32, 16, _EIGHT)), vector(F32, _EIGHT))


def _floats_of_float16(e: Emitter, address: ir.Value) -> ir.Value:
    return e.halves_to_floats(e.load(vector(I16, _EIGHT), address))


def _bfloat16_of_floats(e: Emitter, x: ir.Value) -> ir.Value:
    b = e.b
    bits = b.bitcast(x, vector(I32, _EIGHT))
    last = b.and_(b.lshr(bits, every(I32, 16, _EIGHT)), every(I32, 1, _EIGHT))
    rounded = b.add(b.add(bits, every(I32, 0x7FFF, _EIGHT)), last)
    # Rounding up the largest payload of a NaN would make it a zero.
    quiet = every(I32, 0x7FC00000, _EIGHT)
    rounded = b.select(b.fcmp_unordered("uno", x, x), quiet, rounded)
    return b.trunc(b.lshr(rounded, every(I32, 16, _EIGHT)), vector(I16, _EIGHT))


def _load_row(e: Emitter, source: ir.Value, to: ir.Value, dims: ir.Value, kind: str) -> None:
    def eight(i: ir.Value, _: Any) -> list[ir.Value]:
        if kind == "float32":
            x = e.load(vector(F32, _EIGHT), e.at(source, i, 32))
        else:
            widen = _floats_of_bfloat16 if kind == "bfloat16" else _floats_of_float16
            x = widen(e, e.at(source, i, 16))
        e.store(x, e.at(to, i, 32))
        return []

    e.loop(e.b.ashr(dims, I64(3)), [], eight)


@intrinsic  # type: ignore[misc]
def load_bfloat16(context: Any, source: Any, to: Any, dims: Any) -> Any:
    """Widen a row of bf16 to float32."""
    return procedure(lambda e, *a: _load_row(e, *a, "bfloat16"), 3)


@intrinsic  # type: ignore[misc]
def load_float16(context: Any, source: Any, to: Any, dims: Any) -> Any:
    """Widen a row of fp16 to float32."""
    return procedure(lambda e, *a: _load_row(e, *a, "float16"), 3)


@intrinsic  # type: ignore[misc]
def load_float32(context: Any, source: Any, to: Any, dims: Any) -> Any:
    """Copy a row of float32."""
    return procedure(lambda e, *a: _load_row(e, *a, "float32"), 3)


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
                e.store(_bfloat16_of_floats(e, x), e.at(to, i, 16))
            else:
                e.store(e.b.fptrunc(x, vector(F16, _EIGHT)), e.at(to, i, 16))
            return []

        e.loop(e.b.ashr(dims, I64(3)), [], eight)
        return context.get_dummy_value()

    i64, f32 = types.int64, types.float32
    return types.void(i64, i64, i64, f32, f32), code


@intrinsic  # type: ignore[misc]
def store_bfloat16(context: Any, source: Any, to: Any, dims: Any, add: Any, factor: Any) -> Any:
    """Store `(row + add) * factor` as bf16."""
    return _store_row("bfloat16")


@intrinsic  # type: ignore[misc]
def store_float16(context: Any, source: Any, to: Any, dims: Any, add: Any, factor: Any) -> Any:
    """Store `(row + add) * factor` as fp16."""
    return _store_row("float16")


@intrinsic  # type: ignore[misc]
def store_float32(context: Any, source: Any, to: Any, dims: Any, add: Any, factor: Any) -> Any:
    """Store `(row + add) * factor` as float32."""
    return _store_row("float32")


@intrinsic  # type: ignore[misc]
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


@intrinsic  # type: ignore[misc]
def widen_tile_halves(context: Any, source: Any, to: Any) -> Any:
    """Widen the sixteen fp16 scales or zeros of a tile to float32."""

    def emit(e: Emitter, source: ir.Value, to: ir.Value) -> None:
        e.store(e.halves_to_floats(e.load(vector(I16), source)), to)

    return procedure(emit, 2)


@intrinsic  # type: ignore[misc]
def copy_bfloat16(context: Any, source: Any, to: Any, dims: Any) -> Any:
    """Copy a row of bf16."""

    def emit(e: Emitter, source: ir.Value, to: ir.Value, dims: ir.Value) -> None:
        def eight(i: ir.Value, _: Any) -> list[ir.Value]:
            e.store(e.load(vector(I16, _EIGHT), e.at(source, i, 16)), e.at(to, i, 16))
            return []

        e.loop(e.b.ashr(dims, I64(3)), [], eight)

    return procedure(emit, 3)


@intrinsic  # type: ignore[misc]
def fill(context: Any, to: Any, lines: Any) -> Any:
    """Write zeros to `lines` cache lines, at least one."""

    def emit(e: Emitter, to: ir.Value, lines: ir.Value) -> None:
        def line(i: ir.Value, _: Any) -> list[ir.Value]:
            e.store(NOTHING, e.at(to, i, 64))
            return []

        e.loop(lines, [], line)

    return procedure(emit, 2)


def _softmax_code(rounded: bool) -> Any:
    """Return an intrinsic's answer for the online softmax of a row; see `softmax_row`."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        e = Emitter(builder)
        b = builder
        scores, weights, scales, zeros, state, vectors, first, last, factor, cap = values
        lanes = constant(I32, range(LANES))
        first = e.splat(b.trunc(first, I32))
        last = e.splat(b.trunc(last, I32))
        minus_infinity = every(F32, -math.inf)
        scale = e.splat(factor)

        def visible(i: ir.Value) -> ir.Value:
            index = b.add(lanes, e.splat(b.trunc(b.mul(i, I64(LANES)), I32)))
            return b.and_(
                b.icmp_signed(">=", index, first), b.icmp_signed("<", index, last)
            )

        def capped(x: ir.Value) -> ir.Value:
            # cap * tanh(x / cap) = cap - 2 cap / (1 + 2^(2 log2(e) x / cap)), which the
            # clamps of 2^x leave at +-cap for any x.
            high = every(F32, 126.0)
            inverse = b.fdiv(F32(2.0 * LOG2_E), cap)
            power = b.fmul(x, e.splat(inverse))
            power = b.select(b.fcmp_ordered(">", power, high), high, power)
            grown = b.fadd(e.exp2(power), every(F32, 1.0))
            wide = e.splat(b.fmul(cap, F32(LOG2_E)))
            return b.fsub(wide, b.fdiv(b.fadd(wide, wide), grown))

        def find_largest(with_cap: bool) -> ir.Value:
            def sixteen(i: ir.Value, largest: list[ir.Value]) -> list[ir.Value]:
                x = b.fmul(e.load(vector(F32), e.at(scores, i, 64)), scale)
                if with_cap:
                    x = capped(x)
                x = b.select(visible(i), x, minus_infinity)
                e.store(x, e.at(scores, i, 64))
                return [e.larger(x, largest[0])]

            found = e.loop(vectors, [minus_infinity], sixteen)[0]
            return e.reduce(found, e.larger)

        with b.if_else(b.fcmp_ordered(">", cap, F32(0.0))) as (then, otherwise):
            with then:
                largest_capped = find_largest(with_cap=True)
                end_capped = b.block
            with otherwise:
                largest_plain = find_largest(with_cap=False)
                end_plain = b.block
        largest = b.phi(F32)
        largest.add_incoming(largest_capped, end_capped)
        largest.add_incoming(largest_plain, end_plain)
        before = e.load(F32, state)
        largest = e.larger(largest, before)
        shift = e.splat(largest)
        decay = b.extract_element(e.exp2(b.fsub(e.splat(before), shift)), I32(0))

        def weigh(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            seen = visible(i)
            x = e.load(vector(F32), e.at(scores, i, 64))
            weight = b.select(seen, e.exp2(b.fsub(x, shift)), NOTHING)
            # Selected, not multiplied: the scale of a token that is not there may be NaN.
            scaled = b.fmul(weight, e.load(vector(F32), e.at(scales, i, 64)))
            scaled = b.select(seen, scaled, NOTHING)
            zero = b.fmul(weight, e.load(vector(F32), e.at(zeros, i, 64)))
            if rounded:
                # The middle of the codes is taken with exact weights, see `finish`.
                zero = e.fma(scaled, every(F32, MIDDLE_CODE), zero)
            zero = b.select(seen, zero, NOTHING)
            if rounded:
                short = b.fptrunc(scaled, vector(BF16))
                e.store(b.bitcast(short, vector(I16)), e.at(weights, i, 32))
                scaled = b.fpext(short, vector(F32))
            else:
                e.store(scaled, e.at(weights, i, 64))
            news = (weight, zero, scaled)
            return [b.fadd(total, new) for total, new in zip(sums, news, strict=True)]

        sums = e.loop(vectors, [NOTHING] * 3, weigh)
        e.store(largest, state)
        for place, total in enumerate(sums, 1):
            address = e.at(state, 4 * place)
            new = e.reduce(total, b.fadd)
            e.store(b.fadd(b.fmul(e.load(F32, address), decay), new), address)
        return decay

    i64, f32 = types.int64, types.float32
    return f32(i64, i64, i64, i64, i64, i64, i64, i64, f32, f32), code


@intrinsic  # type: ignore[misc]
def softmax_row(
    context: Any,
    scores: Any,
    weights: Any,
    scales: Any,
    zeros: Any,
    state: Any,
    vectors: Any,
    first: Any,
    last: Any,
    factor: Any,
    cap: Any,
) -> Any:
    """Turn a chunk of a row's scores into float32 weights and move the row's state on.

    With x = log2(e) * factor * score, or its soft-capped value, and m the largest x so far:

        weight = 2^(x - m) * scale  where first <= token < last, else exactly 0

    Args:
        context: Numba's.
        scores: Address of `vectors` x 16 float32; overwritten.
        weights: Address for as many weights.
        scales: Address of the tokens' value scales, float32.
        zeros: Address of their zeros.
        state: Address of the row's `STATE_BYTES`.
        vectors: Number of vectors of 16 tokens.
        first: First token that the row sees.
        last: The token after the last; above `first`.
        factor: log2(e) times the scale of the scores; without log2(e) under a soft cap.
        cap: The soft cap, 0 for none.

    Returns:
        What the row's sums so far, its output included, are to be multiplied by.
    """
    return _softmax_code(rounded=False)


@intrinsic  # type: ignore[misc]
def softmax_row_bfloat16(
    context: Any,
    scores: Any,
    weights: Any,
    scales: Any,
    zeros: Any,
    state: Any,
    vectors: Any,
    first: Any,
    last: Any,
    factor: Any,
    cap: Any,
) -> Any:
    """Do as `softmax_row` with weights rounded to bf16; the last sum is of the rounded ones."""
    return _softmax_code(rounded=True)

