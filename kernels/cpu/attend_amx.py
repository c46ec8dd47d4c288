# SPDX-License-Identifier: Apache-2.0
"""Paged attention with AMX tile products, for bf16 queries and `CPU_TILED` pages.

Tiles are widened to scratch memory, a few at a time so that they stay in the first-level cache,
and multiplied from there with every row of the block.

The instructions name the eight tile registers by number:

    few rows:  0-3 sums, 4 rows' operand, 5-7 operands of keys or values; 7 also the rows'
               second operand if upper and lower bytes of weights do not fit one
    32 rows:   0-3 sums (2 x 2), 4-5 rows' operands, 6-7 operands of keys or values
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from llvmlite import ir

from vllm_hybrid_kv.kernels.cpu import bf16_tiles, inline, records, row_ops, softmax, work_item
from vllm_hybrid_kv.kernels.cpu.bf16_tiles import OPERAND
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

_FEW_ROWS = 16
_STACKED_ROWS = 8
"""Most rows whose weights' upper and lower bytes fit one tile operand."""

_MANY_ROWS = 32
"""Rows that are multiplied at once otherwise."""

_KEY_DIMS = 128
"""Most dims of four key tiles that are widened at once: 16 KB, a third of the first-level cache."""

_SUMS_STRIDE = 4 * LINE
"""Bytes of a row of sums of codes: 64 dims of int32."""

_VOID = ir.VoidType()


def _tile(e: Emitter, operation: str, number: int, *arguments: ir.Value) -> None:
    e.call(f"llvm.x86.{operation}", _VOID, I8(number), *arguments)


def _load(e: Emitter, number: int, address: ir.Value, stride: ir.Value) -> None:
    _tile(e, "tileloadd64", number, e.b.inttoptr(address, I8.as_pointer()), stride)


def _store(e: Emitter, number: int, address: ir.Value, stride: ir.Value) -> None:
    _tile(e, "tilestored64", number, e.b.inttoptr(address, I8.as_pointer()), stride)


def _multiply(e: Emitter, sums: int, left: int, right: int) -> None:
    _tile(e, "tdpbf16ps", sums, I8(left), I8(right))


def _load_sums(e: Emitter, add: bool, places: Sequence[ir.Value], stride: ir.Value) -> None:
    for tile, place in enumerate(places):
        if add:
            _load(e, tile, place, stride)
        else:
            _tile(e, "tilezero", tile)


@inline_llvm
def _configure(e: Emitter, configuration: Int64, rows: Int64) -> None:
    """Give the rows' tiles (0 to 4) `rows` lines and the others 16; 64 bytes of memory."""
    # Palette 1: eight tiles of 1 KB. From byte 16 on the bytes of a line, from 48 on the lines.
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
def _multiply_few_keys(
    e: Emitter,
    queries: Int64,
    query_stride: Int64,
    keys: Int64,
    steps: Int64,
    scores: Int64,
    add: Int64,
    ahead: Int64,
    offset: Int64,
) -> None:
    """Write the configured rows' scores of 64 widened tokens; `steps` operands a tile of 16.

    Adds to the scores there if `add`. At each step prefetches two lines of each of the four key
    tiles of `ahead`, from `offset` bytes on.
    """
    stride = I64(SCORE_STRIDE)
    places = [e.at(scores, LINE * tile) for tile in range(4)]
    adds = e.b.icmp_signed("!=", add, I64(0))
    e.choose((True, False), lambda _: adds, lambda case: _load_sums(e, case, places, stride))
    per_tile = e.b.mul(steps, I64(OPERAND))
    next_keys = [e.b.add(e.load(I64, e.at(ahead, TILE_RECORD * t)), offset) for t in range(4)]

    with e.each(steps) as i:
        _load(e, 4, e.at(queries, i, LINE), query_stride)
        for tile in range(4):
            operand = e.at(e.at(keys, i, OPERAND), e.b.mul(per_tile, I64(tile)), 1)
            right = 5 + tile % 3
            _load(e, right, operand, I64(LINE))
            _multiply(e, tile, 4, right)
            for line in range(2):
                e.prefetch(e.at(e.at(next_keys[tile], i, 2 * LINE), LINE * line))
    for tile, place in enumerate(places):
        _store(e, tile, place, stride)


@inline_llvm
def _split_values(
    e: Emitter,
    dims: Int64,
    tiles: Int64,
    count: Int64,
    offset: Int64,
    to: Int64,
    ahead: Int64,
    offset_ahead: Int64,
) -> None:
    """Split the value codes of 64 or 32 dims into bytes: operands of 64 tokens x 16 dims.

    An operand's line is a quad of tokens, in the order of `k8v4.QUAD_BYTE_OF_TOKEN`; columns are
    dims. The dims begin `offset` bytes into a tile. Prefetches half as many lines of the tiles of
    `ahead`, from `offset_ahead` on.
    """

    def values_at(records: ir.Value, i: ir.Value, offset: ir.Value) -> ir.Value:
        return e.b.add(e.load(I64, e.at(e.at(records, i, TILE_RECORD), 8)), offset)

    def split(dims: int) -> None:
        nibble = filled(I8, 15, 64)
        with e.each(count) as i:
            base = values_at(tiles, i, offset)
            next_base = values_at(ahead, i, offset_ahead)
            of_step = e.at(to, e.shift_right(i, 2), 4 * OPERAND)
            target = e.at(of_step, e.b.and_(i, I64(3)), 4 * LINE)
            for line in range(dims // 8):
                if line % 2:
                    e.prefetch(e.at(next_base, LINE * (line // 2)))
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
    """Multiply weights of two bytes with codes of 64 or 32 dims, exactly, in int32.

    `weights` are rows of the upper bytes, 64 tokens a step. The lower bytes are `lower` bytes
    further, in the same tile if `stacked`, as for 64 dims. Sums are rows of 64 int32.
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


@inline_llvm
def _multiply_many(
    e: Emitter,
    add: int,
    left: Int64,
    left_stride: Int64,
    right: Int64,
    right_distance: Int64,
    steps: Int64,
    step_bytes: Int64,
    sums: Int64,
    stride: Int64,
) -> None:
    """Write products of 32 rows with 32 columns, or add them to the sums there.

    A step takes a line of each row and an operand of 16 columns at `right`, and the operand of the
    other columns `right_distance` bytes after it.
    """
    lower = e.b.add(left, e.b.mul(left_stride, I64(16)))
    lower_sums = e.b.add(sums, e.b.mul(stride, I64(16)))
    places = (sums, e.at(sums, LINE), lower_sums, e.at(lower_sums, LINE))
    _load_sums(e, bool(add), places, stride)
    with e.each(steps) as i:
        operand = e.b.add(right, e.b.mul(i, step_bytes))
        _load(e, 6, operand, I64(LINE))
        _load(e, 4, e.at(left, i, LINE), left_stride)
        _multiply(e, 0, 4, 6)
        _load(e, 7, e.b.add(operand, right_distance), I64(LINE))
        _multiply(e, 1, 4, 7)
        _load(e, 5, e.at(lower, i, LINE), left_stride)
        _multiply(e, 2, 5, 6)
        _multiply(e, 3, 5, 7)
    for tile, place in enumerate(places):
        _store(e, tile, place, stride)


_weigh_as_limbs = work_item.weigher(softmax.LIMBS)
_weigh = work_item.weigher(softmax.BFLOATS)


@work_item.inner
def _setup(item, few, scratch):  # type: ignore[no-untyped-def]
    stacked = few and item.rows <= _STACKED_ROWS
    lines = 2 * item.rows if stacked else np.int64(_FEW_ROWS)
    _configure(scratch + records.CONFIGURATION_AT, lines)


@work_item.inner
def _attend_few(call, item, scratch, state, first, tiles, ahead, count):  # type: ignore[no-untyped-def]
    inline.noinline()
    now, then = tiles.ctypes.data, ahead.ctypes.data
    for tile in range(0, count, 4):
        for dim in range(0, call.dims, _KEY_DIMS):
            dims = min(np.int64(_KEY_DIMS), call.dims - dim)
            for i in range(tile, min(tile + 4, count)):
                to = scratch + records.KEYS_AT + (i - tile) * (dims // 32) * OPERAND
                next_keys = ahead[i].keys + 8 * dim
                bf16_tiles.widen_key_tile(2, tiles[i].keys + 16 * dim, to, dims, next_keys)
            queries, scores = scratch + records.QUERIES_AT, scratch + records.SCORES_AT
            _multiply_few_keys(
                queries + 2 * dim, 2 * call.dims, scratch + records.KEYS_AT, dims // 32,
                scores + LINE * tile, dim, then + TILE_RECORD * tile, 8 * call.dims + 4 * dim,
            )  # fmt: skip
    _weigh_as_limbs(call, item, scratch, state, first, count, then)
    # Integer weights times codes, whose sums are exact.
    weights, codes = scratch + records.WEIGHTS_AT, scratch + records.KEYS_AT
    lower = item.rows * SCORE_STRIDE
    stacked = item.rows <= _STACKED_ROWS
    sums = scratch + records.VALUES_AT
    lower_sums = sums + _SUMS_STRIDE * (item.rows if stacked else _FEW_ROWS)
    steps = (count + 3) // 4
    start = np.int64(0)
    while start < call.dims:
        offset, offset_ahead = 8 * start, 4 * call.dims + 4 * start
        dims = np.int64(64 if stacked and start + 64 <= call.dims else 32)
        _split_values(dims, now, count, offset, codes, then, offset_ahead)
        _multiply_codes(dims, stacked, weights, lower, codes, steps, sums, lower_sums)
        for row in range(item.rows):
            to = scratch + records.OUTPUTS_AT + row * call.output_stride + 4 * start
            upper, below = sums + _SUMS_STRIDE * row, lower_sums + _SUMS_STRIDE * row
            row_ops.add_limbs(to, upper, below, dims // 16, state[row].limb_factor)
        start += dims


@work_item.inner
def _attend_many(call, item, scratch, state, first, tiles, ahead, count):  # type: ignore[no-untyped-def]
    inline.noinline()
    stride = 2 * call.dims
    for tile in range(0, count, 2):
        bf16_tiles.widen_keys(call, scratch, tiles, ahead, tile, min(tile + 2, count))
        for row in range(0, item.rows, _MANY_ROWS):
            queries = scratch + records.QUERIES_AT + row * stride
            keys = scratch + records.KEYS_AT
            scores = scratch + records.SCORES_AT + LINE * tile + row * SCORE_STRIDE
            steps = call.dims // 32
            _multiply_many(
                0, queries, stride, keys, steps * OPERAND, steps, OPERAND, scores, SCORE_STRIDE
            )
    _weigh(call, item, scratch, state, first, count, 0)
    bf16_tiles.widen_values(call, scratch, tiles, ahead, count)
    for dim in range(0, call.dims, 32):
        for row in range(0, item.rows, _MANY_ROWS):
            weights = scratch + records.WEIGHTS_AT + row * SCORE_STRIDE
            values = scratch + records.VALUES_AT + dim // 16 * OPERAND
            outputs = scratch + records.OUTPUTS_AT + row * call.output_stride + 4 * dim
            step_bytes = call.dims // 16 * OPERAND
            _multiply_many(
                1, weights, SCORE_STRIDE, values, OPERAND, (count + 1) // 2, step_bytes,
                outputs, call.output_stride,
            )  # fmt: skip


_attend = work_item.item_loop(_FEW_ROWS, records.CHUNK, _attend_few, _attend_many, _setup)


def work(call_address, scratch):  # type: ignore[no-untyped-def]
    """Process items of a call until none is left; both arguments are addresses."""
    _attend(records.attention_call_at(call_address), scratch)
    _release()
