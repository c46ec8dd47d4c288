# SPDX-License-Identifier: Apache-2.0
"""`reference.rotate` on a row of float32 in memory, sixteen numbers at a time, in numba code.

The same additions in the same order, so that the bits are the same. The last step, the division
by a power of two, is left to the caller; see `unit`.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from .lanes import F32, FLOATS, I32, LANES, load_float32, splat, store_floats, vector


def _stage(b: ir.IRBuilder, x: ir.Value, stride: int) -> ir.Value:
    """Emit the stage of a stride among sixteen numbers: the sum of four less twice the own."""

    def partner(of: ir.Value, distance: int) -> ir.Value:
        order = [lane ^ distance for lane in range(LANES)]
        return b.shuffle_vector(of, of, ir.Constant(vector(I32), order))

    pair = b.fadd(x, partner(x, stride))
    four = b.fadd(pair, partner(pair, 2 * stride))
    return b.fsub(four, b.fmul(x, splat(F32, 2.0)))


@intrinsic
def within_fours(typing_context: Any, x: Any) -> Any:
    """Return the stage of stride 1."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _stage(b, args[0], 1)

    return FLOATS(FLOATS), emit


@intrinsic
def within_sixteen(typing_context: Any, x: Any) -> Any:
    """Return the stage of stride 4."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _stage(b, args[0], 4)

    return FLOATS(FLOATS), emit


@intrinsic
def _sum_of_four(typing_context: Any, first: Any, second: Any, third: Any, fourth: Any) -> Any:
    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return b.fadd(b.fadd(args[0], args[1]), b.fadd(args[2], args[3]))

    return FLOATS(FLOATS, FLOATS, FLOATS, FLOATS), emit


@intrinsic
def _less_twice(typing_context: Any, total: Any, x: Any) -> Any:
    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return b.fsub(args[0], b.fmul(args[1], splat(F32, 2.0)))

    return FLOATS(FLOATS, FLOATS), emit


@numba.njit
def across(row, head_size):  # type: ignore[no-untyped-def]
    """Take a row through the stages of strides 16 and more, in place."""
    stride = LANES
    while head_size % (4 * stride) == 0:
        apart = 4 * stride  # bytes
        for first in range(0, head_size, 4 * stride):
            for d in range(first, first + stride, LANES):
                at = row + 4 * d
                a, b = load_float32(at), load_float32(at + apart)
                c, e = load_float32(at + 2 * apart), load_float32(at + 3 * apart)
                total = _sum_of_four(a, b, c, e)
                store_floats(at, _less_twice(total, a))
                store_floats(at + apart, _less_twice(total, b))
                store_floats(at + 2 * apart, _less_twice(total, c))
                store_floats(at + 3 * apart, _less_twice(total, e))
        stride *= 4


@numba.njit
def unit(head_size):  # type: ignore[no-untyped-def]
    """Return what a row is still to be multiplied by: 1/2 for each stage."""
    factor, run = np.float32(1.0), 4
    while head_size % run == 0:
        factor *= np.float32(0.5)
        run *= 4
    return factor


@numba.njit
def rotate(row, head_size):  # type: ignore[no-untyped-def]
    """Take a row through all stages, in place; its memory goes on to a multiple of 16 numbers."""
    for d in range(0, head_size, LANES):
        x = within_fours(load_float32(row + 4 * d))
        if head_size % LANES == 0:
            x = within_sixteen(x)
        store_floats(row + 4 * d, x)
    across(row, head_size)
