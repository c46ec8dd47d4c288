# SPDX-License-Identifier: Apache-2.0
"""`reference.rotate` on a row of float32 in memory, sixteen numbers at a time.

The same additions in the same order give the same bits. The caller multiplies by `unit`.
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
    total = x
    for distance in (stride, 2 * stride):
        partners = e.shuffle(total, total, [lane ^ distance for lane in range(LANES)])
        total = e.b.fadd(total, partners)
    return _less_twice(e, total, x)


def _stage_among(e: Emitter, four: Sequence[ir.Value]) -> list[ir.Value]:
    """Return the stage among four vectors."""
    w, x, y, z = four
    total = e.b.fadd(e.b.fadd(w, x), e.b.fadd(y, z))
    return [_less_twice(e, total, of) for of in four]


def _rotate(e: Emitter, row: ir.Value, head_size: ir.Value) -> list[ir.Value]:
    """Apply all stages to a row in place; its memory extends to a multiple of 16 numbers.

    A block of 64 numbers passes its stages, of strides 1, 4 and 16, in registers. If there is one
    more stage, among four blocks, it reads the row again. Returns sixteen numbers with the smallest
    among them, and sixteen with the largest.
    """

    def passes(
        count: ir.Value, step: int, strides: Sequence[int], places: Sequence[Sequence[int]]
    ) -> list[ir.Value]:
        """Emit a loop that rotates the vectors at `places`, of which four form a stage."""

        def one(i: ir.Value, extremes: list[ir.Value]) -> list[ir.Value]:
            lo, hi = extremes
            for offsets in places:
                addresses = [e.at(e.at(row, i, step), offset) for offset in offsets]
                vectors = [e.load_floats(address) for address in addresses]
                for stride in strides:
                    vectors = [_stage(e, x, stride) for x in vectors]
                if len(vectors) == 4:
                    vectors = _stage_among(e, vectors)
                for x, address in zip(vectors, addresses, strict=True):
                    e.store(x, address)
                    lo, hi = e.smaller(lo, x), e.larger(hi, x)
            return [lo, hi]

        return e.loop(count, [filled(F32, math.inf), filled(F32, -math.inf)], one)

    def blocks() -> list[ir.Value]:
        return passes(e.shift_right(head_size, 6), 4 * LINE, (1, 4), [range(0, 4 * LINE, LINE)])

    def four_blocks() -> list[ir.Value]:
        blocks()
        places = [range(first, 16 * LINE, 4 * LINE) for first in range(0, 4 * LINE, LINE)]
        return passes(e.shift_right(head_size, 8), 16 * LINE, (), places)

    vectors = e.shift_right(e.at(head_size, LANES - 1), 4)
    cases = (
        (256, four_blocks),
        (64, blocks),
        (16, lambda: passes(vectors, LINE, (1, 4), [[0]])),
        (8, lambda: passes(vectors, LINE, (1,), [[0]])),
    )
    return e.choose(cases, lambda case: e.is_multiple(head_size, case[0]), lambda case: case[1]())


@inline_llvm
def rotate(e: Emitter, row: Int64, head_size: Int64) -> None:
    """Apply all stages to a row in place."""
    _rotate(e, row, head_size)


@inline_llvm
def rotate_with_extremes(e: Emitter, row: Int64, head_size: Int64, extremes: Int64) -> None:
    """Apply all stages to a row in place, and write `_rotate`'s extremes."""
    lo, hi = _rotate(e, row, head_size)
    e.store(lo, extremes)
    e.store(hi, e.at(extremes, LINE))
