# SPDX-License-Identifier: Apache-2.0
"""Key and value scales of four tokens at once, from the largest magnitudes of their rows.

The arithmetic of `reference.quantise`, for eight rows at once, because for one row alone the
reduction, the division and the rounding to fp16 take as long as a quarter of all its codes.
"""

from __future__ import annotations

import numba
from llvmlite import ir

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.cpu import memory
from vllm_hybrid_kv.kernels.cpu.inline import Float32, Int64, inline_llvm
from vllm_hybrid_kv.kernels.cpu.llvm import (
    F32,
    I16,
    I32,
    LANES,
    LINE,
    Emitter,
    constant,
    filled,
    vector,
)

TOKENS = 4
"""Tokens whose scales are computed at once."""

KEYS, VALUES = range(2)
"""Rows 0 to 3 are keys, rows 4 to 7 values."""

_ROWS = 2 * TOKENS

LARGEST_BYTES = _ROWS * LINE
"""Bytes of the largest magnitudes: sixteen numbers of each row."""

SCALE_BITS, INVERSES = 0, 2 * _ROWS
"""Offsets in the results: the fp16 bits of the scales, and the float32 factors of the codes."""

RESULT_BYTES = 6 * _ROWS


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


def _half_rounded_up(e: Emitter, x: ir.Value) -> ir.Value:
    """Return the bits of the smallest fp16 number that is not below x, for x from 0 to 65504."""
    b = e.b
    words = vector(I32, _ROWS)

    def word(number: int) -> ir.Constant:
        return filled(I32, number, _ROWS)

    # A normal number's bits are cut after adding all ones below the cut. A smaller one is counted
    # in steps of 2^-24, the last bit of a float32 near 1, which rounds to nearest.
    bits = b.bitcast(x, words)
    normal = b.lshr(b.sub(b.add(bits, word(0x1FFF)), word(0x38000000)), word(13))
    raised = b.fmul(x, filled(F32, 2.0**24, _ROWS))
    whole = b.fptosi(raised, words)
    below = b.fcmp_ordered("<", b.sitofp(whole, vector(F32, _ROWS)), raised)
    small = b.add(whole, b.zext(below, words))
    is_normal = b.icmp_signed(">=", bits, word(0x38800000))  # 2^-14
    return b.trunc(b.select(is_normal, normal, small), vector(I16, _ROWS))


@inline_llvm
def _write_eight(e: Emitter, largest: Int64, unit: Float32, results: Int64) -> None:
    b = e.b
    rows = [e.load_floats(e.at(largest, row * LINE)) for row in range(_ROWS)]
    factor = e.broadcast(unit, _ROWS)
    steps = TOKENS * [float(k8v4.KEY_STEPS)] + TOKENS * [k8v4.MIDDLE_VALUE_CODE]
    scale = b.fdiv(b.fmul(_largest_of_eight(e, rows), factor), constant(F32, steps))
    scale = e.smaller(scale, filled(F32, k8v4.SCALE_MAX, _ROWS))
    bits = _half_rounded_up(e, scale)
    inverse = b.fmul(b.fdiv(filled(F32, 1.0, _ROWS), e.halves_to_floats(bits)), factor)
    is_step = b.icmp_signed(">", bits, filled(I16, 0, _ROWS))
    e.store(bits, e.at(results, SCALE_BITS))
    e.store(b.select(is_step, inverse, filled(F32, 0.0, _ROWS)), e.at(results, INVERSES))


@numba.njit
def write_scales(largest, unit, nan_tokens, results):  # type: ignore[no-untyped-def]
    """Write the scales of four tokens, and the factors of their codes.

    Args:
        largest: Address of `LARGEST_BYTES`, of rows not yet multiplied by `unit`.
        unit: `k8v4.rotation_unit`. The factors are for rows before that multiplication.
        nan_tokens: Bit t is set if token t holds a NaN; its rows are zeros. It gets NaN scales.
        results: Address of `RESULT_BYTES`.
    """
    _write_eight(largest, unit, results)
    if nan_tokens:
        for token in range(TOKENS):
            if nan_tokens >> token & 1:
                for row in (token, TOKENS + token):
                    memory.store_int16(results + SCALE_BITS + 2 * row, k8v4.NAN_SCALE_BITS)


def inverse_of(e: Emitter, results: ir.Value, kind: int, token: int | ir.Value) -> ir.Value:
    """Return the factor of the codes of a token's keys or values, in every lane."""
    at = e.at(results, INVERSES + 4 * TOKENS * kind)
    return e.broadcast(e.load(F32, e.at(at, token, 4)))
