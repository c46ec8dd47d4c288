# SPDX-License-Identifier: Apache-2.0
"""Scales and zeros of four tokens at once, from the extremes of their rows, in numba code.

The arithmetic of `reference.quantise`, four tokens side by side, because for one token alone the
reductions, the divisions and the rounding to fp16 take as long as a quarter of all its codes.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.cpu import lanes
from vllm_hybrid_kv.kernels.cpu.lanes import (
    F32,
    I16,
    I32,
    LANES,
    broadcast,
    load_vector,
    more,
    splat,
    vector,
)
from vllm_hybrid_kv.kernels.cpu.memory import write_float

TOKENS = 4
"""Tokens whose scales are made at once."""

EXTREMES_BYTES = 2 * 4 * LANES
"""Bytes of the extremes of one token: sixteen smallest numbers, then sixteen largest."""

SCALES, ZEROS, ZERO_NUMBERS, INVERSES = 0, 8, 16, 32
"""Where in the results stand the fp16 bits of the scales and of the zeros, the float32 zeros, and
the factors of the codes."""

RESULT_BYTES = 48


def _smaller_segments(b: ir.IRBuilder, x: ir.Value, y: ir.Value, segment: int) -> ir.Value:
    """Emit the maxima of the two halves of each segment of lanes, of `x` and then of `y`."""
    half = segment // 2
    first = [start + i for start in range(0, 2 * LANES, segment) for i in range(half)]
    low = b.shuffle_vector(x, y, ir.Constant(vector(I32), first))
    high = b.shuffle_vector(x, y, ir.Constant(vector(I32), [lane + half for lane in first]))
    return more(b, low, high)


def _largest_of_eight(b: ir.IRBuilder, eight: list[ir.Value]) -> ir.Value:
    """Emit the maximum of each of eight vectors, as one vector of eight."""
    segment = LANES
    while len(eight) > 1:
        pairs = zip(eight[::2], eight[1::2], strict=True)
        eight = [_smaller_segments(b, x, y, segment) for x, y in pairs]
        segment //= 2
    even, odd = (ir.Constant(vector(I32, 8), [*range(i, LANES, 2)]) for i in range(2))
    only = eight[0]
    return more(b, b.shuffle_vector(only, only, even), b.shuffle_vector(only, only, odd))


class _Halves:
    """fp16 numbers as bits in the lanes of int32, rounded in the direction that is asked for."""

    def __init__(self, b: ir.IRBuilder) -> None:
        self.b = b

    def word(self, number: int) -> ir.Constant:
        return splat(I32, number, TOKENS)

    def number(self, number: float) -> ir.Constant:
        return splat(F32, number, TOKENS)

    def _cut(self, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Emit |x| rounded towards 0, and 1 where that changed it, else 0."""
        b = self.b
        bits = b.and_(b.bitcast(x, vector(I32, TOKENS)), self.word(0x7FFFFFFF))
        normal = b.lshr(b.sub(bits, self.word(0x38000000)), self.word(13))
        cut = b.icmp_signed("!=", b.and_(bits, self.word(0x1FFF)), self.word(0))
        steps = b.fmul(b.bitcast(bits, vector(F32, TOKENS)), self.number(2.0**24))
        whole = b.fptosi(steps, vector(I32, TOKENS))
        cut_steps = b.fcmp_ordered("!=", b.sitofp(whole, vector(F32, TOKENS)), steps)
        is_normal = b.icmp_signed(">=", bits, self.word(0x38800000))  # 2^-14
        inexact = b.select(is_normal, cut, cut_steps)
        return b.select(is_normal, normal, whole), b.zext(inexact, vector(I32, TOKENS))

    def rounded_down(self, x: ir.Value) -> ir.Value:
        """Emit the largest fp16 number that is not above x; +0 for both zeros."""
        b = self.b
        magnitude, inexact = self._cut(x)
        negative = b.or_(b.add(magnitude, inexact), self.word(0x8000))
        return b.select(b.fcmp_ordered("<", x, self.number(0.0)), negative, magnitude)

    def rounded_up(self, x: ir.Value) -> ir.Value:
        """Emit the smallest fp16 number that is not below x, for x not negative."""
        return self.b.add(*self._cut(x))

    def widened(self, bits: ir.Value) -> ir.Value:
        """Emit finite fp16 numbers as float32."""
        b = self.b
        magnitude = b.and_(bits, self.word(0x7FFF))
        normal = b.add(b.shl(magnitude, self.word(13)), self.word(0x38000000))
        small = b.fmul(b.sitofp(magnitude, vector(F32, TOKENS)), self.number(2.0**-24))
        is_normal = b.icmp_signed(">=", magnitude, self.word(0x400))
        x = b.select(is_normal, b.bitcast(normal, vector(F32, TOKENS)), small)
        negative = b.icmp_signed("!=", b.and_(bits, self.word(0x8000)), self.word(0))
        return b.select(negative, b.fneg(x), x)


@intrinsic
def _of_four(typing_context: Any, extremes: Any, unit: Any, results: Any) -> Any:
    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        extremes, unit, results = args
        i64 = ir.IntType(64)

        def extreme(token: int, which: int) -> ir.Value:
            at = b.add(extremes, i64(token * EXTREMES_BYTES + which * 4 * LANES))
            return b.bitcast(load_vector(b, I32, LANES, at), vector(F32))

        def four(x: ir.Value, first: int) -> ir.Value:
            order = [first + token for token in range(TOKENS)]
            return b.shuffle_vector(x, x, ir.Constant(vector(I32, TOKENS), order))

        def write(at: int, x: ir.Value) -> None:
            b.store(x, b.inttoptr(b.add(results, i64(at)), x.type.as_pointer()), align=8)

        smallest = [b.fneg(extreme(token, 0)) for token in range(TOKENS)]
        largest = [extreme(token, 1) for token in range(TOKENS)]
        eight = _largest_of_eight(b, smallest + largest)
        factor = broadcast(b, unit, TOKENS)
        lo, hi = b.fmul(b.fneg(four(eight, 0)), factor), b.fmul(four(eight, TOKENS), factor)

        halves = _Halves(b)
        zero = halves.rounded_down(lo)
        number = halves.widened(zero)
        last_code = halves.number(float(k8v4.VALUE_LEVELS - 1))
        scale = halves.rounded_up(b.fdiv(b.fsub(hi, number), last_code))
        inverse = b.fdiv(halves.number(1.0), halves.widened(scale))
        is_step = b.icmp_signed(">", scale, halves.word(0))
        inverse = b.select(is_step, b.fmul(inverse, factor), halves.number(0.0))

        write(SCALES, b.trunc(scale, vector(I16, TOKENS)))
        write(ZEROS, b.trunc(zero, vector(I16, TOKENS)))
        write(ZERO_NUMBERS, b.fdiv(number, factor))
        write(INVERSES, inverse)
        return context.get_dummy_value()

    return types.void(types.intp, types.float32, types.intp), emit


@numba.njit
def write_scales(extremes, unit, nan_tokens, results):  # type: ignore[no-untyped-def]
    """Write what the codes of four tokens need, and what is stored beside them.

    Args:
        extremes: Address of four times `EXTREMES_BYTES`, of finite rows that are still to be
            multiplied by `unit`, a power of two.
        unit: See `rotation.unit`. The zeros and factors written are for rows before that: a
            power of two changes no rounding.
        nan_tokens: Bit t is set where token t holds a NaN: it has that scale, and codes of 0.
        results: Address of `RESULT_BYTES`.
    """
    _of_four(extremes, unit, results)
    if nan_tokens:
        for token in range(TOKENS):
            if nan_tokens >> token & 1:
                lanes.store_half(results + SCALES + 2 * token, k8v4.NAN_SCALE_BITS)
                lanes.store_half(results + ZEROS + 2 * token, 0)
                write_float(results + ZERO_NUMBERS + 4 * token, np.float32(0.0))
                write_float(results + INVERSES + 4 * token, np.float32(0.0))
