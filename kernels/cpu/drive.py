# SPDX-License-Identifier: Apache-2.0
"""What a thread does around the products: find pages, weigh scores, merge, write results.

A work item is a block of rows (query tokens times the heads of one KV head's group) against a
range of keys. Its keys go by in chunks; after each, every row holds the online softmax of what
it has seen. An item that has only a part of its rows' keys leaves partial sums, and whoever
finishes the last part merges them, in the order of the parts, so that the result does not
depend on who was first.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from . import rows
from .emit import F32, I32, I64, Emitter

ROW_BLOCK = 64
"""Most rows of an item."""

CHUNK = 256
"""Most tokens of a chunk."""

TILE = 16
"""Tokens of a tile; see `k8v4.TILE_TOKENS`."""

# Columns of a plan's items.
(
    REQUEST,  # index of the request
    QUERY_START,  # its first query token in the batch
    QUERY_LENGTH,  # its query tokens
    LENGTH,  # its tokens
    FIRST_ROW,  # the item's first row, of query tokens x group
    ROWS,  # the item's rows
    FIRST_KEY,  # its range of tokens to attend to
    LAST_KEY,
    PARTIAL,  # row of its partial sums, or -1: it has all keys and writes its results
    MERGE,  # its merge, or -1
    ITEM_COLUMNS,
) = range(11)

# Columns of a plan's merges.
(
    MERGE_ITEM,  # the first of its items, which follow one another by parts
    MERGE_PARTS,
    MERGE_COLUMNS,
) = range(3)

BFLOAT16, FLOAT16, FLOAT32 = range(3)

# A thread's scratch memory. Rows of scores are an odd number of cache lines apart, so that a
# column of them does not fall into few sets of the cache.
MAX_DIMS = 256
SCORE_STRIDE = 4 * CHUNK + 64
QUERIES = 0
SCORES = QUERIES + 4 * ROW_BLOCK * MAX_DIMS
WEIGHTS = SCORES + ROW_BLOCK * SCORE_STRIDE
OUTPUTS = WEIGHTS + ROW_BLOCK * SCORE_STRIDE
KEYS = OUTPUTS + 4 * ROW_BLOCK * MAX_DIMS
VALUES = KEYS + 2 * CHUNK * MAX_DIMS
SCALES = VALUES + 2 * CHUNK * MAX_DIMS
ZEROS = SCALES + 4 * CHUNK
CONFIGURATION = ZEROS + 4 * CHUNK
SCRATCH_BYTES = CONFIGURATION + 4096

_LOG2_E = np.float32(rows.LOG2_E)
_LN_2 = np.float32(math.log(2.0))
_STATE = rows.STATE_BYTES


CALL = np.dtype(
    [
        (name, np.int64)
        for name in (
            "query",
            "query_token_stride",
            "query_head_stride",
            "out",
            "out_token_stride",
            "out_head_stride",
            "number",  # BFLOAT16, FLOAT16 or FLOAT32, of queries and outputs
            "lse",  # 0: not asked for
            "lse_token_stride",
            "lse_head_stride",
            "cache",
            "block_stride",
            "head_bytes",
            "value_offset",
            "scale_offset",
            "zero_offset",
            "tiled",
            "block_table",
            "block_table_stride",
            "sinks",  # float32 [Hq], 0: none
            "num_kv_heads",
            "group",
            "dims",
            "output_stride",  # of a row of float32 dims, a multiple of 64
            "page_size",
            "causal",
            "window",  # 0: none
            "items",  # int64 [num_items, ITEM_COLUMNS]
            "num_items",
            "merges",  # int64 [., MERGE_COLUMNS]
            "partials",
            "counters",  # int64: the next item, then finished parts of each merge and head
        )
    ]
    + [("scale", np.float64), ("soft_cap", np.float64)]  # soft cap 0: none
)
"""One call of attention: addresses, strides in bytes and sizes. A record, which numba passes by
address: a tuple of thirty numbers would be thirty arguments of every function here."""

inner = numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, error_model="numpy")
"""Compile a function that only other compiled functions call."""

_CALL = numba.from_dtype(CALL)


@intrinsic  # type: ignore[misc]
def keep_apart(context: Any) -> Any:
    """Keep the function that this stands in from being inlined, which only costs compilation."""

    def code(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> Any:
        b.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), code


@intrinsic  # type: ignore[misc]
def call_at(context: Any, address: Any) -> Any:
    """Return the record of a call from its address."""

    def code(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        return b.inttoptr(values[0], context.get_value_type(_CALL))

    return _CALL(types.int64), code


@intrinsic  # type: ignore[misc]
def rows_at(context: Any, address: Any) -> Any:
    """Return a pointer to int64 from its address."""

    def code(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        return b.inttoptr(values[0], I64.as_pointer())

    return types.CPointer(types.int64)(types.int64), code


@intrinsic  # type: ignore[misc]
def take_next(context: Any, counter: Any) -> Any:
    """Add 1 to an int64 shared between threads and return what it was."""

    def code(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        pointer = b.inttoptr(values[0], I64.as_pointer())
        return b.atomic_rmw("add", pointer, I64(1), "acq_rel")

    return types.int64(types.int64), code


@intrinsic  # type: ignore[misc]
def read_float(context: Any, address: Any) -> Any:
    """Load a float32."""

    def code(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        return Emitter(b).load(F32, values[0])

    return types.float32(types.int64), code


@intrinsic  # type: ignore[misc]
def write_float(context: Any, address: Any, number: Any) -> Any:
    """Store a float32."""

    def code(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> Any:
        Emitter(b).store(values[1], values[0])
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), code


@intrinsic  # type: ignore[misc]
def read_index(context: Any, address: Any) -> Any:
    """Load an int32 as int64."""

    def code(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        return b.sext(Emitter(b).load(I32, values[0]), I64)

    return types.int64(types.int64), code


@inner
def item_at(call, index):  # type: ignore[no-untyped-def]
    """Return an item of the call's plan."""
    return numba.carray(rows_at(call.items + 8 * ITEM_COLUMNS * index), ITEM_COLUMNS)


@inner
def visible_keys(call, item, row):  # type: ignore[no-untyped-def]
    """Return the first token that a row of an item sees and the one after the last."""
    token = (item[FIRST_ROW] + row) // call.group
    position = item[LENGTH] - item[QUERY_LENGTH] + token
    first, last = np.int64(0), item[LENGTH]
    if call.causal:
        last = min(last, position + 1)
    if call.window > 0:
        first = max(first, position - call.window + 1)
        last = min(last, position + call.window)
    return first, last


@inner
def keys_of_item(call, item, chunk):  # type: ignore[no-untyped-def]
    """Return the tokens that any row of an item sees, from a multiple of `chunk` on."""
    first, _ = visible_keys(call, item, np.int64(0))
    _, last = visible_keys(call, item, item[ROWS] - 1)
    first = max(first, item[FIRST_KEY])
    return first // chunk * chunk, min(last, item[LAST_KEY])


@inner
def query_of_row(call, item, head, row):  # type: ignore[no-untyped-def]
    """Return a row's token in the batch and its query head."""
    token, of_group = divmod(item[FIRST_ROW] + row, call.group)
    return item[QUERY_START] + token, head * call.group + of_group


@inner
def begin(call, item, head, scratch, state, stride):  # type: ignore[no-untyped-def]
    """Load an item's queries to rows `stride` bytes apart, and clear its sums.

    As float32, or as they are where `stride` leaves room for bf16 only.
    """
    keep_apart()
    for row in range(item[ROWS]):
        token, query_head = query_of_row(call, item, head, row)
        source = (
            call.query + token * call.query_token_stride + query_head * call.query_head_stride
        )
        to = scratch + QUERIES + row * stride
        if stride == 2 * call.dims:
            rows.copy_bfloat16(source, to, call.dims)
        elif call.number == BFLOAT16:
            rows.load_bfloat16(source, to, call.dims)
        elif call.number == FLOAT16:
            rows.load_float16(source, to, call.dims)
        else:
            rows.load_float32(source, to, call.dims)
        state[row, 0] = -np.inf
        for number in range(1, 4):
            state[row, number] = np.float32(0.0)
    rows.fill(scratch + OUTPUTS, item[ROWS] * (call.output_stride // 64))


@inner
def tiles_of_chunk(first, last, chunk):  # type: ignore[no-untyped-def]
    """Return how many tiles the chunk from token `first` on has before `last`."""
    return (max(min(last - first, chunk), np.int64(0)) + TILE - 1) // TILE


@inner
def tile_addresses(call, item, head, first, tiles, found):  # type: ignore[no-untyped-def]
    """Find tiles from token `first` on: `found[i]` is key tile, value tile, scales and zeros."""
    keep_apart()
    table = call.block_table + item[REQUEST] * call.block_table_stride
    for i in range(tiles):
        page, token = divmod(first + TILE * i, call.page_size)
        block = read_index(table + 4 * page)
        region = call.cache + block * call.block_stride + head * call.head_bytes
        found[i, 0] = region + token * call.dims
        found[i, 1] = region + call.value_offset + token * call.dims // 2
        found[i, 2] = region + call.scale_offset + 2 * token
        found[i, 3] = region + call.zero_offset + 2 * token


@inner
def load_scales(scratch, found, tiles):  # type: ignore[no-untyped-def]
    """Widen the scales and zeros of a chunk's tokens to float32."""
    for tile in range(tiles):
        rows.widen_tile_halves(found[tile, 2], scratch + SCALES + 64 * tile)
        rows.widen_tile_halves(found[tile, 3], scratch + ZEROS + 64 * tile)


@inner
def weigh(call, item, scratch, state, first, tiles, key_scale, short):  # type: ignore[no-untyped-def]
    """Turn a chunk's scores into weights, and rescale outputs whose largest score grew."""
    keep_apart()
    scale = np.float32(call.scale * key_scale)
    cap = np.float32(call.soft_cap)
    if call.soft_cap <= 0.0:
        scale = np.float32(call.scale * key_scale * rows.LOG2_E)
    for row in range(item[ROWS]):
        seen, unseen = visible_keys(call, item, row)
        seen = max(seen - first, np.int64(0))
        unseen = min(min(unseen, item[LAST_KEY]) - first, TILE * tiles)
        # Products of rounded weights take tokens by 32.
        vectors = (tiles + 1) // 2 * 2 if short else tiles
        weights = scratch + WEIGHTS + row * SCORE_STRIDE
        if unseen <= seen:
            rows.fill(weights, vectors // 2 if short else tiles)
            continue
        scores = scratch + SCORES + row * SCORE_STRIDE
        own = state.ctypes.data + row * _STATE
        if short:
            decay = rows.softmax_row_bfloat16(
                scores, weights, scratch + SCALES, scratch + ZEROS, own, vectors, seen, unseen,
                scale, cap,
            )  # fmt: skip
        else:
            decay = rows.softmax_row(
                scores, weights, scratch + SCALES, scratch + ZEROS, own, vectors, seen, unseen,
                scale, cap,
            )  # fmt: skip
        if decay != np.float32(1.0):
            output = scratch + OUTPUTS + row * call.output_stride
            rows.store_float32(
                output, output, call.output_stride // 4, np.float32(0.0), decay
            )


@inner
def write_row(call, token, query_head, output, add, largest, total):  # type: ignore[no-untyped-def]
    """Write `(output + add) / total` of a row, with its sink, and its log-sum-exp."""
    keep_apart()
    decay = np.float32(1.0)
    if call.sinks:
        sink = read_float(call.sinks + 4 * query_head) * _LOG2_E
        if sink > -np.inf:
            new = max(largest, sink)
            decay = np.float32(np.exp2(largest - new))
            total = total * decay + np.float32(np.exp2(sink - new))
            largest = new
    factor, lse = np.float32(0.0), np.float32(-np.inf)
    if total != np.float32(0.0):
        factor = decay / total
        lse = (largest + np.float32(np.log2(total))) * _LN_2
    to = call.out + token * call.out_token_stride + query_head * call.out_head_stride
    if call.number == BFLOAT16:
        rows.store_bfloat16(output, to, call.dims, add, factor)
    elif call.number == FLOAT16:
        rows.store_float16(output, to, call.dims, add, factor)
    else:
        rows.store_float32(output, to, call.dims, add, factor)
    if call.lse:
        write_float(
            call.lse + token * call.lse_token_stride + query_head * call.lse_head_stride, lse
        )


@inner
def _record(call, row, head):  # type: ignore[no-untyped-def]
    """Return the address of a row's partial sums: its outputs, then two numbers."""
    return call.partials + (row * call.num_kv_heads + head) * (call.output_stride + 64)


@inner
def _merge(call, merge, head, scratch):  # type: ignore[no-untyped-def]
    """Merge the parts of an item's rows and write the results."""
    keep_apart()
    whole = item_at(call, merge[MERGE_ITEM])
    merged = scratch + OUTPUTS
    for row in range(whole[ROWS]):
        largest = np.float32(-np.inf)
        for part in range(merge[MERGE_PARTS]):
            record = _record(call, whole[PARTIAL] + part * whole[ROWS] + row, head)
            largest = max(largest, read_float(record + call.output_stride))
        rows.fill(merged, call.output_stride // 64)
        total = np.float32(0.0)
        for part in range(merge[MERGE_PARTS]):
            record = _record(call, whole[PARTIAL] + part * whole[ROWS] + row, head)
            of_part = read_float(record + call.output_stride + 4)
            if of_part != np.float32(0.0):
                decay = np.exp2(read_float(record + call.output_stride) - largest)
                total += np.float32(decay) * of_part
                rows.add_scaled(merged, record, call.dims, np.float32(decay))
        token, query_head = query_of_row(call, whole, head, row)
        write_row(call, token, query_head, merged, np.float32(0.0), largest, total)


@inner
def finish(call, item, head, scratch, state, offset):  # type: ignore[no-untyped-def]
    """Write an item's results, or leave its part and merge when it was the last one.

    `offset` is what the values' codes were too large by when rounded weights multiplied them.
    """
    keep_apart()
    for row in range(item[ROWS]):
        output = scratch + OUTPUTS + row * call.output_stride
        largest, total = state[row, 0], state[row, 1]
        add = state[row, 2] - offset * state[row, 3]
        if item[PARTIAL] < 0:
            token, query_head = query_of_row(call, item, head, row)
            write_row(call, token, query_head, output, add, largest, total)
        else:
            record = _record(call, item[PARTIAL] + row, head)
            rows.store_float32(output, record, call.dims, add, np.float32(1.0))
            write_float(record + call.output_stride, largest)
            write_float(record + call.output_stride + 4, total)
    if item[PARTIAL] >= 0:
        merge = numba.carray(
            rows_at(call.merges + 8 * MERGE_COLUMNS * item[MERGE]), MERGE_COLUMNS
        )
        done = call.counters + 8 * (1 + item[MERGE] * call.num_kv_heads + head)
        if take_next(done) == merge[MERGE_PARTS] - 1:
            _merge(call, merge, head, scratch)
