# SPDX-License-Identifier: Apache-2.0
"""Scales and zeros of four tokens at once, from the extremes of their rows.

The arithmetic of `reference.quantise`, for four tokens at once, because for one token alone the
reductions, the divisions and the rounding to fp16 take as long as a quarter of all its codes.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.cpu import memory
from vllm_hybrid_kv.kernels.cpu.inline import Float32, Int64, inline_llvm
from vllm_hybrid_kv.kernels.cpu.llvm import F32, I16, I32, LANES, LINE, Emitter, filled, vector

TOKENS = 4
"""Tokens whose scales are computed at once."""

EXTREMES_BYTES = 2 * LINE
"""Bytes of the extremes of one token: sixteen smallest numbers, then sixteen largest."""

SCALE_BITS, ZERO_BITS, ZEROS, INVERSES = 0, 8, 16, 32
"""Offsets in the results: fp16 bits of the scales and of the zeros, the zeros as float32, and the
factors of the codes."""

RESULT_BYTES = 48

_4_FLOATS, _4_WORDS = vector(F32, TOKENS), vector(I32, TOKENS)


def _larger_halves(e: Emitter, x: ir.Value, y: ir.Value, segment: int) -> ir.Value:
    """Return the maxima of the two halves of each segment of lanes, of `x` and then of `y`."""
    half = segment // 2
    first = [start + i for start in range(0, 2 * LANES, segment) for i in range(half)]
    return e.larger(e.shuffle(x, y, first), e.shuffle(x, y, [lane + half for lane in first]))


def _largest_of_eight(e: Emitter, eight: list[ir.Value]) -> ir.Value:
    """Return the maximum of each of eight vectors, as one vector of eight."""
    segment = LANES
    while len(eight) > 1:
        pairs = zip(eight[::2], eight[1::2], strict=True)
        eight = [_larger_halves(e, x, y, segment) for x, y in pairs]
        segment //= 2
    (last,) = eight
    even, odd = (e.shuffle(last, last, range(i, LANES, 2)) for i in range(2))
    return e.larger(even, odd)


def _word(number: int) -> ir.Constant:
    return filled(I32, number, TOKENS)


def _number(number: float) -> ir.Constant:
    return filled(F32, number, TOKENS)


def _truncated_half(e: Emitter, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return the fp16 bits of |x| rounded towards 0, and 1 if that changed it, as int32."""
    b = e.b
    bits = b.and_(b.bitcast(x, _4_WORDS), _word(0x7FFFFFFF))
    normal = b.lshr(b.sub(bits, _word(0x38000000)), _word(13))
    cut = b.icmp_signed("!=", b.and_(bits, _word(0x1FFF)), _word(0))
    steps = b.fmul(b.bitcast(bits, _4_FLOATS), _number(2.0**24))
    whole = b.fptosi(steps, _4_WORDS)
    cut_steps = b.fcmp_ordered("!=", b.sitofp(whole, _4_FLOATS), steps)
    is_normal = b.icmp_signed(">=", bits, _word(0x38800000))  # 2^-14
    inexact = b.select(is_normal, cut, cut_steps)
    return b.select(is_normal, normal, whole), b.zext(inexact, _4_WORDS)


def _half_rounded_down(e: Emitter, x: ir.Value) -> ir.Value:
    """Return the largest fp16 number that is not above x, as int16; +0 for both zeros."""
    b = e.b
    magnitude, inexact = _truncated_half(e, x)
    negative = b.or_(b.add(magnitude, inexact), _word(0x8000))
    bits = b.select(b.fcmp_ordered("<", x, _number(0.0)), negative, magnitude)
    return b.trunc(bits, vector(I16, TOKENS))


def _half_rounded_up(e: Emitter, x: ir.Value) -> ir.Value:
    """Return the smallest fp16 number that is not below x, as int16, for x not negative."""
    return e.b.trunc(e.b.add(*_truncated_half(e, x)), vector(I16, TOKENS))


@inline_llvm
def _write_four(e: Emitter, extremes: Int64, unit: Float32, results: Int64) -> None:
    b = e.b

    def load(token: int, part: int) -> ir.Value:
        return e.load_floats(e.at(extremes, token * EXTREMES_BYTES + part * LINE))

    smallest = [b.fneg(load(token, 0)) for token in range(TOKENS)]
    largest = [load(token, 1) for token in range(TOKENS)]
    eight = _largest_of_eight(e, smallest + largest)
    factor = e.broadcast(unit, TOKENS)
    lo = b.fmul(b.fneg(e.shuffle(eight, eight, range(TOKENS))), factor)
    hi = b.fmul(e.shuffle(eight, eight, range(TOKENS, 2 * TOKENS)), factor)

    zero_bits = _half_rounded_down(e, lo)
    zero = e.halves_to_floats(zero_bits)
    last_code = _number(float(k8v4.VALUE_LEVELS - 1))
    scale_bits = _half_rounded_up(e, b.fdiv(b.fsub(hi, zero), last_code))
    inverse = b.fdiv(_number(1.0), e.halves_to_floats(scale_bits))
    is_step = b.icmp_signed(">", scale_bits, filled(I16, 0, TOKENS))
    inverse = b.select(is_step, b.fmul(inverse, factor), _number(0.0))

    e.store(scale_bits, e.at(results, SCALE_BITS))
    e.store(zero_bits, e.at(results, ZERO_BITS))
    e.store(b.fdiv(zero, factor), e.at(results, ZEROS))
    e.store(inverse, e.at(results, INVERSES))


@numba.njit
def write_scales(extremes, unit, nan_tokens, results):  # type: ignore[no-untyped-def]
    """Write the scales and zeros of four tokens, and the numbers that their codes need.

    Args:
        extremes: Address of four times `EXTREMES_BYTES`, of finite rows not yet multiplied by
            `unit`, a power of two.
        unit: See `rotation.unit`. The float32 zeros and factors are for rows before the
            multiplication: a power of two changes no rounding.
        nan_tokens: Bit t is set if token t holds a NaN. It gets a NaN scale and codes of 0.
        results: Address of `RESULT_BYTES`.
    """
    _write_four(extremes, unit, results)
    if nan_tokens:
        for token in range(TOKENS):
            if nan_tokens >> token & 1:
                memory.store_int16(results + SCALE_BITS + 2 * token, k8v4.NAN_SCALE_BITS)
                memory.store_int16(results + ZERO_BITS + 2 * token, 0)
                memory.store_float32(results + ZEROS + 4 * token, np.float32(0.0))
                memory.store_float32(results + INVERSES + 4 * token, np.float32(0.0))
