# SPDX-License-Identifier: Apache-2.0
"""The online softmax of a row of scores, shared by all instruction sets."""

from __future__ import annotations

import math

from llvmlite import ir

from vllm_hybrid_kv.kernels.cpu import records
from vllm_hybrid_kv.kernels.cpu.inline import Float32, Int64, inline_llvm
from vllm_hybrid_kv.kernels.cpu.llvm import (
    BF16,
    F32,
    I8,
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
from vllm_hybrid_kv.kernels.cpu.records import SCORE_STRIDE, STATE_FIELDS, TILE_RECORD
from vllm_hybrid_kv.kernels.k8v4 import MIDDLE_VALUE_CODE, QUAD_BYTE_OF_TOKEN

LOG2_E = math.log2(math.e)

TOP_WEIGHT = 65534.0
"""The integer for a chunk's largest weight: one less than the largest of two bytes, so that
rounding cannot exceed it."""

_LEAST_TOP = 1e-30
"""A chunk of smaller weights counts as zero, because their inverse would overflow."""

FLOATS, BFLOATS, LIMBS = 1, 2, 4
"""Formats of weights: float32, bf16, or integers of two bytes. The number is how many vectors of
16 weights fill a cache line; products take so many at once."""

_LARGEST, _TOTAL, _OFFSET, _LIMB_FACTOR = (4 * i for i in range(len(STATE_FIELDS)))


def _soft_capped(e: Emitter, x: ir.Value, cap: ir.Value) -> ir.Value:
    """Return `log2(e) cap tanh(x / cap)` as `c - 2 c / (1 + 2^(2 log2(e) x / cap))`."""
    b = e.b
    power = b.fmul(x, e.broadcast(b.fdiv(F32(2.0 * LOG2_E), cap)))
    grown = b.fadd(e.exp2(e.smaller(filled(F32, 126.0), power)), filled(F32, 1.0))
    wide = e.broadcast(b.fmul(cap, F32(LOG2_E)))
    return b.fsub(wide, b.fdiv(b.fadd(wide, wide), grown))


# The lower bytes of 64 tokens' weights, in the order of their values. Vectors 0 and 1 of sixteen
# tokens are the halves of the 32-bit lanes of one vector, vectors 2 and 3 those of a second one.
_TOKENS = [byte // 4 * 4 + QUAD_BYTE_OF_TOKEN.index(byte % 4) for byte in range(64)]
_LOWER_BYTES = [64 * (t // 32) + 4 * (t % LANES) + 2 * (t // LANES % 2) for t in _TOKENS]


def _write_limbs(
    e: Emitter,
    scores: ir.Value,
    weights: ir.Value,
    lower: ir.Value,
    state: ir.Value,
    vectors: ir.Value,
    top: ir.Value,
) -> ir.Value:
    """Write weights as integers, and return their sum times the middle code.

    A weight becomes round(weight / top * TOP_WEIGHT). Its upper byte goes into one row and its
    lower byte into another, four tokens of a quad in the order of their values in a page.
    """
    b = e.b
    counts = b.fcmp_ordered(">", top, F32(_LEAST_TOP))
    factor = b.select(counts, b.fdiv(top, F32(TOP_WEIGHT)), F32(0.0))
    e.store(factor, e.at(state, _LIMB_FACTOR))
    inverse = e.broadcast(b.select(counts, b.fdiv(F32(TOP_WEIGHT), top), F32(0.0)))

    def four(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        words = []
        for v in range(4):
            x = e.load_floats(e.at(e.at(scores, i, 4 * LINE), LINE * v))
            raised = b.fadd(b.fmul(x, inverse), filled(F32, ROUNDING))
            sums = [b.fadd(sums[0], b.fsub(raised, filled(F32, ROUNDING)))]
            words.append(b.bitcast(raised, vector(I32)))
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

    sums = e.loop(e.shift_right(vectors, 2), [ZEROS], four)
    return b.fmul(b.fmul(e.reduce(sums[0], b.fadd), factor), F32(MIDDLE_VALUE_CODE))


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
    ahead: Int64,
    key_offset: Int64,
    value_offset: Int64,
) -> Float32:
    """Turn a chunk of a row's scores into weights, and update the row's state.

    With x = log2(e) * factor * score, or its soft-capped value, and m the largest x up to here:

        weight = 2^(x - m) * scale  if first <= token < last, else exactly 0

    Integer weights are relative to the chunk's largest, which becomes `TOP_WEIGHT`; the state's
    `limb_factor` is the value of 1. The contribution of the middle code to every dim is subtracted
    from the state's offset, because the zeros in scratch memory are the values of the middle code.

    Returns the factor for the row's earlier sums, its output included.

    Args:
        e: Emits the code.
        weight_format: FLOATS, BFLOATS or LIMBS. The last four arguments are for LIMBS only.
        scratch, row: Scratch memory and the row in it. The scores are overwritten.
        state: Address of the row's `ROW_STATE`.
        vectors: Number of vectors of 16 tokens, a multiple of `weight_format`.
        first, last: First token that the row sees, and the token after its last one.
        factor: log2(e) times the scale of the scores; without log2(e) under a soft cap.
        cap: The soft cap, 0 for none.
        lower: Bytes from a row of upper bytes to its lower bytes.
        ahead: Address of the next chunk's `TILE_ADDRESSES`. Two lines of each tile's keys from
            `key_offset` bytes on are prefetched, and two of its values from `value_offset` on.
    """
    b = e.b
    limbs = weight_format == LIMBS
    scores, weights = (
        e.at(e.at(scratch, part), row, SCORE_STRIDE)
        for part in (records.SCORES_AT, records.WEIGHTS_AT)
    )
    every_token = b.icmp_signed("==", b.mul(vectors, I64(LANES)), last)
    every_token = b.and_(every_token, b.icmp_signed("<=", first, I64(0)))
    is_plain = b.and_(every_token, b.fcmp_ordered("<=", cap, F32(0.0)))
    is_plain = b.and_(is_plain, b.fcmp_ordered(">", factor, F32(0.0)))

    def prefetch(i: ir.Value, field: int, offset: ir.Value) -> None:
        """Prefetch two lines of the keys (field 0) or values (1) of a tile of the next chunk."""
        if limbs:
            tile = e.load(I64, e.at(e.at(ahead, i, TILE_RECORD), 8 * field))
            for line in range(2):
                e.prefetch(e.at(e.b.add(tile, offset), LINE * line))

    def emit(masked: bool) -> list[ir.Value]:
        """Emit the code with or without invisible tokens, a cap and a negative factor."""
        bounds = [e.broadcast(b.trunc(bound, I32)) for bound in (first, last)]
        factors = e.broadcast(factor)

        def load_scores(i: ir.Value) -> ir.Value:
            return e.load_floats(e.at(scores, i, LINE))

        def visible(i: ir.Value) -> ir.Value:
            token = e.broadcast(b.trunc(b.mul(i, I64(LANES)), I32))
            token = b.add(constant(I32, range(LANES)), token)
            not_before = b.icmp_signed(">=", token, bounds[0])
            return b.and_(not_before, b.icmp_signed("<", token, bounds[1]))

        if masked:
            capped = b.fcmp_ordered(">", cap, F32(0.0))
            with b.if_then(capped), e.each(vectors) as i:
                x = _soft_capped(e, b.fmul(load_scores(i), factors), cap)
                e.store(x, e.at(scores, i, LINE))
            factors = b.select(capped, filled(F32, 1.0), factors)

        def larger(i: ir.Value, largest: list[ir.Value]) -> list[ir.Value]:
            prefetch(i, 0, key_offset)
            x = load_scores(i)
            if masked:
                x = b.select(visible(i), b.fmul(x, factors), filled(F32, -math.inf))
            return [e.larger(x, largest[0])]

        (tops,) = e.loop(vectors, [filled(F32, -math.inf)], larger)
        before = e.load(F32, e.at(state, _LARGEST))
        largest = e.larger(e.reduce(tops if masked else b.fmul(tops, factors), e.larger), before)
        shift = e.broadcast(largest)
        decay = b.extract_element(e.exp2(b.fsub(e.broadcast(before), shift)), I32(0))

        def weigh(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            prefetch(i, 1, value_offset)
            # One rounding, with or without a mask: other rows of the batch decide about the mask.
            weight = e.exp2(e.fma(load_scores(i), factors, b.fneg(shift)))
            zero = e.load_floats(e.at(e.at(scratch, records.ZEROS_AT), i, LINE))
            scale = e.load_floats(e.at(e.at(scratch, records.SCALES_AT), i, LINE))
            scaled = b.fmul(weight, scale)
            if masked:
                # Selected, not multiplied: the scale of a missing token may be NaN.
                mask = visible(i)
                weight, scaled, zero = (b.select(mask, x, ZEROS) for x in (weight, scaled, zero))
            if weight_format == BFLOATS:
                e.store(b.fptrunc(scaled, vector(BF16)), e.at(weights, i, 32))
            else:
                e.store(scaled, e.at(scores if limbs else weights, i, LINE))
            top = [e.larger(scaled, sums[2])] if limbs else []
            return [b.fadd(sums[0], weight), e.fma(weight, zero, sums[1]), *top]

        total, offset, *top = e.loop(vectors, [ZEROS] * (3 if limbs else 2), weigh)
        added_offset = e.reduce(offset, b.fadd)
        if limbs:
            top_weight = e.reduce(top[0], e.larger)
            of_middle = _write_limbs(e, scores, weights, lower, state, vectors, top_weight)
            added_offset = b.fsub(added_offset, of_middle)
        e.store(largest, e.at(state, _LARGEST))
        for field, added in ((_TOTAL, e.reduce(total, b.fadd)), (_OFFSET, added_offset)):
            address = e.at(state, field)
            e.store(b.fadd(b.fmul(e.load(F32, address), decay), added), address)
        return [decay]

    return e.choose((False, True), lambda masked: is_plain, emit)[0]
