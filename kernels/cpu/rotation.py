# SPDX-License-Identifier: Apache-2.0
"""Rotate a float32 row in memory, like `reference.rotation_sums`, sixteen numbers at a time.

It adds in the same order as the reference, so the results are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.cpu.inline import Int64, inline_llvm
from vllm_hybrid_kv.kernels.cpu.llvm import (
    F32,
    I32,
    LANES,
    LINE,
    Emitter,
    filled,
    vector,
)

_Vectors = list[ir.Value]


def larger_magnitudes(e: Emitter, largest: _Vectors, x: ir.Value) -> _Vectors:
    """Update the maxima of |x| in each lane. Their bits are compared, so a NaN is the largest."""
    bits = e.b.and_(e.b.bitcast(x, vector(I32)), filled(I32, 0x7FFFFFFF))
    return [e.b.select(e.b.icmp_signed(">", bits, largest[0]), bits, largest[0])]


def _less_twice(e: Emitter, total: ir.Value, x: ir.Value) -> ir.Value:
    """Return `total - 2 x`. Doubling is exact, so a fused operation gives the same bits."""
    return e.fma(x, filled(F32, -2.0), total)


def _partner(e: Emitter, x: ir.Value, distance: int) -> ir.Value:
    return e.shuffle(x, x, [lane ^ distance for lane in range(LANES)])


def _four_lanes(e: Emitter, x: ir.Value, stride: int) -> ir.Value:
    """Apply a stage of radix 4 inside a vector; the stride is 1 or 4."""
    pair = e.b.fadd(x, _partner(e, x, stride))
    return _less_twice(e, e.b.fadd(pair, _partner(e, pair, 2 * stride)), x)


def _two_lanes(e: Emitter, x: ir.Value, stride: int) -> ir.Value:
    """Apply a stage of radix 2 inside a vector; the stride is below 16."""
    signs = [-0.0 if lane & stride else 0.0 for lane in range(LANES)]
    flip = e.b.bitcast(ir.Constant(vector(F32), signs), vector(I32))
    signed = e.b.bitcast(e.b.xor(e.b.bitcast(x, vector(I32)), flip), vector(F32))
    return e.b.fadd(_partner(e, x, stride), signed)


def _four_vectors(e: Emitter, four: _Vectors) -> _Vectors:
    w, x, y, z = four
    total = e.b.fadd(e.b.fadd(w, x), e.b.fadd(y, z))
    return [_less_twice(e, total, of) for of in four]


def _two_vectors(e: Emitter, two: _Vectors) -> _Vectors:
    x, y = two
    return [e.b.fadd(x, y), e.b.fsub(x, y)]


def _vectors_of_block(e: Emitter, vectors: _Vectors) -> _Vectors:
    """Apply the stages with strides of 16 or more, which combine whole vectors of a block."""
    vectors = list(vectors)
    for radix, stride in k8v4.rotation_stages(len(vectors)):
        combine = _four_vectors if radix == 4 else _two_vectors
        for first in range(len(vectors)):
            if first // stride % radix == 0:
                places = slice(first, first + radix * stride, stride)
                vectors[places] = combine(e, vectors[places])
    return vectors


def _rotate(e: Emitter, row: ir.Value, head_size: ir.Value) -> ir.Value:
    """Apply all stages to a row in place. Its memory is padded to a multiple of 16 numbers.

    A block of up to 256 numbers stays in registers for all stages; one of 512 is read twice.

    Returns:
        16 partial maxima of |x| as int32 bits; a NaN is the largest.
    """

    def among(
        count: int, stride: int, combine: Callable[[Emitter, _Vectors], _Vectors], first: bool
    ) -> ir.Value:
        """Apply `combine` in place to each group of `count` vectors that are `stride` apart.

        If `first`, apply the stages inside each vector before `combine`.
        """

        def run(i: ir.Value, largest: _Vectors) -> _Vectors:
            start = e.at(row, i, count * stride * LINE)
            for vector_ in range(stride):
                places = [e.at(start, LINE * (vector_ + stride * j)) for j in range(count)]
                numbers = [e.load_floats(place) for place in places]
                if first:
                    numbers = [_four_lanes(e, _four_lanes(e, x, 1), 4) for x in numbers]
                numbers = combine(e, numbers)
                for x, place in zip(numbers, places, strict=True):
                    e.store(x, place)
                    largest = larger_magnitudes(e, largest, x)
            return largest

        runs = e.shift_right(head_size, 4 + (count * stride).bit_length() - 1)
        return e.loop(runs, [filled(I32, 0)], run)[0]

    def in_vectors(stages: Sequence[tuple[int, int]]) -> ir.Value:
        def sixteen(i: ir.Value, largest: _Vectors) -> _Vectors:
            place = e.at(row, i, LINE)
            x = e.load_floats(place)
            for radix, stride in stages:
                x = (_four_lanes if radix == 4 else _two_lanes)(e, x, stride)
            e.store(x, place)
            return larger_magnitudes(e, largest, x)

        count = e.shift_right(e.at(head_size, LANES - 1), 4)
        return e.loop(count, [filled(I32, 0)], sixteen)[0]

    def of_block(block: int) -> list[ir.Value]:
        if block <= LANES:
            return [in_vectors(k8v4.rotation_stages(block))]
        largest = among(min(block // LANES, 16), 1, _vectors_of_block, True)
        if block == 32 * LANES:
            largest = among(2, 16, _two_vectors, False)
        return [largest]

    blocks = (512, 256, 128, 64, 32, 16, 8)
    return e.choose(blocks, lambda block: e.is_multiple(head_size, block), of_block)[0]


@inline_llvm
def rotate(e: Emitter, row: Int64, head_size: Int64) -> None:
    """Rotate a row in place, except for the factor `k8v4.rotation_unit`."""
    _rotate(e, row, head_size)


@inline_llvm
def rotate_and_measure(e: Emitter, row: Int64, head_size: Int64, largest: Int64) -> None:
    """Rotate a row like `rotate`, and write its partial maxima.

    Args:
        e: Emits the code.
        row: Address of float32 [head_size], in memory that is padded to a multiple of 16 numbers.
        head_size: D.
        largest: Where to store 16 partial maxima of |x|. The row's maximum is the largest of them.
    """
    e.store(_rotate(e, row, head_size), largest)
