# SPDX-License-Identifier: Apache-2.0
"""Paged attention with AMX tile products of bytes.

AMX loads keys directly from a page. Value codes are first split into bytes in scratch memory.

Instructions name the eight tile registers by number. Registers 0-3 hold sums, register 4 holds the
rows (queries or weights), and 5-7 hold keys or values. If register 4 has no room for the lower
bytes of the weights, register 7 holds them.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir

from vllm_hybrid_kv.kernels.cpu import inline, records, row_ops, softmax, work_item
from vllm_hybrid_kv.kernels.cpu.inline import Bool, Int64, inline_llvm
from vllm_hybrid_kv.kernels.cpu.llvm import (
    I8,
    I16,
    I32,
    I64,
    LINE,
    Emitter,
    constant,
    filled,
    vector,
)
from vllm_hybrid_kv.kernels.cpu.records import SCORE_STRIDE, TILE_RECORD

_ROWS = 16
"""Maximum number of rows of one tile product."""

_STACKED_ROWS = 8
"""One operand holds the upper and lower bytes of the weights of up to this many rows."""

OPERAND = 1024
"""Bytes of a tile operand."""

_SUMS_STRIDE = 4 * LINE
"""Bytes between two rows of sums: 64 dims of int32."""

_SUMS_AT = records.TEMPORARY_AT + 16 * OPERAND
_CONFIGURATION_AT = _SUMS_AT + 2 * _ROWS * _SUMS_STRIDE

_VOID = ir.VoidType()


def _tile(e: Emitter, operation: str, number: int, *arguments: ir.Value) -> None:
    e.call(f"llvm.x86.{operation}", _VOID, I8(number), *arguments)


def _load(e: Emitter, number: int, address: ir.Value, stride: ir.Value) -> None:
    _tile(e, "tileloadd64", number, e.b.inttoptr(address, I8.as_pointer()), stride)


def _store(e: Emitter, number: int, address: ir.Value, stride: ir.Value) -> None:
    _tile(e, "tilestored64", number, e.b.inttoptr(address, I8.as_pointer()), stride)


@inline_llvm
def _configure(e: Emitter, configuration: Int64, rows: Int64) -> None:
    """Configure tiles 0-4 with `rows` rows and 5-7 with 16. Writes 64 bytes at `configuration`."""
    # Byte 0 selects palette 1, which has eight tiles of 1 KB. Bytes 16 to 31 are each tile's row
    # size in bytes, as 16-bit numbers. Bytes 48 to 55 are each tile's number of rows.
    words: ir.Value = constant(I8, [1, *[0] * 15, *[LINE, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8])
    for tile in range(5):
        words = e.b.insert_element(words, e.b.trunc(rows, I8), I32(48 + tile))
    e.store(words, configuration)
    e.call("llvm.x86.ldtilecfg", _VOID, e.b.inttoptr(configuration, I8.as_pointer()))


@inline_llvm
def _release(e: Emitter) -> None:
    """Release the tile registers, so that the system need not save them."""
    e.call("llvm.x86.tilerelease", _VOID)


@inline_llvm
def _multiply_keys(
    e: Emitter,
    queries: Int64,
    query_stride: Int64,
    tiles: Int64,
    ahead: Int64,
    scores: Int64,
    prefetches: Bool,
) -> None:
    """Multiply the queries with four key tiles, and prefetch four tiles of `ahead`.

    An operand holds 64 dims. If the head size is an odd multiple of 32, the last operand includes
    the 512 bytes after the tile. They are still in the page, and are multiplied by zeros.
    """
    for tile in range(4):
        _tile(e, "tilezero", tile)
    keys, next_keys = (
        [e.load(I64, e.at(at, TILE_RECORD * tile)) for tile in range(4)] for at in (tiles, ahead)
    )

    def emit(with_prefetch: bool) -> None:
        with e.each(e.shift_right(query_stride, 6)) as i:
            _load(e, 4, e.at(queries, i, LINE), query_stride)
            for tile in range(4):
                right = 5 + tile % 3
                _load(e, right, e.at(keys[tile], i, OPERAND), I64(LINE))
                _tile(e, "tdpbsud", tile, I8(4), I8(right))
                for line in range(16 if with_prefetch else 0):
                    e.prefetch(e.at(e.at(next_keys[tile], i, OPERAND), LINE * line))

    e.choose((True, False), lambda _: prefetches, emit)
    for tile in range(4):
        _store(e, tile, e.at(scores, LINE * tile), I64(SCORE_STRIDE))


@inline_llvm
def _split_values(
    e: Emitter,
    dims: Int64,
    tiles: Int64,
    count: Int64,
    offset: Int64,
    to: Int64,
    ahead: Int64,
) -> None:
    """Split value codes of 64 or 32 dims into bytes, as operands of 64 tokens x 16 dims.

    A row of an operand holds 16 dims of four tokens, ordered by `k8v4.QUAD_BYTE_OF_TOKEN`. The
    first dim is `offset` bytes into a tile. Also prefetches these dims of the tiles in `ahead`.
    """

    def values_at(records: ir.Value, i: ir.Value) -> ir.Value:
        return e.b.add(e.load(I64, e.at(e.at(records, i, TILE_RECORD), 8)), offset)

    def split(dims: int) -> None:
        nibble = filled(I8, 15, 64)
        with e.each(count) as i:
            base = values_at(tiles, i)
            next_base = values_at(ahead, i)
            of_step = e.at(to, e.shift_right(i, 2), 4 * OPERAND)
            target = e.at(of_step, e.b.and_(i, I64(3)), 4 * LINE)
            for line in range(dims // 8):
                e.prefetch(e.at(next_base, LINE * line))
                codes = e.load_line(16, e.at(base, LINE * line))
                chunk, quad = divmod(line, 4)
                for half in range(2):
                    shifted = e.b.lshr(codes, filled(I16, 4 * half, 32))
                    place = e.at(target, OPERAND * (2 * chunk + half) + LINE * quad)
                    e.store(e.b.and_(e.b.bitcast(shifted, vector(I8, 64)), nibble), place)

    e.choose_number(dims, (64, 32), split)


@inline_llvm
def _multiply_codes(
    e: Emitter,
    dims: Int64,
    stacked: Bool,
    weights: Int64,
    lower: Int64,
    codes: Int64,
    steps: Int64,
    sums: Int64,
    lower_sums: Int64,
) -> None:
    """Multiply two-byte weights with the value codes of 64 or 32 dims, exactly, in int32.

    The upper bytes are at `weights`, 64 tokens per step, and the lower bytes at `weights + lower`.
    If `stacked`, one tile holds upper and lower bytes. 64 dims require this. A row has 64 sums.
    """

    def multiply(parts: int, limbs: int) -> None:
        for tile in range(parts * limbs):
            _tile(e, "tilezero", tile)

        with e.each(steps) as i:
            upper = e.at(weights, i, LINE)
            _load(e, 4, upper, I64(SCORE_STRIDE))
            if limbs == 2:
                _load(e, 7, e.b.add(upper, lower), I64(SCORE_STRIDE))
            for part in range(parts):
                right = 5 + part % (4 - limbs)
                _load(e, right, e.at(e.at(codes, i, 4 * OPERAND), OPERAND * part), I64(LINE))
                for limb in range(limbs):
                    _tile(e, "tdpbuud", part + parts * limb, I8((4, 7)[limb]), I8(right))
        for tile in range(parts * limbs):
            to = sums if tile < parts else lower_sums
            _store(e, tile, e.at(to, LINE * (tile % parts)), I64(_SUMS_STRIDE))

    wide = e.b.icmp_signed("==", dims, I64(64))
    cases = ((4, 1, wide), (2, 1, stacked), (2, 2, None))
    e.choose(cases, lambda case: case[2], lambda case: multiply(*case[:2]))


_weigh = work_item.weigher(softmax.LIMBS)


@work_item.inner
def _setup(item, scratch):  # type: ignore[no-untyped-def]
    lines = 2 * item.rows if item.rows <= _STACKED_ROWS else np.int64(_ROWS)
    _configure(scratch + _CONFIGURATION_AT, lines)


@work_item.inner
def _attend_chunk(call, item, scratch, state, first, tiles, ahead, count):  # type: ignore[no-untyped-def]
    inline.noinline()
    now, then = tiles.ctypes.data, ahead.ctypes.data
    stride = work_item.query_stride(call, 0)
    for tile in range(0, count, 4):
        for row in range(0, item.rows, _ROWS):
            queries = scratch + records.QUERIES_AT + row * stride
            scores = scratch + records.SCORES_AT + row * SCORE_STRIDE + LINE * tile
            at = TILE_RECORD * tile
            _multiply_keys(queries, stride, now + at, then + at, scores, row == 0)
    stacked = item.rows <= _STACKED_ROWS
    lower = item.rows * SCORE_STRIDE if stacked else np.int64(2 * records.CHUNK)
    _weigh(call, item, scratch, state, first, count, lower)
    # Multiply integer weights with codes. The sums are exact.
    codes = scratch + records.TEMPORARY_AT
    sums = scratch + _SUMS_AT
    lower_sums = sums + _SUMS_STRIDE * (item.rows if stacked else _ROWS)
    dim = np.int64(0)
    while dim < call.dims:
        dims = np.int64(64 if stacked and dim + 64 <= call.dims else 32)
        _split_values(dims, now, count, 8 * dim, codes, then)
        for block in range(0, item.rows, _ROWS):
            weights = scratch + records.WEIGHTS_AT + block * SCORE_STRIDE
            steps = (count + 3) // 4
            _multiply_codes(dims, stacked, weights, lower, codes, steps, sums, lower_sums)
            for row in range(min(np.int64(_ROWS), item.rows - block)):
                place = block + row
                to = scratch + records.OUTPUTS_AT + place * call.output_stride + 4 * dim
                upper, below = sums + _SUMS_STRIDE * row, lower_sums + _SUMS_STRIDE * row
                row_ops.add_limbs(to, upper, below, dims // 16, state[place].weight_step)
        dim += dims


_attend = work_item.item_loop(_attend_chunk, _setup)


def work(call_address, scratch):  # type: ignore[no-untyped-def]
    """Process work items until none is left. Both arguments are addresses."""
    _attend(records.attention_call_at(call_address), scratch)
    _release()
