# SPDX-License-Identifier: Apache-2.0
"""The online softmax of a row of scores, shared by all instruction sets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from vllm_hybrid_kv.kernels.cpu import isa
from vllm_hybrid_kv.kernels.cpu.inline import Float32, Int64, inline_llvm
from vllm_hybrid_kv.kernels.cpu.llvm import (
    BF16,
    F32,
    I8,
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
from vllm_hybrid_kv.kernels.cpu.records import ROW_STATE, TILE_ADDRESSES, TILE_RECORD, offset_of
from vllm_hybrid_kv.kernels.k8v4 import MIDDLE_VALUE_CODE, QUAD_BYTE_OF_TOKEN

LOG2_E = math.log2(math.e)

TOP_WEIGHT = 65534.0
"""The integer for a chunk's largest weight: one less than the largest of two bytes, so that
rounding cannot exceed it."""

_LEAST_TOP = 1e-30
"""A chunk whose weights are all smaller counts as zero, because their inverse would overflow."""

_ROUND = 1.5 * 2.0**23
"""Added to a float32, leaves the rounded number in its lower bits."""

FLOATS, BFLOATS, LIMBS = range(3)
"""Formats of weights: float32, bf16, or integers of two bytes."""

_LARGEST, _TOTAL, _OFFSET, _LIMB_FACTOR = (
    offset_of(ROW_STATE, name) for name in ("largest", "total", "offset", "limb_factor")
)


def _soft_capped(e: Emitter, x: ir.Value, cap: ir.Value) -> ir.Value:
    """Return `log2(e) cap tanh(x / cap)` as `c - 2 c / (1 + 2^(2 log2(e) x / cap))`."""
    b = e.b
    high = filled(F32, 126.0)
    power = b.fmul(x, e.broadcast(b.fdiv(F32(2.0 * LOG2_E), cap)))
    power = b.select(b.fcmp_ordered(">", power, high), high, power)
    grown = b.fadd(e.exp2(power), filled(F32, 1.0))
    wide = e.broadcast(b.fmul(cap, F32(LOG2_E)))
    return b.fsub(wide, b.fdiv(b.fadd(wide, wide), grown))


def _lower_bytes() -> list[int]:
    """Return the offsets of the lower bytes of 64 tokens' weights, in the order of their values.

    Vectors 0 and 1 of sixteen tokens are the halves of the 32-bit lanes of one vector, and vectors
    2 and 3 those of a second one after it.
    """
    offsets = [0] * 64
    for token in range(64):
        v, lane = divmod(token, LANES)
        place = token // 4 * 4 + QUAD_BYTE_OF_TOKEN[token % 4]
        offsets[place] = 64 * (v // 2) + 4 * lane + 2 * (v % 2)
    return offsets


_LOWER_BYTES = _lower_bytes()


@dataclass
class _Softmax:
    """The code for one row and chunk in one format; see `softmax_row` for the fields."""

    e: Emitter
    weight_format: int
    scores: ir.Value
    weights: ir.Value
    scales: ir.Value
    zeros: ir.Value
    state: ir.Value
    vectors: ir.Value
    first: ir.Value
    last: ir.Value
    factor: ir.Value
    cap: ir.Value
    lower: ir.Value
    ahead: ir.Value
    key_offset: ir.Value
    value_offset: ir.Value

    def __post_init__(self) -> None:
        self.factors = self.e.broadcast(self.factor)
        self.limbs = self.weight_format == LIMBS

    def prefetch(self, i: ir.Value, part: str, offset: ir.Value) -> None:
        """Prefetch two lines of the keys or values of tile `i` of the next chunk."""
        if self.limbs:
            e = self.e
            record = e.at(self.ahead, i, TILE_RECORD)
            tile = e.load(I64, e.at(record, offset_of(TILE_ADDRESSES, part)))
            place = e.b.add(tile, offset)
            for line in range(2):
                e.prefetch(e.at(place, LINE * line))

    def bfloat16(self, x: ir.Value) -> ir.Value:
        """Round to bf16, with the machine's instruction if it has one.

        The portable path compiles this code and never runs it.
        """
        if isa.AVX512_BF16 in isa.available():
            return self.e.b.bitcast(self.e.b.fptrunc(x, vector(BF16)), vector(I16))
        return self.e.floats_to_bfloat16(x)

    def load_scores(self, i: ir.Value) -> ir.Value:
        return self.e.load_floats(self.e.at(self.scores, i, LINE))

    def weigh(
        self, largest: ir.Value, factor: ir.Value, visible: Callable[[ir.Value], ir.Value] | None
    ) -> ir.Value:
        """Write weights, update the state to `largest`, and return the decay of earlier sums."""
        e, b = self.e, self.e.b
        before = e.load(F32, e.at(self.state, _LARGEST))
        largest = e.larger(largest, before)
        shift = e.broadcast(largest)
        decay = b.extract_element(e.exp2(b.fsub(e.broadcast(before), shift)), I32(0))

        def sixteen(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            self.prefetch(i, "values", self.value_offset)
            # One rounding, with or without a mask: other rows of the batch decide about the mask.
            weight = e.exp2(e.fma(self.load_scores(i), factor, b.fneg(shift)))
            zero = e.load_floats(e.at(self.zeros, i, LINE))
            scaled = b.fmul(weight, e.load_floats(e.at(self.scales, i, LINE)))
            if visible is not None:
                # Selected, not multiplied: the scale of a missing token may be NaN.
                mask = visible(i)
                weight = b.select(mask, weight, ZEROS)
                scaled = b.select(mask, scaled, ZEROS)
                zero = b.select(mask, zero, ZEROS)
            if self.weight_format == BFLOATS:
                e.store(self.bfloat16(scaled), e.at(self.weights, i, 32))
            else:
                e.store(scaled, e.at(self.scores if self.limbs else self.weights, i, LINE))
            top = [e.larger(scaled, sums[2])] if self.limbs else []
            return [b.fadd(sums[0], weight), e.fma(weight, zero, sums[1]), *top]

        total, offset, *top = e.loop(self.vectors, [ZEROS] * (3 if self.limbs else 2), sixteen)
        added_offset = e.reduce(offset, b.fadd)
        if self.limbs:
            added_offset = b.fsub(added_offset, self.write_limbs(e.reduce(top[0], e.larger)))
        e.store(largest, e.at(self.state, _LARGEST))
        for at, added in ((_TOTAL, e.reduce(total, b.fadd)), (_OFFSET, added_offset)):
            address = e.at(self.state, at)
            e.store(b.fadd(b.fmul(e.load(F32, address), decay), added), address)
        return decay

    def write_limbs(self, top: ir.Value) -> ir.Value:
        """Write weights as integers, and return their sum times the middle code.

        A weight becomes round(weight / top * TOP_WEIGHT). Its upper byte goes into one row and its
        lower byte into another, four tokens of a quad in the order of their values in a page.
        """
        e, b = self.e, self.e.b
        counts = b.fcmp_ordered(">", top, F32(_LEAST_TOP))
        factor = b.select(counts, b.fdiv(top, F32(TOP_WEIGHT)), F32(0.0))
        e.store(factor, e.at(self.state, _LIMB_FACTOR))
        inverse = e.broadcast(b.select(counts, b.fdiv(F32(TOP_WEIGHT), top), F32(0.0)))
        lower = constant(I32, _LOWER_BYTES)
        upper = constant(I32, [place + 1 for place in _LOWER_BYTES])

        def four(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            words = []
            for v in range(4):
                x = e.load_floats(e.at(e.at(self.scores, i, 4 * LINE), LINE * v))
                raised = b.fadd(b.fmul(x, inverse), filled(F32, _ROUND))
                sums = [b.fadd(sums[0], b.fsub(raised, filled(F32, _ROUND)))]
                words.append(b.bitcast(raised, vector(I32)))
            pairs = []
            for low, high in ((words[0], words[1]), (words[2], words[3])):
                low = b.and_(low, filled(I32, 0xFFFF))
                pair = b.or_(low, b.shl(high, filled(I32, 16)))
                pairs.append(b.bitcast(pair, vector(I8, 64)))
            place = e.at(self.weights, i, LINE)
            e.store(b.shuffle_vector(*pairs, upper), place)
            e.store(b.shuffle_vector(*pairs, lower), e.b.add(place, self.lower))
            return sums

        sums = e.loop(b.ashr(self.vectors, I64(2)), [ZEROS], four)
        return b.fmul(b.fmul(e.reduce(sums[0], b.fadd), factor), F32(MIDDLE_VALUE_CODE))

    def emit(self, masked: bool) -> list[ir.Value]:
        """Emit the code with or without invisible tokens, a cap and a negative factor."""
        e, b = self.e, self.e.b
        first = e.broadcast(b.trunc(self.first, I32))
        last = e.broadcast(b.trunc(self.last, I32))
        lanes = constant(I32, range(LANES))
        minus_infinity = filled(F32, -math.inf)
        factor = self.factors

        def visible(i: ir.Value) -> ir.Value:
            token = b.add(lanes, e.broadcast(b.trunc(b.mul(i, I64(LANES)), I32)))
            not_before = b.icmp_signed(">=", token, first)
            return b.and_(not_before, b.icmp_signed("<", token, last))

        def cap(i: ir.Value, _: list[ir.Value]) -> None:
            x = b.fmul(self.load_scores(i), self.factors)
            e.store(_soft_capped(e, x, self.cap), e.at(self.scores, i, LINE))

        if masked:
            capped = b.fcmp_ordered(">", self.cap, F32(0.0))
            with b.if_then(capped):
                e.loop(self.vectors, [], cap)
            factor = b.select(capped, filled(F32, 1.0), self.factors)

        def larger(i: ir.Value, largest: list[ir.Value]) -> list[ir.Value]:
            self.prefetch(i, "keys", self.key_offset)
            x = self.load_scores(i)
            if masked:
                x = b.select(visible(i), b.fmul(x, factor), minus_infinity)
            return [e.larger(x, largest[0])]

        (largest,) = e.loop(self.vectors, [minus_infinity], larger)
        if not masked:
            largest = b.fmul(largest, factor)
        return [self.weigh(e.reduce(largest, e.larger), factor, visible if masked else None)]


@inline_llvm
def softmax_row(
    e: Emitter,
    weight_format: Int64,
    scores: Int64,
    weights: Int64,
    scales: Int64,
    zeros: Int64,
    state: Int64,
    vectors: Int64,
    first: Int64,
    last: Int64,
    factor: Float32,
    cap: Float32,
    lower: Int64,
    ahead: Int64,
    key_offset: Int64,
    value_offset: Int64,
) -> Float32:
    """Turn a chunk of a row's scores into weights, and update the row's state.

    With x = log2(e) * factor * score, or its soft-capped value, and m the largest x up to here:

        weight = 2^(x - m) * scale  if first <= token < last, else exactly 0

    Integer weights are relative to the chunk's largest, which becomes `TOP_WEIGHT`; the state's
    `limb_factor` is the value of 1. The contribution of the middle code to every dim is subtracted
    from the state's offset, because `zeros` are the values of the middle code.

    Args:
        e: Emits the code.
        weight_format: FLOATS, BFLOATS or LIMBS. The last four arguments are used with LIMBS only.
        scores: Address of `vectors` x 16 float32; overwritten.
        weights: Address for as many weights; with LIMBS, for the upper bytes.
        scales: Address of the tokens' value scales, float32.
        zeros: Address of their zeros.
        state: Address of the row's `ROW_STATE`.
        vectors: Number of vectors of 16 tokens; with LIMBS a multiple of 4.
        first: First token that the row sees.
        last: The token after the last one that it sees; above `first`.
        factor: log2(e) times the scale of the scores; without log2(e) under a soft cap.
        cap: The soft cap, 0 for none.
        lower: Bytes from a row of upper bytes to its lower bytes.
        ahead: Address of the next chunk's `TILE_ADDRESSES`, to prefetch two lines of each tile's
            keys and two of its values.
        key_offset, value_offset: Where in a tile these lines begin, in bytes.

    Returns:
        The factor for the row's earlier sums, its output included.
    """
    b = e.b
    every_token = b.icmp_signed("==", b.mul(vectors, I64(LANES)), last)
    every_token = b.and_(every_token, b.icmp_signed("<=", first, I64(0)))
    is_plain = b.and_(every_token, b.fcmp_ordered("<=", cap, F32(0.0)))
    is_plain = b.and_(is_plain, b.fcmp_ordered(">", factor, F32(0.0)))

    def emit(weight_format: int) -> list[ir.Value]:
        softmax = _Softmax(
            e, weight_format, scores, weights, scales, zeros, state, vectors, first, last,
            factor, cap, lower, ahead, key_offset, value_offset,
        )  # fmt: skip
        return e.choose((False, True), lambda masked: is_plain, softmax.emit)

    return e.choose_number(weight_format, (LIMBS, BFLOATS, FLOATS), emit)[0]
