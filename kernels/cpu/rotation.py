# SPDX-License-Identifier: Apache-2.0
"""`reference.rotate` on a row of float32 in memory, sixteen numbers at a time.

The same additions in the same order, so that the bits are the same. The caller does the last step,
the division by a power of two; see `unit`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numba
import numpy as np
from llvmlite import ir

from vllm_hybrid_kv.kernels.cpu.inline import Int64, inline_llvm
from vllm_hybrid_kv.kernels.cpu.llvm import F32, LANES, LINE, Emitter, filled


@numba.njit
def unit(head_size):  # type: ignore[no-untyped-def]
    """Return the remaining factor of a rotated row: 1/2 for each stage."""
    factor, run = np.float32(1.0), 4
    while head_size % run == 0:
        factor *= np.float32(0.5)
        run *= 4
    return factor


def _less_twice(e: Emitter, total: ir.Value, x: ir.Value) -> ir.Value:
    """Return `total - 2 x`: doubling is exact, so that one rounding gives the bits of two."""
    return e.fma(x, filled(F32, -2.0), total)


def _stage(e: Emitter, x: ir.Value, stride: int) -> ir.Value:
    """Return the stage of a stride among sixteen numbers: the sum of four minus twice each."""

    def partner(of: ir.Value, distance: int) -> ir.Value:
        return e.shuffle(of, of, [lane ^ distance for lane in range(LANES)])

    pair = e.b.fadd(x, partner(x, stride))
    return _less_twice(e, e.b.fadd(pair, partner(pair, 2 * stride)), x)


def _stage_among(e: Emitter, four: Sequence[ir.Value]) -> list[ir.Value]:
    """Return the stage among four vectors."""
    w, x, y, z = four
    total = e.b.fadd(e.b.fadd(w, x), e.b.fadd(y, z))
    return [_less_twice(e, total, of) for of in four]


def _rotate(e: Emitter, row: ir.Value, head_size: ir.Value) -> list[ir.Value]:
    """Apply all stages to a row in place; its memory extends to a multiple of 16 numbers.

    A block of 64 numbers passes its stages, of strides 1, 4 and 16, in registers. If there is one
    more stage, among four blocks, it reads the row again.

    Returns:
        Sixteen numbers with the smallest among them, and sixteen with the largest.
    """
    no_extremes = [filled(F32, math.inf), filled(F32, -math.inf)]

    def extend(extremes: list[ir.Value], vectors: Sequence[ir.Value]) -> list[ir.Value]:
        lo, hi = extremes
        for x in vectors:
            lo, hi = e.smaller(lo, x), e.larger(hi, x)
        return [lo, hi]

    def four_at(address: ir.Value, stride: int) -> list[ir.Value]:
        return [e.at(address, stride * i) for i in range(4)]

    def blocks() -> list[ir.Value]:
        def block(i: ir.Value, extremes: list[ir.Value]) -> list[ir.Value]:
            places = four_at(e.at(row, i, 4 * LINE), LINE)
            four = [_stage(e, _stage(e, e.load_floats(place), 1), 4) for place in places]
            four = _stage_among(e, four)
            for x, place in zip(four, places, strict=True):
                e.store(x, place)
            return extend(extremes, four)

        return e.loop(e.shift_right(head_size, 6), no_extremes, block)

    def four_blocks() -> list[ir.Value]:
        blocks()

        def four(i: ir.Value, extremes: list[ir.Value]) -> list[ir.Value]:
            first = e.at(row, i, 16 * LINE)
            for vector in range(4):
                places = four_at(e.at(first, vector * LINE), 4 * LINE)
                four = _stage_among(e, [e.load_floats(place) for place in places])
                for x, place in zip(four, places, strict=True):
                    e.store(x, place)
                extremes = extend(extremes, four)
            return extremes

        return e.loop(e.shift_right(head_size, 8), no_extremes, four)

    def vectors(strides: Sequence[int]) -> list[ir.Value]:
        def sixteen(i: ir.Value, extremes: list[ir.Value]) -> list[ir.Value]:
            place = e.at(row, i, LINE)
            x = e.load_floats(place)
            for stride in strides:
                x = _stage(e, x, stride)
            e.store(x, place)
            return extend(extremes, [x])

        count = e.shift_right(e.at(head_size, LANES - 1), 4)
        return e.loop(count, no_extremes, sixteen)

    cases = (
        (256, four_blocks),
        (64, blocks),
        (16, lambda: vectors((1, 4))),
        (8, lambda: vectors((1,))),
    )
    return e.choose(cases, lambda case: e.is_multiple(head_size, case[0]), lambda case: case[1]())


@inline_llvm
def rotate(e: Emitter, row: Int64, head_size: Int64) -> None:
    """Apply all stages to a row in place."""
    _rotate(e, row, head_size)


@inline_llvm
def rotate_with_extremes(e: Emitter, row: Int64, head_size: Int64, extremes: Int64) -> None:
    """Apply all stages to a row in place, and write its extremes.

    Args:
        e: Emits the code.
        row: Address of float32 [head_size], in memory that extends to a multiple of 16 numbers.
        head_size: D.
        extremes: Address for sixteen numbers with the smallest among them, and sixteen with the
            largest.
    """
    lo, hi = _rotate(e, row, head_size)
    e.store(lo, extremes)
    e.store(hi, e.at(extremes, LINE))
