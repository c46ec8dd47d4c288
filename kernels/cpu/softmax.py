# SPDX-License-Identifier: Apache-2.0
"""The online softmax of a row of scores, shared by all instruction sets."""

from __future__ import annotations

import math

from llvmlite import ir

from vllm_hybrid_kv.kernels.cpu import records
from vllm_hybrid_kv.kernels.cpu.inline import Float32, Int64, inline_llvm
from vllm_hybrid_kv.kernels.cpu.llvm import (
    F32,
    I8,
    I16,
    I32,
    I64,
    LANES,
    LINE,
    ROUNDING,
    ZEROS,
    Emitter,
    constant,
    filled,
    vector,
)
from vllm_hybrid_kv.kernels.cpu.records import SCORE_STRIDE, STATE_FIELDS
from vllm_hybrid_kv.kernels.k8v4 import MIDDLE_VALUE_CODE, QUAD_BYTE_OF_TOKEN

LOG2_E = math.log2(math.e)

_LEAST_TOP = 1e-30
"""If a chunk's largest weight is at most this, its weights become 0: dividing could overflow."""

WORDS, LIMBS = 1, 4
"""Formats of integer weights: 16-bit words, or upper and lower bytes in separate rows. The number
says how many vectors of 16 weights are written at once."""

_TOP_WEIGHT = {WORDS: 32766.0, LIMBS: 65534.0}
"""The integer for a chunk's largest weight: one below the maximum of the format, so that rounding
cannot exceed the maximum."""

_LARGEST, _TOTAL, _OFFSET, _WEIGHT_STEP, _QUERY_STEP, _RAISED_BY = (
    4 * i for i in range(len(STATE_FIELDS))
)


def _soft_capped(e: Emitter, x: ir.Value, cap: ir.Value) -> ir.Value:
    """With c = log2(e) cap, return `c tanh(x / cap)` as `c - 2 c / (1 + 2^(2 log2(e) x / cap))`."""
    b = e.b
    power = b.fmul(x, e.broadcast(b.fdiv(F32(2.0 * LOG2_E), cap)))
    grown = b.fadd(e.exp2(e.smaller(filled(F32, 126.0), power)), filled(F32, 1.0))
    wide = e.broadcast(b.fmul(cap, F32(LOG2_E)))
    return b.fsub(wide, b.fdiv(b.fadd(wide, wide), grown))


# Two vectors hold 64 weights of 16 bits: tokens 0-15 in the low halves of the first vector's 32-bit
# lanes, tokens 16-31 in the high halves, and tokens 32-63 in the second vector. `_LOWER_BYTES` are
# the positions of the weights' lower bytes, in the order of the tokens' values in a page.
_TOKENS = [byte // 4 * 4 + QUAD_BYTE_OF_TOKEN.index(byte % 4) for byte in range(64)]
_LOWER_BYTES = [64 * (t // 32) + 4 * (t % LANES) + 2 * (t // LANES % 2) for t in _TOKENS]


def _write_integers(
    e: Emitter,
    weight_format: int,
    scores: ir.Value,
    weights: ir.Value,
    lower: ir.Value,
    state: ir.Value,
    vectors: ir.Value,
    top: ir.Value,
) -> ir.Value:
    """Round weights to integers. Returns -7.5 times the rounded weights' sum, for `offset`.

    A weight becomes round(weight / top * _TOP_WEIGHT). With LIMBS its upper byte goes into one row
    and its lower byte into another. A quad's tokens get the order that their values have in a page.
    """
    b = e.b
    top_weight = F32(_TOP_WEIGHT[weight_format])
    counts = b.fcmp_ordered(">", top, F32(_LEAST_TOP))
    step = b.select(counts, b.fdiv(top, top_weight), F32(0.0))
    e.store(step, e.at(state, _WEIGHT_STEP))
    inverse = e.broadcast(b.select(counts, b.fdiv(top_weight, top), F32(0.0)))

    def some(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        words = []
        for v in range(weight_format):
            x = e.load_floats(e.at(e.at(scores, i, weight_format * LINE), LINE * v))
            raised = b.fadd(b.fmul(x, inverse), filled(F32, ROUNDING))
            sums = [b.fadd(sums[0], b.fsub(raised, filled(F32, ROUNDING)))]
            words.append(b.bitcast(raised, vector(I32)))
        if weight_format == WORDS:
            e.store(b.trunc(words[0], vector(I16)), e.at(weights, i, LINE // 2))
            return sums
        first, second = (
            b.bitcast(
                b.or_(b.and_(low, filled(I32, 0xFFFF)), b.shl(high, filled(I32, 16))),
                vector(I8, 64),
            )
            for low, high in (words[:2], words[2:])
        )
        place = e.at(weights, i, LINE)
        e.store(e.shuffle(first, second, [byte + 1 for byte in _LOWER_BYTES]), place)
        e.store(e.shuffle(first, second, _LOWER_BYTES), e.b.add(place, lower))
        return sums

    (sums,) = e.loop(e.shift_right(vectors, weight_format // 2), [ZEROS], some)
    return b.fmul(b.fmul(e.reduce(sums, b.fadd), step), F32(-MIDDLE_VALUE_CODE))


@inline_llvm
def softmax_row(
    e: Emitter,
    weight_format: int,
    scratch: Int64,
    row: Int64,
    state: Int64,
    vectors: Int64,
    first: Int64,
    last: Int64,
    factor: Float32,
    cap: Float32,
    lower: Int64,
) -> Float32:
    """Turn a chunk of a row's integer scores into weights, and update the row's state.

        score = (product - raised_by) * key scale * query_step
        x = factor * score, or with a cap log2(e) * cap * tanh(factor * score / cap)
        m = the row's largest x up to here
        weight = 2^(x - m) * value scale  if first <= token < last, else exactly 0

    Weights are rounded to multiples of `weight_step`, which follows from the chunk's largest.
    A value code stands for code - 7.5, so -7.5 times the weights' sum is added to `offset`.

    If m has grown, earlier weights are too large. Returns the factor that corrects the output.

    Args:
        e: Emits the code.
        weight_format: WORDS or LIMBS.
        scratch, row: Scratch memory, and the number of the row. Its int32 products of codes are
            overwritten.
        state: Address of the row's `ROW_STATE`.
        vectors: Number of vectors of 16 tokens, a multiple of `weight_format`.
        first, last: First token that the row sees, and the token after its last one.
        factor: log2(e) times the scale of the scores; without log2(e) under a soft cap.
        cap: The soft cap, 0 for none.
        lower: Bytes from a row of upper bytes to its lower bytes, with LIMBS.
    """
    b = e.b
    scores, weights = (
        e.at(e.at(scratch, part), row, SCORE_STRIDE)
        for part in (records.SCORES_AT, records.WEIGHTS_AT)
    )
    every_token = b.icmp_signed("==", b.mul(vectors, I64(LANES)), last)
    every_token = b.and_(every_token, b.icmp_signed("<=", first, I64(0)))
    is_plain = b.and_(every_token, b.fcmp_ordered("<=", cap, F32(0.0)))
    is_plain = b.and_(is_plain, b.fcmp_ordered(">", factor, F32(0.0)))
    step = b.fmul(factor, e.load(F32, e.at(state, _QUERY_STEP)))
    raised_by = e.broadcast(e.load(F32, e.at(state, _RAISED_BY)))

    def emit(masked: bool) -> list[ir.Value]:
        """Emit code for any row if `masked`, otherwise faster code that requires `is_plain`."""
        bounds = [e.broadcast(b.trunc(bound, I32)) for bound in (first, last)]

        def visible(i: ir.Value) -> ir.Value:
            token = e.broadcast(b.trunc(b.mul(i, I64(LANES)), I32))
            token = b.add(constant(I32, range(LANES)), token)
            not_before = b.icmp_signed(">=", token, bounds[0])
            return b.and_(not_before, b.icmp_signed("<", token, bounds[1]))

        def scale_scores(capped: bool) -> list[ir.Value]:
            """Turn products into scores. Returns lane maxima, and factors that `weigh` applies."""
            factors = filled(F32, 1.0) if capped else e.broadcast(step)

            def larger(i: ir.Value, largest: list[ir.Value]) -> list[ir.Value]:
                place = e.at(scores, i, LINE)
                product = b.fsub(b.sitofp(e.load(vector(I32), place), vector(F32)), raised_by)
                scales = e.at(scratch, records.KEY_SCALES_AT)
                x = b.fmul(product, e.load_floats(e.at(scales, i, LINE)))
                if capped:
                    x = _soft_capped(e, b.fmul(x, e.broadcast(step)), cap)
                e.store(x, place)
                if masked:
                    x = b.select(visible(i), b.fmul(x, factors), filled(F32, -math.inf))
                return [e.larger(x, largest[0])]

            return [*e.loop(vectors, [filled(F32, -math.inf)], larger), factors]

        cases = (True, False) if masked else (False,)
        is_capped = b.fcmp_ordered(">", cap, F32(0.0))
        tops, factors = e.choose(cases, lambda _: is_capped, scale_scores)
        before = e.load(F32, e.at(state, _LARGEST))
        largest = e.larger(e.reduce(tops if masked else b.fmul(tops, factors), e.larger), before)
        shift = e.broadcast(largest)
        decay = b.extract_element(e.exp2(b.fsub(e.broadcast(before), shift)), I32(0))

        def weigh(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            place = e.at(scores, i, LINE)
            # One fma in both variants, so that they round alike: other rows can decide which runs.
            weight = e.exp2(e.fma(e.load_floats(place), factors, b.fneg(shift)))
            scales = e.at(scratch, records.VALUE_SCALES_AT)
            scaled = b.fmul(weight, e.load_floats(e.at(scales, i, LINE)))
            if masked:
                # Select, do not multiply by 0: the scale of a missing token may be NaN.
                mask = visible(i)
                weight, scaled = (b.select(mask, x, ZEROS) for x in (weight, scaled))
            e.store(scaled, place)
            # The maximum hides a NaN, so also sum 0 * weight: NaN if a weight is NaN or infinite.
            not_finite = e.fma(scaled, ZEROS, sums[1])
            return [b.fadd(sums[0], weight), not_finite, e.larger(scaled, sums[2])]

        total, not_finite, top = e.loop(vectors, [ZEROS] * 3, weigh)
        offset = _write_integers(
            e, weight_format, scores, weights, lower, state, vectors, e.reduce(top, e.larger)
        )
        offset = b.fadd(offset, e.reduce(not_finite, b.fadd))
        e.store(largest, e.at(state, _LARGEST))
        for field, added in ((_TOTAL, e.reduce(total, b.fadd)), (_OFFSET, offset)):
            address = e.at(state, field)
            e.store(b.fadd(b.fmul(e.load(F32, address), decay), added), address)
        return [decay]

    return e.choose((False, True), lambda masked: is_plain, emit)[0]
