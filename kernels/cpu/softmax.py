# SPDX-License-Identifier: Apache-2.0
"""The online softmax of a row of scores, which every path shares."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .emit import (
    BF16,
    F32,
    I16,
    I32,
    I64,
    LANES,
    NOTHING,
    Emitter,
    constant,
    every,
    vector,
)

LOG2_E = math.log2(math.e)

STATE_BYTES = 12
"""Running numbers of a row, float32: largest score, sum of weights, sum of weight x zero."""


def _soft_capped(e: Emitter, x: ir.Value, cap: ir.Value) -> ir.Value:
    """Return `log2(e) cap tanh(x / cap)` as `c - 2 c / (1 + 2^(2 log2(e) x / cap))`."""
    b = e.b
    high = every(F32, 126.0)
    power = b.fmul(x, e.splat(b.fdiv(F32(2.0 * LOG2_E), cap)))
    power = b.select(b.fcmp_ordered(">", power, high), high, power)
    grown = b.fadd(e.exp2(power), every(F32, 1.0))
    wide = e.splat(b.fmul(cap, F32(LOG2_E)))
    return b.fsub(wide, b.fdiv(b.fadd(wide, wide), grown))


class _Softmax:
    """The online softmax of one row and chunk; see `softmax_row`."""

    def __init__(self, e: Emitter, values: list[ir.Value], rounded: bool) -> None:
        (self.scores, self.weights, self.scales, self.zeros, self.state, self.vectors,
         self.first, self.last, factor, self.cap) = values  # fmt: skip
        self.e, self.rounded = e, rounded
        self.factor = e.splat(factor)

    def weigh(
        self,
        largest: ir.Value,
        exponent: Callable[[ir.Value, ir.Value], ir.Value],
        visible: Callable[[ir.Value], ir.Value] | None,
    ) -> ir.Value:
        """Write weights, move the state on to `largest` and return the decay of what was."""
        e, b = self.e, self.e.b
        before = e.load(F32, self.state)
        largest = e.larger(largest, before)
        shift = e.splat(largest)
        decay = b.extract_element(e.exp2(b.fsub(e.splat(before), shift)), I32(0))

        def sixteen(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            weight = e.exp2(exponent(i, shift))
            zero = e.load(vector(F32), e.at(self.zeros, i, 64))
            scaled = b.fmul(weight, e.load(vector(F32), e.at(self.scales, i, 64)))
            if visible is not None:
                # Selected, not multiplied: the scale of a token that is not there may be NaN.
                seen = visible(i)
                weight = b.select(seen, weight, NOTHING)
                scaled = b.select(seen, scaled, NOTHING)
                zero = b.select(seen, zero, NOTHING)
            if self.rounded:
                short = b.bitcast(b.fptrunc(scaled, vector(BF16)), vector(I16))
                e.store(short, e.at(self.weights, i, 32))
            else:
                e.store(scaled, e.at(self.weights, i, 64))
            return [b.fadd(sums[0], weight), e.fma(weight, zero, sums[1])]

        sums = e.loop(self.vectors, [NOTHING] * 2, sixteen)
        e.store(largest, self.state)
        for place, total in enumerate(sums, 1):
            address = e.at(self.state, 4 * place)
            grown = b.fmul(e.load(F32, address), decay)
            e.store(b.fadd(grown, e.reduce(total, b.fadd)), address)
        return decay

    def plain(self) -> ir.Value:
        """Every token is visible, no cap, a positive factor."""
        e, b = self.e, self.e.b

        def load(i: ir.Value) -> ir.Value:
            return e.load(vector(F32), e.at(self.scores, i, 64))

        def larger(i: ir.Value, largest: list[ir.Value]) -> list[ir.Value]:
            return [e.larger(load(i), largest[0])]

        found = e.loop(self.vectors, [every(F32, -math.inf)], larger)[0]
        largest = e.reduce(b.fmul(found, self.factor), e.larger)
        return self.weigh(
            largest, lambda i, shift: e.fma(load(i), self.factor, b.fneg(shift)), None
        )

    def masked(self) -> ir.Value:
        """Any token may be invisible, and there may be a cap."""
        e, b = self.e, self.e.b
        first = e.splat(b.trunc(self.first, I32))
        last = e.splat(b.trunc(self.last, I32))
        lanes = constant(I32, range(LANES))
        minus_infinity = every(F32, -math.inf)

        def visible(i: ir.Value) -> ir.Value:
            token = b.add(lanes, e.splat(b.trunc(b.mul(i, I64(LANES)), I32)))
            not_before = b.icmp_signed(">=", token, first)
            return b.and_(not_before, b.icmp_signed("<", token, last))

        def cap(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            place = e.at(self.scores, i, 64)
            x = b.fmul(e.load(vector(F32), place), self.factor)
            e.store(_soft_capped(e, x, self.cap), place)
            return []

        def scale(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            place = e.at(self.scores, i, 64)
            e.store(b.fmul(e.load(vector(F32), place), self.factor), place)
            return []

        with b.if_else(b.fcmp_ordered(">", self.cap, F32(0.0))) as (then, otherwise):
            with then:
                e.loop(self.vectors, [], cap)
            with otherwise:
                e.loop(self.vectors, [], scale)

        def load(i: ir.Value) -> ir.Value:
            return e.load(vector(F32), e.at(self.scores, i, 64))

        def larger(i: ir.Value, largest: list[ir.Value]) -> list[ir.Value]:
            return [e.larger(b.select(visible(i), load(i), minus_infinity), largest[0])]

        found = e.loop(self.vectors, [minus_infinity], larger)[0]
        largest = e.reduce(found, e.larger)
        return self.weigh(largest, lambda i, shift: b.fsub(load(i), shift), visible)


def _softmax_code(rounded: bool) -> Any:
    """Return an intrinsic's answer for the online softmax of a row; see `softmax_row`."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        softmax = _Softmax(Emitter(builder), values, rounded)
        b = builder
        every_token = b.icmp_signed("==", b.mul(softmax.vectors, I64(LANES)), softmax.last)
        every_token = b.and_(every_token, b.icmp_signed("<=", softmax.first, I64(0)))
        *_, factor, cap = values
        is_plain = b.and_(every_token, b.fcmp_ordered("<=", cap, F32(0.0)))
        is_plain = b.and_(is_plain, b.fcmp_ordered(">", factor, F32(0.0)))
        with b.if_else(is_plain) as (then, otherwise):
            with then:
                decay_plain = softmax.plain()
                end_plain = b.block
            with otherwise:
                decay_masked = softmax.masked()
                end_masked = b.block
        decay = b.phi(F32)
        decay.add_incoming(decay_plain, end_plain)
        decay.add_incoming(decay_masked, end_masked)
        return decay

    i64, f32 = types.int64, types.float32
    return f32(i64, i64, i64, i64, i64, i64, i64, i64, f32, f32), code


@intrinsic
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


@intrinsic
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
    """Do as `softmax_row` with weights rounded to bf16."""
    return _softmax_code(rounded=True)
