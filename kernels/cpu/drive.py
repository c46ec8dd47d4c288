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

import numba
import numpy as np

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.cpu import memory, rotation, rows, softmax

ROW_BLOCK = 128
"""Most rows of an item, for which keys and values are widened once."""

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
    FIRST_KEY,  # its range of tokens to attend to, from a multiple of CHUNK
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
MAX_DIMS = k8v4.MAX_HEAD_SIZE
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

_LOG2_E = np.float32(softmax.LOG2_E)
_LN_2 = np.float32(math.log(2.0))
_STATE = softmax.STATE_BYTES
STATE_NUMBERS = _STATE // 4


inner = numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, error_model="numpy")
"""Compile a function that only other compiled functions call."""


@inner
def item_at(call, index):  # type: ignore[no-untyped-def]
    """Return an item of the call's plan."""
    return numba.carray(memory.rows_at(call.items + 8 * ITEM_COLUMNS * index), ITEM_COLUMNS)


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
def keys_of_item(call, item):  # type: ignore[no-untyped-def]
    """Return the tokens that any row of an item sees, from a whole tile on."""
    first, _ = visible_keys(call, item, np.int64(0))
    _, last = visible_keys(call, item, item[ROWS] - 1)
    first = max(first, item[FIRST_KEY])
    return first // TILE * TILE, min(last, item[LAST_KEY])


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
    memory.keep_apart()
    for row in range(item[ROWS]):
        token, query_head = query_of_row(call, item, head, row)
        source = call.query + token * call.query_token_stride + query_head * call.query_head_stride
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
        for number in range(1, 3):
            state[row, number] = np.float32(0.0)
    rows.fill(scratch + OUTPUTS, item[ROWS] * (call.output_stride // 64))


@inner
def next_chunk(first, chunk):  # type: ignore[no-untyped-def]
    """Return the next multiple of `chunk` after token `first`.

    Chunks end at the same tokens whatever is seen before them, so that a row's sums do not
    depend on how its request's prefill was divided.
    """
    return (first // chunk + 1) * chunk


@inner
def tiles_of_chunk(first, last, chunk):  # type: ignore[no-untyped-def]
    """Return how many tiles the chunk from token `first` on has before `last`."""
    tokens = min(last, next_chunk(first, chunk)) - first
    return (max(tokens, np.int64(0)) + TILE - 1) // TILE


@inner
def tile_addresses(call, item, head, first, tiles, found):  # type: ignore[no-untyped-def]
    """Find tiles from token `first` on: `found[i]` is key tile, value tile, scales and zeros."""
    memory.keep_apart()
    table = call.block_table + item[REQUEST] * call.block_table_stride
    for i in range(tiles):
        page, token = divmod(first + TILE * i, call.page_size)
        block = memory.read_index(table + 4 * page)
        region = call.cache + block * call.block_stride + head * call.head_bytes
        found[i, 0] = region + token * call.dims
        found[i, 1] = region + call.value_offset + token * call.dims // 2
        found[i, 2] = region + call.scale_offset + 2 * token
        found[i, 3] = region + call.zero_offset + 2 * token


@inner
def first_tiles(call, index, chunk, found):  # type: ignore[no-untyped-def]
    """Find the tiles of the first chunk of the item with a number; return how many it has.

    None, if there is no such item.
    """
    memory.keep_apart()
    number, head = divmod(index, call.num_kv_heads)
    if number >= call.num_items:
        return np.int64(0)
    item = item_at(call, number)
    first, last = keys_of_item(call, item)
    tiles = tiles_of_chunk(first, last, chunk)
    tile_addresses(call, item, head, first, tiles, found)
    return tiles


@inner
def load_scales(scratch, found, tiles, middle):  # type: ignore[no-untyped-def]
    """Widen the scales of a chunk's tokens, and their values at the code `middle`."""
    for tile in range(tiles):
        rows.widen_scales(
            found[tile, 2],
            found[tile, 3],
            scratch + SCALES + 64 * tile,
            scratch + ZEROS + 64 * tile,
            np.float32(middle),
        )


@inner
def weigh(call, item, scratch, state, first, tiles, key_scale, kind, ahead):  # type: ignore[no-untyped-def]
    """Turn a chunk's scores into weights, and rescale outputs whose largest score grew.

    Weights become what `kind` of `softmax` says. Integers' lower bytes are as many rows below
    the upper ones as the item has, and for them `ahead` is the address of the next chunk's tile
    records: what the products leave of it, a quarter of the keys and half of the values, is
    asked for row by row.
    """
    memory.keep_apart()
    scale = np.float32(call.scale * key_scale)
    cap = np.float32(call.soft_cap)
    if call.soft_cap <= 0.0:
        scale = np.float32(call.scale * key_scale * softmax.LOG2_E)
    # Products take tokens by 16, by 32 or by 64.
    step = 1 << kind
    vectors = (tiles + step - 1) // step * step
    lower = item[ROWS] * SCORE_STRIDE
    for row in range(item[ROWS]):
        seen, unseen = visible_keys(call, item, row)
        seen = max(seen - first, np.int64(0))
        unseen = min(min(unseen, item[LAST_KEY]) - first, TILE * tiles)
        weights = scratch + WEIGHTS + row * SCORE_STRIDE
        if unseen <= seen:
            if kind == softmax.LIMBS:
                # Whatever the integers are, they count nothing.
                state[row, 3] = np.float32(0.0)
            else:
                rows.fill(weights, vectors >> kind)
            continue
        scores = scratch + SCORES + row * SCORE_STRIDE
        own = state.ctypes.data + row * _STATE
        if kind == softmax.LIMBS:
            line = min(128 * row, 4 * call.dims - 128)
            decay = softmax.softmax_row_limbs(
                scores, weights, scratch + SCALES, scratch + ZEROS, own, vectors, seen, unseen,
                scale, cap, lower, ahead, 12 * call.dims + line, line,
            )  # fmt: skip
        elif kind == softmax.BFLOATS:
            decay = softmax.softmax_row_bfloat16(
                scores, weights, scratch + SCALES, scratch + ZEROS, own, vectors, seen, unseen,
                scale, cap,
            )  # fmt: skip
        else:
            decay = softmax.softmax_row(
                scores, weights, scratch + SCALES, scratch + ZEROS, own, vectors, seen, unseen,
                scale, cap,
            )  # fmt: skip
        if decay != np.float32(1.0):
            output = scratch + OUTPUTS + row * call.output_stride
            rows.store_float32(output, output, call.output_stride // 4, np.float32(0.0), decay)


@inner
def write_row(call, token, query_head, output, add, largest, total):  # type: ignore[no-untyped-def]
    """Write `(output + add) / total` of a row, with its sink, and its log-sum-exp.

    What was summed are rotated values; they are turned back here, once for each row, in place.
    """
    memory.keep_apart()
    decay = np.float32(1.0)
    if call.sinks:
        sink = memory.read_float(call.sinks + 4 * query_head) * _LOG2_E
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
    rotation.rotate(output, call.dims)
    # What is added to all dims alike is the same before and after.
    unit = rotation.unit(call.dims)
    add, factor = add / unit, factor * unit
    if call.number == BFLOAT16:
        rows.store_bfloat16(output, to, call.dims, add, factor)
    elif call.number == FLOAT16:
        rows.store_float16(output, to, call.dims, add, factor)
    else:
        rows.store_float32(output, to, call.dims, add, factor)
    if call.lse:
        memory.write_float(
            call.lse + token * call.lse_token_stride + query_head * call.lse_head_stride, lse
        )


@inner
def _record(call, row, head):  # type: ignore[no-untyped-def]
    """Return the address of a row's partial sums: its outputs, then two numbers."""
    return call.partials + (row * call.num_kv_heads + head) * (call.output_stride + 64)


@inner
def _merge(call, merge, head, scratch):  # type: ignore[no-untyped-def]
    """Merge the parts of an item's rows and write the results."""
    memory.keep_apart()
    whole = item_at(call, merge[MERGE_ITEM])
    merged = scratch + OUTPUTS
    for row in range(whole[ROWS]):
        largest = np.float32(-np.inf)
        for part in range(merge[MERGE_PARTS]):
            record = _record(call, whole[PARTIAL] + part * whole[ROWS] + row, head)
            largest = max(largest, memory.read_float(record + call.output_stride))
        rows.fill(merged, call.output_stride // 64)
        total = np.float32(0.0)
        for part in range(merge[MERGE_PARTS]):
            record = _record(call, whole[PARTIAL] + part * whole[ROWS] + row, head)
            of_part = memory.read_float(record + call.output_stride + 4)
            if of_part != np.float32(0.0):
                decay = np.exp2(memory.read_float(record + call.output_stride) - largest)
                total += np.float32(decay) * of_part
                rows.add_scaled(merged, record, call.dims, np.float32(decay))
        token, query_head = query_of_row(call, whole, head, row)
        write_row(call, token, query_head, merged, np.float32(0.0), largest, total)


@inner
def finish(call, item, head, scratch, state):  # type: ignore[no-untyped-def]
    """Write an item's results, or leave its part and merge when it was the last one."""
    memory.keep_apart()
    for row in range(item[ROWS]):
        output = scratch + OUTPUTS + row * call.output_stride
        largest, total, add = state[row, 0], state[row, 1], state[row, 2]
        if item[PARTIAL] < 0:
            token, query_head = query_of_row(call, item, head, row)
            write_row(call, token, query_head, output, add, largest, total)
        else:
            record = _record(call, item[PARTIAL] + row, head)
            rows.store_float32(output, record, call.dims, add, np.float32(1.0))
            memory.write_float(record + call.output_stride, largest)
            memory.write_float(record + call.output_stride + 4, total)
    if item[PARTIAL] >= 0:
        merge = numba.carray(
            memory.rows_at(call.merges + 8 * MERGE_COLUMNS * item[MERGE]), MERGE_COLUMNS
        )
        done = call.counters + 8 * (1 + item[MERGE] * call.num_kv_heads + head)
        if memory.take_next(done) == merge[MERGE_PARTS] - 1:
            _merge(call, merge, head, scratch)
