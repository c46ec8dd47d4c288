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

import numpy as np
from llvmlite import ir

from vllm_hybrid_kv.kernels.cpu import bf16_tiles, memory, records, row_ops, softmax, work_item
from vllm_hybrid_kv.kernels.cpu.bf16_tiles import OPERAND
from vllm_hybrid_kv.kernels.cpu.inline import Bool, Int64, inline_llvm
from vllm_hybrid_kv.kernels.cpu.llvm import I8, I16, I64, LINE, Emitter, filled, vector
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


@inline_llvm
def _configure(e: Emitter, configuration: Int64, rows: Int64) -> None:
    """Give the rows' tiles (0 to 4) `rows` lines and the others 16; 64 bytes of memory."""
    for word in range(8):
        e.store(I64(0), e.at(configuration, 8 * word))
    e.store(I8(1), configuration)  # palette 1: eight tiles of 1 KB
    for number in range(8):
        e.store(I16(LINE), e.at(configuration, 16 + 2 * number))
        lines = e.b.trunc(rows, I8) if number <= 4 else I8(16)
        e.store(lines, e.at(configuration, 48 + number))
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

    def initialise(adds: bool) -> None:
        for tile in range(4):
            if adds:
                _load(e, tile, e.at(scores, LINE * tile), stride)
            else:
                _tile(e, "tilezero", tile)

    e.choose((True, False), lambda _: e.b.icmp_signed("!=", add, I64(0)), initialise)
    per_tile = e.b.mul(steps, I64(OPERAND))
    next_keys = [e.b.add(e.load(I64, e.at(ahead, TILE_RECORD * t)), offset) for t in range(4)]

    def step(i: ir.Value, _: list[ir.Value]) -> None:
        _load(e, 4, e.at(queries, i, LINE), query_stride)
        for tile in range(4):
            operand = e.at(e.at(keys, i, OPERAND), e.b.mul(per_tile, I64(tile)), 1)
            right = 5 + tile % 3
            _load(e, right, operand, I64(LINE))
            _multiply(e, tile, 4, right)
            for line in range(2):
                e.prefetch(e.at(e.at(next_keys[tile], i, 2 * LINE), LINE * line))

    e.loop(steps, [], step)
    for tile in range(4):
        _store(e, tile, e.at(scores, LINE * tile), stride)


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
        def tile(i: ir.Value, _: list[ir.Value]) -> None:
            base = values_at(tiles, i, offset)
            next_base = values_at(ahead, i, offset_ahead)
            of_step = e.at(to, e.shift_right(i, 2), 4 * OPERAND)
            target = e.at(of_step, e.b.and_(i, I64(3)), 4 * LINE)
            nibble = filled(I8, 15, 64)
            for chunk in range(dims // 32):
                for quad in range(4):
                    line = 4 * chunk + quad
                    if line % 2:
                        e.prefetch(e.at(next_base, LINE * (line // 2)))
                    codes = e.load_line(16, e.at(base, LINE * line))
                    high = e.b.bitcast(e.b.lshr(codes, filled(I16, 4, 32)), vector(I8, 64))
                    place = e.at(target, 2 * OPERAND * chunk + LINE * quad)
                    low = e.b.bitcast(codes, vector(I8, 64))
                    e.store(e.b.and_(low, nibble), place)
                    e.store(e.b.and_(high, nibble), e.at(place, OPERAND))

        e.loop(count, [], tile)

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
    further, and are more rows of the same tile if `stacked`; 64 dims are always stacked. `codes`
    come from `_split_values`. Sums are rows of 64 int32.
    """

    def multiply(parts: int, limbs: int) -> None:
        for tile in range(parts * limbs):
            _tile(e, "tilezero", tile)

        def step(i: ir.Value, _: list[ir.Value]) -> None:
            upper = e.at(weights, i, LINE)
            _load(e, 4, upper, I64(SCORE_STRIDE))
            if limbs == 2:
                _load(e, 7, e.b.add(upper, lower), I64(SCORE_STRIDE))
            for part in range(parts):
                right = 5 + part % (4 - limbs)
                _load(e, right, e.at(e.at(codes, i, 4 * OPERAND), OPERAND * part), I64(LINE))
                for limb in range(limbs):
                    left = (4, 7)[limb]
                    _tile(e, "tdpbuud", part + parts * limb, I8(left), I8(right))

        e.loop(steps, [], step)
        for tile in range(parts * limbs):
            to = sums if tile < parts else lower_sums
            _store(e, tile, e.at(to, LINE * (tile % parts)), I64(_SUMS_STRIDE))

    wide = e.b.icmp_signed("==", dims, I64(64))
    cases = ((4, 1, wide), (2, 1, stacked), (2, 2, None))
    e.choose(cases, lambda case: case[2], lambda case: multiply(*case[:2]))


def _two_by_two(
    e: Emitter,
    left: ir.Value,
    left_stride: ir.Value,
    right: ir.Value,
    right_distance: ir.Value,
    steps: ir.Value,
    step_bytes: ir.Value,
) -> None:
    """Add products of 32 rows with two operands at each step to tiles 0 to 3."""
    lower = e.b.add(left, e.b.mul(left_stride, I64(16)))

    def step(i: ir.Value, _: list[ir.Value]) -> None:
        operand = e.b.add(right, e.b.mul(i, step_bytes))
        _load(e, 6, operand, I64(LINE))
        _load(e, 4, e.at(left, i, LINE), left_stride)
        _multiply(e, 0, 4, 6)
        _load(e, 7, e.b.add(operand, right_distance), I64(LINE))
        _multiply(e, 1, 4, 7)
        _load(e, 5, e.at(lower, i, LINE), left_stride)
        _multiply(e, 2, 5, 6)
        _multiply(e, 3, 5, 7)

    e.loop(steps, [], step)


def _places(e: Emitter, rows: ir.Value, stride: ir.Value) -> tuple[ir.Value, ...]:
    """Return the addresses of tiles 0 to 3 in 32 rows of two lines."""
    lower = e.b.add(rows, e.b.mul(stride, I64(16)))
    return rows, e.at(rows, LINE), lower, e.at(lower, LINE)


@inline_llvm
def _multiply_many_keys(
    e: Emitter, queries: Int64, query_stride: Int64, keys: Int64, steps: Int64, scores: Int64
) -> None:
    """Write 32 rows' scores of 32 widened tokens; `steps` operands a tile of 16 tokens."""
    for tile in range(4):
        _tile(e, "tilezero", tile)
    distance = e.b.mul(steps, I64(OPERAND))
    _two_by_two(e, queries, query_stride, keys, distance, steps, I64(OPERAND))
    stride = I64(SCORE_STRIDE)
    for tile, place in enumerate(_places(e, scores, stride)):
        _store(e, tile, place, stride)


@inline_llvm
def _multiply_many_values(
    e: Emitter,
    weights: Int64,
    values: Int64,
    steps: Int64,
    step_bytes: Int64,
    outputs: Int64,
    stride: Int64,
) -> None:
    """Add 32 rows' weights times widened values to 32 dims of their outputs."""
    places = _places(e, outputs, stride)
    for tile, place in enumerate(places):
        _load(e, tile, place, stride)
    _two_by_two(e, weights, I64(SCORE_STRIDE), values, I64(OPERAND), steps, step_bytes)
    for tile, place in enumerate(places):
        _store(e, tile, place, stride)


@work_item.inner
def _scores_of_few(call, scratch, tiles, ahead, count):  # type: ignore[no-untyped-def]
    memory.noinline()
    for first in range(0, count, 4):
        for dim in range(0, call.dims, _KEY_DIMS):
            dims = min(np.int64(_KEY_DIMS), call.dims - dim)
            for i in range(first, min(first + 4, count)):
                to = scratch + records.KEYS_AT + (i - first) * (dims // 32) * OPERAND
                next_keys = ahead[i].keys + 8 * dim
                bf16_tiles.widen_key_tile(2, tiles[i].keys + 16 * dim, to, dims, next_keys)
            _multiply_few_keys(
                scratch + records.QUERIES_AT + 2 * dim,
                2 * call.dims,
                scratch + records.KEYS_AT,
                dims // 32,
                scratch + records.SCORES_AT + LINE * first,
                dim,
                ahead.ctypes.data + TILE_RECORD * first,
                8 * call.dims + 4 * dim,
            )


@work_item.inner
def _outputs_of_few(call, item, scratch, state, tiles, ahead, count):  # type: ignore[no-untyped-def]
    """Add integer weights times codes, whose sums are exact, to the outputs."""
    memory.noinline()
    now, then = tiles.ctypes.data, ahead.ctypes.data
    weights, codes = scratch + records.WEIGHTS_AT, scratch + records.KEYS_AT
    lower = item.rows * SCORE_STRIDE
    stacked = item.rows <= _STACKED_ROWS
    sums = scratch + records.VALUES_AT
    lower_sums = sums + _SUMS_STRIDE * (item.rows if stacked else _FEW_ROWS)
    steps = (count + 3) // 4
    dim = np.int64(0)
    while dim < call.dims:
        offset, offset_ahead = 8 * dim, 4 * call.dims + 4 * dim
        dims = np.int64(64 if stacked and dim + 64 <= call.dims else 32)
        _split_values(dims, now, count, offset, codes, then, offset_ahead)
        _multiply_codes(dims, stacked, weights, lower, codes, steps, sums, lower_sums)
        for row in range(item.rows):
            row_ops.add_limbs(
                scratch + records.OUTPUTS_AT + row * call.output_stride + 4 * dim,
                sums + _SUMS_STRIDE * row,
                lower_sums + _SUMS_STRIDE * row,
                dims // 16,
                state[row].limb_factor,
            )
        dim += dims


@work_item.inner
def _scores_of_many(call, item, scratch, tiles, ahead, count):  # type: ignore[no-untyped-def]
    memory.noinline()
    stride = 2 * call.dims
    for tile in range(0, count, 2):
        bf16_tiles.widen_keys(call, scratch, tiles, ahead, tile, min(tile + 2, count))
        for row in range(0, item.rows, _MANY_ROWS):
            _multiply_many_keys(
                scratch + records.QUERIES_AT + row * stride,
                stride,
                scratch + records.KEYS_AT,
                call.dims // 32,
                scratch + records.SCORES_AT + LINE * tile + row * SCORE_STRIDE,
            )


@work_item.inner
def _outputs_of_many(call, item, scratch, count):  # type: ignore[no-untyped-def]
    memory.noinline()
    for dim in range(0, call.dims, 32):
        for row in range(0, item.rows, _MANY_ROWS):
            _multiply_many_values(
                scratch + records.WEIGHTS_AT + row * SCORE_STRIDE,
                scratch + records.VALUES_AT + dim // 16 * OPERAND,
                (count + 1) // 2,
                call.dims // 16 * OPERAND,
                scratch + records.OUTPUTS_AT + row * call.output_stride + 4 * dim,
                call.output_stride,
            )


@work_item.inner
def _prepare(item, few, scratch):  # type: ignore[no-untyped-def]
    stacked = few and item.rows <= _STACKED_ROWS
    lines = 2 * item.rows if stacked else np.int64(_FEW_ROWS)
    _configure(scratch + records.CONFIGURATION_AT, lines)


@work_item.inner
def _attend_few(call, item, scratch, state, first, tiles, ahead, count):  # type: ignore[no-untyped-def]
    _scores_of_few(call, scratch, tiles, ahead, count)
    then = ahead.ctypes.data
    work_item.weigh(call, item, scratch, state, first, count, 1.0, softmax.LIMBS, then)
    _outputs_of_few(call, item, scratch, state, tiles, ahead, count)


@work_item.inner
def _attend_many(call, item, scratch, state, first, tiles, ahead, count):  # type: ignore[no-untyped-def]
    _scores_of_many(call, item, scratch, tiles, ahead, count)
    work_item.weigh(call, item, scratch, state, first, count, 1.0, softmax.BFLOATS, 0)
    bf16_tiles.widen_values(call, scratch, tiles, ahead, count)
    _outputs_of_many(call, item, scratch, count)


_attend = bf16_tiles.chunk_loop(_FEW_ROWS, records.CHUNK, _prepare, _attend_few, _attend_many)


def work(call_address, scratch):  # type: ignore[no-untyped-def]
    """Process items of a call until none is left; both arguments are addresses."""
    call = records.attention_call_at(call_address)
    count = call.num_items * call.num_kv_heads
    index = memory.fetch_add(call.counters)
    while index < count:
        index = _attend(call, index, scratch)
    _release()
