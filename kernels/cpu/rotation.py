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
from numba import types
from numba.extending import intrinsic

from vllm_hybrid_kv.kernels.cpu.lanes import (
    F32,
    FLOATS,
    I32,
    LANES,
    load_float32,
    maximum,
    minimum,
    same,
    splat,
    store_floats,
    vector,
)

_INFINITE = np.float32(np.inf)

BLOCK = 4 * LANES
"""Numbers whose stages of strides 1, 4 and 16 stay in four registers."""


def _less_twice(b: ir.IRBuilder, total: ir.Value, x: ir.Value) -> ir.Value:
    """Emit `total - 2 x`: doubling is exact, so one rounding gives the bits of two."""
    name = f"llvm.fmuladd.v{LANES}f32"
    kind = ir.FunctionType(x.type, [x.type] * 3)
    function = b.module.globals.get(name) or ir.Function(b.module, kind, name)
    return b.call(function, [x, splat(F32, -2.0), total])


def _stage(b: ir.IRBuilder, x: ir.Value, stride: int) -> ir.Value:
    """Emit the stage of a stride among sixteen numbers: the sum of four less twice the own."""

    def partner(of: ir.Value, distance: int) -> ir.Value:
        order = [lane ^ distance for lane in range(LANES)]
        return b.shuffle_vector(of, of, ir.Constant(vector(I32), order))

    pair = b.fadd(x, partner(x, stride))
    return _less_twice(b, b.fadd(pair, partner(pair, 2 * stride)), x)


@intrinsic
def _within_fours(typing_context: Any, x: Any) -> Any:
    """Return the stage of stride 1."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _stage(b, args[0], 1)

    return FLOATS(FLOATS), emit


@intrinsic
def _within_sixteen(typing_context: Any, x: Any) -> Any:
    """Return the stages of strides 1 and 4."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _stage(b, _stage(b, args[0], 1), 4)

    return FLOATS(FLOATS), emit


@intrinsic
def _among_four(typing_context: Any, w: Any, x: Any, y: Any, z: Any) -> Any:
    """Return the stage among four vectors of sixteen numbers, as a tuple of four."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        total = b.fadd(b.fadd(args[0], args[1]), b.fadd(args[2], args[3]))
        turned = [_less_twice(b, total, x) for x in args]
        return context.make_tuple(b, signature.return_type, turned)

    return types.UniTuple(FLOATS, 4)(FLOATS, FLOATS, FLOATS, FLOATS), emit


@numba.njit
def _load_four(at, apart):  # type: ignore[no-untyped-def]
    """Load four vectors, so many bytes apart."""
    return (
        load_float32(at),
        load_float32(at + apart),
        load_float32(at + 2 * apart),
        load_float32(at + 3 * apart),
    )


@numba.njit
def _store_four(at, apart, four):  # type: ignore[no-untyped-def]
    """Store four vectors, so many bytes apart."""
    store_floats(at, four[0])
    store_floats(at + apart, four[1])
    store_floats(at + 2 * apart, four[2])
    store_floats(at + 3 * apart, four[3])


@numba.njit
def _block(w, x, y, z):  # type: ignore[no-untyped-def]
    """Return the stages of strides 1, 4 and 16 of `BLOCK` numbers."""
    return _among_four(
        _within_sixteen(w), _within_sixteen(x), _within_sixteen(y), _within_sixteen(z)
    )


@numba.njit
def unit(head_size):  # type: ignore[no-untyped-def]
    """Return what a row is still to be multiplied by: 1/2 for each stage."""
    factor, run = np.float32(1.0), 4
    while head_size % run == 0:
        factor *= np.float32(0.5)
        run *= 4
    return factor


@numba.njit
def _extremes(four, lo, hi):  # type: ignore[no-untyped-def]
    """Return the extremes per lane with those of four vectors."""
    w, x, y, z = four
    lo = minimum(minimum(lo, minimum(w, x)), minimum(y, z))
    hi = maximum(maximum(hi, maximum(w, x)), maximum(y, z))
    return lo, hi


@numba.njit
def rotate(row, head_size):  # type: ignore[no-untyped-def]
    """Take a row through all stages, in place; its memory goes on to a multiple of 16 numbers.

    A block of 64 numbers goes through its stages in registers. If there is one more stage, among
    four blocks, the row is read again for it.

    Returns:
        Sixteen numbers with the smallest among them, and sixteen with the largest.
    """
    lo, hi = same(_INFINITE), same(-_INFINITE)
    if head_size % BLOCK == 0:
        one_more = head_size % (4 * BLOCK) == 0
        for at in range(row, row + 4 * head_size, 4 * BLOCK):
            w, x, y, z = _load_four(at, 4 * LANES)
            four = _block(w, x, y, z)
            if not one_more:
                lo, hi = _extremes(four, lo, hi)
            _store_four(at, 4 * LANES, four)
        if one_more:
            for blocks in range(row, row + 4 * head_size, 16 * BLOCK):
                for at in range(blocks, blocks + 4 * BLOCK, 4 * LANES):
                    w, x, y, z = _load_four(at, 4 * BLOCK)
                    four = _among_four(w, x, y, z)
                    lo, hi = _extremes(four, lo, hi)
                    _store_four(at, 4 * BLOCK, four)
    else:
        for at in range(row, row + 4 * head_size, 4 * LANES):
            x = load_float32(at)
            x = _within_sixteen(x) if head_size % LANES == 0 else _within_fours(x)
            lo, hi = minimum(lo, x), maximum(hi, x)
            store_floats(at, x)
    return lo, hi
