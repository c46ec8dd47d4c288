# SPDX-License-Identifier: Apache-2.0
"""The online softmax of a row of scores, which every path shares."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from vllm_hybrid_kv.kernels.cpu import isa
from vllm_hybrid_kv.kernels.cpu.emit import (
    BF16,
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
    vector,
)
from vllm_hybrid_kv.kernels.cpu.widen import LINE, MIDDLE_CODE, TILE_RECORD
from vllm_hybrid_kv.kernels.k8v4 import QUAD_BYTE_OF_TOKEN

LOG2_E = math.log2(math.e)

STATE_BYTES = 16
"""Numbers of a row, float32: largest score, sum of weights, sum of weight x zero so far; and what
a weight of the last chunk counts, where weights are integers."""

TOP_WEIGHT = 65534.0
"""The integer that a chunk's largest weight becomes; one less than what two bytes hold, so that
rounding cannot pass that."""

_LEAST_TOP = 1e-30
"""Chunks whose weights are all below this count as nothing: their inverse would overflow."""

_ROUND = 1.5 * 2.0**23
"""Added to a float32, leaves the rounded number in its lower bits."""

FLOATS, BFLOATS, LIMBS = range(3)
"""What weights become: float32, bf16, or integers of two bytes."""


def _soft_capped(e: Emitter, x: ir.Value, cap: ir.Value) -> ir.Value:
    """Return `log2(e) cap tanh(x / cap)` as `c - 2 c / (1 + 2^(2 log2(e) x / cap))`."""
    b = e.b
    high = every(F32, 126.0)
    power = b.fmul(x, e.splat(b.fdiv(F32(2.0 * LOG2_E), cap)))
    power = b.select(b.fcmp_ordered(">", power, high), high, power)
    grown = b.fadd(e.exp2(power), every(F32, 1.0))
    wide = e.splat(b.fmul(cap, F32(LOG2_E)))
    return b.fsub(wide, b.fdiv(b.fadd(wide, wide), grown))


def _lower_bytes() -> list[int]:
    """Return where the lower bytes of 64 tokens' weights stand, in the order of their values.

    Vectors 0 and 1 of sixteen tokens are the halves of one vector's 32-bit lanes, and 2 and 3 of
    another's, which stands behind it.
    """
    found = [0] * 64
    for token in range(64):
        v, lane = divmod(token, LANES)
        place = token // 4 * 4 + QUAD_BYTE_OF_TOKEN[token % 4]
        found[place] = 64 * (v // 2) + 4 * lane + 2 * (v % 2)
    return found


_LOWER_BYTES = _lower_bytes()


class _Softmax:
    """The online softmax of one row and chunk; see `softmax_row`."""

    def __init__(self, e: Emitter, values: list[ir.Value], kind: int) -> None:
        (self.scores, self.weights, self.scales, self.zeros, self.state, self.vectors,
         self.first, self.last, factor, self.cap, *more) = values  # fmt: skip
        self.lower, *self.ahead = more or [None]
        self.e, self.kind = e, kind
        self.factor = e.splat(factor)

    def ask(self, i: ir.Value, column: int) -> None:
        """Ask for two lines of the keys (0) or values (1) of tile `i` of the next chunk."""
        if self.ahead:
            e = self.e
            records, *offsets = self.ahead
            tile = e.load(I64, e.at(e.at(records, i, TILE_RECORD), 8 * column))
            place = e.b.add(tile, offsets[column])
            for line in range(2):
                e.prefetch(e.at(place, LINE * line))

    def bfloat16(self, x: ir.Value) -> ir.Value:
        """Round to bf16, with the machine's instruction if it has one.

        The portable path is compiled with this in it and never comes here.
        """
        if isa.AVX512_BF16 in isa.available():
            return self.e.b.bitcast(self.e.b.fptrunc(x, vector(BF16)), vector(I16))
        return self.e.floats_to_bfloat16(x)

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
            self.ask(i, 1)
            weight = e.exp2(exponent(i, shift))
            zero = e.load(vector(F32), e.at(self.zeros, i, 64))
            scaled = b.fmul(weight, e.load(vector(F32), e.at(self.scales, i, 64)))
            if visible is not None:
                # Selected, not multiplied: the scale of a token that is not there may be NaN.
                seen = visible(i)
                weight = b.select(seen, weight, NOTHING)
                scaled = b.select(seen, scaled, NOTHING)
                zero = b.select(seen, zero, NOTHING)
            if self.kind == BFLOATS:
                e.store(self.bfloat16(scaled), e.at(self.weights, i, 32))
            else:
                place = self.scores if self.kind == LIMBS else self.weights
                e.store(scaled, e.at(place, i, 64))
            top = [e.larger(scaled, sums[2])] if self.kind == LIMBS else []
            return [b.fadd(sums[0], weight), e.fma(weight, zero, sums[1]), *top]

        limbs = self.kind == LIMBS
        total, zeros, *top = e.loop(self.vectors, [NOTHING] * (3 if limbs else 2), sixteen)
        more = e.reduce(zeros, b.fadd)
        if limbs:
            more = b.fsub(more, self.write_limbs(e.reduce(top[0], e.larger)))
        e.store(largest, self.state)
        for number, grown in enumerate((e.reduce(total, b.fadd), more), 1):
            address = e.at(self.state, 4 * number)
            e.store(b.fadd(b.fmul(e.load(F32, address), decay), grown), address)
        return decay

    def write_limbs(self, top: ir.Value) -> ir.Value:
        """Write weights as integers and return what they count times the middle code.

        A weight becomes round(weight / top * TOP_WEIGHT), its upper byte in one row and its
        lower one in another, four tokens of a quad as their values stand in a page.
        """
        e, b = self.e, self.e.b
        counts = b.fcmp_ordered(">", top, F32(_LEAST_TOP))
        factor = b.select(counts, b.fdiv(top, F32(TOP_WEIGHT)), F32(0.0))
        e.store(factor, e.at(self.state, 12))
        inverse = e.splat(b.select(counts, b.fdiv(F32(TOP_WEIGHT), top), F32(0.0)))
        lower = constant(I32, _LOWER_BYTES)
        upper = constant(I32, [place + 1 for place in _LOWER_BYTES])

        def four(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            words = []
            for v in range(4):
                x = e.load(vector(F32), e.at(e.at(self.scores, i, 256), 64 * v))
                raised = b.fadd(b.fmul(x, inverse), every(F32, _ROUND))
                sums = [b.fadd(sums[0], b.fsub(raised, every(F32, _ROUND)))]
                words.append(b.bitcast(raised, vector(I32)))
            pairs = []
            for low, high in ((words[0], words[1]), (words[2], words[3])):
                low = b.and_(low, every(I32, 0xFFFF))
                pair = b.or_(low, b.shl(high, every(I32, 16)))
                pairs.append(b.bitcast(pair, vector(I8, 64)))
            place = e.at(self.weights, i, 64)
            e.store(b.shuffle_vector(*pairs, upper), place)
            e.store(b.shuffle_vector(*pairs, lower), e.b.add(place, self.lower))
            return sums

        sums = e.loop(b.ashr(self.vectors, I64(2)), [NOTHING], four)
        return b.fmul(b.fmul(e.reduce(sums[0], b.fadd), factor), F32(MIDDLE_CODE))

    def plain(self) -> ir.Value:
        """Every token is visible, no cap, a positive factor."""
        e, b = self.e, self.e.b

        def load(i: ir.Value) -> ir.Value:
            return e.load(vector(F32), e.at(self.scores, i, 64))

        def larger(i: ir.Value, largest: list[ir.Value]) -> list[ir.Value]:
            self.ask(i, 0)
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

        capped = b.fcmp_ordered(">", self.cap, F32(0.0))
        with b.if_then(capped):
            e.loop(self.vectors, [], cap)
        factor = b.select(capped, every(F32, 1.0), self.factor)

        def load(i: ir.Value) -> ir.Value:
            return e.load(vector(F32), e.at(self.scores, i, 64))

        def larger(i: ir.Value, largest: list[ir.Value]) -> list[ir.Value]:
            self.ask(i, 0)
            x = b.fmul(load(i), factor)
            return [e.larger(b.select(visible(i), x, minus_infinity), largest[0])]

        found = e.loop(self.vectors, [minus_infinity], larger)[0]
        largest = e.reduce(found, e.larger)
        # Rounded as in `plain`: which of the two a row takes depends on the rows beside it.
        return self.weigh(largest, lambda i, shift: e.fma(load(i), factor, b.fneg(shift)), visible)


def _softmax_code(kind: int) -> Any:
    """Return an intrinsic's answer for the online softmax of a row; see `softmax_row`."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        softmax = _Softmax(Emitter(builder), values, kind)
        b = builder
        every_token = b.icmp_signed("==", b.mul(softmax.vectors, I64(LANES)), softmax.last)
        every_token = b.and_(every_token, b.icmp_signed("<=", softmax.first, I64(0)))
        factor, cap = values[8:10]
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
    return f32(*[i64] * 8, f32, f32, *[i64] * (4 if kind == LIMBS else 0)), code


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
    return _softmax_code(FLOATS)


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
    return _softmax_code(BFLOATS)


@intrinsic
def softmax_row_limbs(
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
    lower: Any,
    ahead: Any,
    key_offset: Any,
    value_offset: Any,
) -> Any:
    """Do as `softmax_row` with weights as integers, `vectors` a multiple of 4.

    Weights are relative to the chunk's largest, which becomes `TOP_WEIGHT`; the state's last
    number is what 1 counts. Upper bytes are written to `weights`, the others `lower` bytes
    further. What the middle code adds to every dim is taken off the sum of zeros, as `scales`
    and `zeros` are those of codes less the middle one.

    Meanwhile asks for lines of the next chunk: two of each tile's keys and two of its values, so
    many bytes into them; `ahead` is the address of the tiles' records.
    """
    return _softmax_code(LIMBS)
