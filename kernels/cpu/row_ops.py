# SPDX-License-Identifier: Apache-2.0
"""Operations on a row of queries, scores or outputs in scratch memory, vector by vector.

Rows begin at multiples of 64 bytes.
"""

from __future__ import annotations

from llvmlite import ir

from vllm_hybrid_kv.kernels.cpu.inline import Float32, Int64, inline_llvm
from vllm_hybrid_kv.kernels.cpu.llvm import (
    F16,
    F32,
    I16,
    I32,
    I64,
    LANES,
    LINE,
    ZEROS,
    Emitter,
    filled,
    vector,
)
from vllm_hybrid_kv.kernels.cpu.records import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    KEY_SCALES_AT,
    VALUE_SCALES_AT,
)

_EIGHT = LANES // 2  # head sizes are multiples of 8, not always of 16


def _load_floats(e: Emitter, dtype_code: int, address: ir.Value, lanes: int) -> ir.Value:
    if dtype_code == FLOAT32:
        return e.load_floats(address, lanes)
    bits = e.load(vector(I16, lanes), address)
    return e.bfloat16_to_floats(bits) if dtype_code == BFLOAT16 else e.halves_to_floats(bits)


@inline_llvm
def widen_row(
    e: Emitter, dtype_code: Int64, source: Int64, to: Int64, dims: Int64, ahead: Int64
) -> None:
    """Convert a row to float32. If `dims` is not a multiple of 16, write the last 8 twice.

    Prefetches the row `ahead` bytes after `source`.
    """

    def widen(code: int) -> None:
        step = LANES * (4 if code == FLOAT32 else 2)
        vectors = e.shift_right(dims, 4)
        with e.each(vectors) as i:
            place = e.at(source, i, step)
            e.prefetch(e.b.add(place, ahead))
            e.store(_load_floats(e, code, place, LANES), e.at(to, i, LINE))
        with e.b.if_then(e.b.not_(e.is_multiple(dims, LANES))):
            last = _load_floats(e, code, e.at(source, vectors, step), _EIGHT)
            e.store(e.shuffle(last, last, 2 * [*range(_EIGHT)]), e.at(to, vectors, LINE))

    e.choose_number(dtype_code, (BFLOAT16, FLOAT16, FLOAT32), widen)


@inline_llvm
def store_row(
    e: Emitter,
    dtype_code: Int64,
    source: Int64,
    to: Int64,
    dims: Int64,
    add: Float32,
    factor: Float32,
) -> None:
    """Compute `(row + add) * factor` for a float32 row, and store the result in another dtype."""
    add, factor = e.broadcast(add, _EIGHT), e.broadcast(factor, _EIGHT)

    def store(code: int) -> None:
        with e.each(e.shift_right(dims, 3)) as i:
            x = e.b.fadd(e.load_floats(e.at(source, i, 32), _EIGHT), add)
            x = e.b.fmul(x, factor)
            if code == BFLOAT16:
                x = e.floats_to_bfloat16(x)
            elif code == FLOAT16:
                x = e.b.fptrunc(x, vector(F16, _EIGHT))
            e.store(x, e.at(to, i, 32 if code == FLOAT32 else 16))

    e.choose_number(dtype_code, (BFLOAT16, FLOAT16, FLOAT32), store)


@inline_llvm
def add_scaled(e: Emitter, to: Int64, row: Int64, dims: Int64, factor: Float32) -> None:
    """Add `row * factor` to a row of float32."""
    factor = e.broadcast(factor, _EIGHT)
    with e.each(e.shift_right(dims, 3)) as i:
        x, place = e.load_floats(e.at(row, i, 32), _EIGHT), e.at(to, i, 32)
        e.store(e.fma(x, factor, e.load_floats(place, _EIGHT)), place)


@inline_llvm
def add_limbs(
    e: Emitter, to: Int64, upper: Int64, lower: Int64, vectors: Int64, factor: Float32
) -> None:
    """Add `(256 * upper + lower) * factor` to a row of float32. Both sums are int32 below 2^23."""
    factor = e.broadcast(factor)
    with e.each(vectors) as i:
        high, low = (e.load(vector(I32), e.at(limb, i, LINE)) for limb in (upper, lower))
        x = e.b.sitofp(e.b.add(e.b.shl(high, filled(I32, 8)), low), vector(F32))
        place = e.at(to, i, LINE)
        e.store(e.fma(x, factor, e.load_floats(place)), place)


@inline_llvm
def clear_lines(e: Emitter, to: Int64, lines: Int64) -> None:
    """Write zeros to `lines` cache lines, at least one."""
    with e.each(lines) as i:
        e.store(ZEROS, e.at(to, i, LINE))


@inline_llvm
def widen_scales(e: Emitter, tile: Int64, scratch: Int64) -> None:
    """Convert the fp16 scales of a tile to float32, in scratch memory."""
    for offset, to in ((16, KEY_SCALES_AT), (24, VALUE_SCALES_AT)):
        halves = e.load(vector(I16), e.load(I64, e.at(tile, offset)))
        e.store(e.halves_to_floats(halves), e.at(scratch, to))
