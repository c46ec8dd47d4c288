# SPDX-License-Identifier: Apache-2.0
"""One work item around the products: find pages, weigh scores, merge parts, write results.

A work item is a block of rows (query tokens times the heads of one KV head's group) against a
range of keys. It processes the keys in chunks; after each, every row holds the online softmax of
the keys up to there. An item with only a part of its rows' keys writes partial sums. The thread
that finishes the last part merges them in the order of the parts, so that the result does not
depend on which thread was first.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from vllm_hybrid_kv.kernels.cpu import memory, records, rotation, row_ops, softmax
from vllm_hybrid_kv.kernels.cpu.records import SCORE_STRIDE, TILE

_LOG2_E = np.float32(softmax.LOG2_E)
_LN_2 = np.float32(math.log(2.0))

inner = numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, error_model="numpy")
"""Compile a function that only other compiled functions call."""


@inner
def item_at(call, index):  # type: ignore[no-untyped-def]
    """Return an item of the call's plan."""
    return records.item_at(call.items + records.ITEM_BYTES * index)


@inner
def visible_keys(call, item, row):  # type: ignore[no-untyped-def]
    """Return the first token that a row of an item sees and the one after the last."""
    token = (item.first_row + row) // call.group
    position = item.length - item.query_length + token
    first, last = np.int64(0), item.length
    if call.causal:
        last = min(last, position + 1)
    if call.window > 0:
        first = max(first, position - call.window + 1)
        last = min(last, position + call.window)
    return first, last


@inner
def keys_of_item(call, item):  # type: ignore[no-untyped-def]
    """Return the first token that any row of an item sees, rounded down to a tile, and the end."""
    first, _ = visible_keys(call, item, np.int64(0))
    _, last = visible_keys(call, item, item.rows - 1)
    first = max(first, item.first_key)
    return first // TILE * TILE, min(last, item.last_key)


@inner
def query_of_row(call, item, head, row):  # type: ignore[no-untyped-def]
    """Return a row's token in the batch and its query head."""
    token, of_group = divmod(item.first_row + row, call.group)
    return item.query_start + token, head * call.group + of_group


@inner
def begin(call, item, head, scratch, state, stride, widen):  # type: ignore[no-untyped-def]
    """Load an item's queries to rows `stride` bytes apart, and clear its sums.

    The rows become float32 if `widen`; otherwise they are bf16 and stay bf16.
    """
    memory.noinline()
    for row in range(item.rows):
        token, query_head = query_of_row(call, item, head, row)
        source = call.query + token * call.query_token_stride + query_head * call.query_head_stride
        to = scratch + records.QUERIES_AT + row * stride
        if widen:
            row_ops.widen_row(call.dtype_code, source, to, call.dims)
        else:
            row_ops.copy_bfloat16(source, to, call.dims)
        state[row].largest = -np.inf
        state[row].total = np.float32(0.0)
        state[row].offset = np.float32(0.0)
    row_ops.clear_lines(scratch + records.OUTPUTS_AT, item.rows * (call.output_stride // 64))


@inner
def next_chunk(first, chunk):  # type: ignore[no-untyped-def]
    """Return the next multiple of `chunk` after token `first`.

    Chunks always end at the same tokens, so that a row's sums do not depend on how its request's
    prefill was divided.
    """
    return (first // chunk + 1) * chunk


@inner
def tiles_of_chunk(first, last, chunk):  # type: ignore[no-untyped-def]
    """Return how many tiles the chunk from token `first` on has before `last`."""
    tokens = min(last, next_chunk(first, chunk)) - first
    return (max(tokens, np.int64(0)) + TILE - 1) // TILE


@inner
def find_tiles(call, item, head, first, count, tiles):  # type: ignore[no-untyped-def]
    """Write the addresses of `count` tiles from token `first` on to `tiles`."""
    memory.noinline()
    table = call.block_table + item.request * call.block_table_stride
    for i in range(count):
        page, token = divmod(first + TILE * i, call.page_size)
        block = memory.load_int32(table + 4 * page)
        region = call.cache + block * call.block_stride + head * call.head_bytes
        tiles[i].keys = region + token * call.dims
        tiles[i].values = region + call.value_offset + token * call.dims // 2
        tiles[i].scales = region + call.scale_offset + 2 * token
        tiles[i].zeros = region + call.zero_offset + 2 * token


@inner
def find_first_tiles(call, index, chunk, tiles):  # type: ignore[no-untyped-def]
    """Find the tiles of the first chunk of the item at an index, and return how many it has.

    0 if there is no such item.
    """
    memory.noinline()
    number, head = divmod(index, call.num_kv_heads)
    if number >= call.num_items:
        return np.int64(0)
    item = item_at(call, number)
    first, last = keys_of_item(call, item)
    count = tiles_of_chunk(first, last, chunk)
    find_tiles(call, item, head, first, count, tiles)
    return count


@inner
def load_scales(scratch, tiles, count, middle):  # type: ignore[no-untyped-def]
    """Write the scales of a chunk's tokens, and their values at the code `middle`, as float32."""
    for i in range(count):
        row_ops.widen_scales(
            tiles[i].scales,
            tiles[i].zeros,
            scratch + records.SCALES_AT + 64 * i,
            scratch + records.ZEROS_AT + 64 * i,
            np.float32(middle),
        )


@inner
def _vectors_of_line(weight_format):  # type: ignore[no-untyped-def]
    """Return how many vectors of 16 weights fill a cache line; products take so many at once."""
    if weight_format == softmax.LIMBS:
        return np.int64(4)
    return np.int64(2 if weight_format == softmax.BFLOATS else 1)


@inner
def weigh(call, item, scratch, state, first, count, key_scale, weight_format, ahead):  # type: ignore[no-untyped-def]
    """Turn a chunk's scores into weights, and rescale the outputs of rows whose maximum grew.

    With `softmax.LIMBS` the lower bytes of a weight are `item.rows` rows below the upper ones, and
    `ahead` is the address of the next chunk's tiles. The products prefetch all of them but a
    quarter of the keys and half of the values; the rows here prefetch these.
    """
    memory.noinline()
    scale = np.float32(call.scale * key_scale)
    cap = np.float32(call.soft_cap)
    if call.soft_cap <= 0.0:
        scale = np.float32(call.scale * key_scale * softmax.LOG2_E)
    per_line = _vectors_of_line(weight_format)
    lines = (count + per_line - 1) // per_line
    lower = item.rows * SCORE_STRIDE
    scales, zeros = scratch + records.SCALES_AT, scratch + records.ZEROS_AT
    for row in range(item.rows):
        seen, unseen = visible_keys(call, item, row)
        seen = max(seen - first, np.int64(0))
        unseen = min(min(unseen, item.last_key) - first, TILE * count)
        weights = scratch + records.WEIGHTS_AT + row * SCORE_STRIDE
        if unseen <= seen:
            if weight_format == softmax.LIMBS:
                # The factor of the integers, whatever they are.
                state[row].limb_factor = np.float32(0.0)
            else:
                row_ops.clear_lines(weights, lines)
            continue
        scores = scratch + records.SCORES_AT + row * SCORE_STRIDE
        own = state.ctypes.data + row * records.STATE_BYTES
        vectors = lines * per_line
        line = min(128 * row, 4 * call.dims - 128)
        decay = softmax.softmax_row(
            weight_format, scores, weights, scales, zeros, own, vectors, seen, unseen,
            scale, cap, lower, ahead, 12 * call.dims + line, line,
        )  # fmt: skip
        if decay != np.float32(1.0):
            output = scratch + records.OUTPUTS_AT + row * call.output_stride
            dims = call.output_stride // 4
            row_ops.store_row(records.FLOAT32, output, output, dims, np.float32(0.0), decay)


@inner
def _write_row(call, token, query_head, output, add, largest, total):  # type: ignore[no-untyped-def]
    """Write `(output + add) / total` of a row, with its sink, and its log-sum-exp.

    The sums are of rotated values; one rotation for each row, in place, rotates them back.
    """
    memory.noinline()
    decay = np.float32(1.0)
    if call.sinks:
        sink = memory.load_float32(call.sinks + 4 * query_head) * _LOG2_E
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
    # Rotation leaves a number that is added to all dims unchanged.
    unit = rotation.unit(call.dims)
    row_ops.store_row(call.dtype_code, output, to, call.dims, add / unit, factor * unit)
    if call.lse:
        memory.store_float32(
            call.lse + token * call.lse_token_stride + query_head * call.lse_head_stride, lse
        )


@inner
def _partial_sums(call, row, head):  # type: ignore[no-untyped-def]
    """Return the address of a row's partial sums: its outputs, largest score and total."""
    return call.partials + (row * call.num_kv_heads + head) * (call.output_stride + 64)


@inner
def _merge(call, merge, head, scratch):  # type: ignore[no-untyped-def]
    """Merge the parts of an item's rows and write the results."""
    memory.noinline()
    whole = item_at(call, merge.first_item)
    merged = scratch + records.OUTPUTS_AT
    for row in range(whole.rows):
        largest = np.float32(-np.inf)
        for part in range(merge.parts):
            sums = _partial_sums(call, whole.partial + part * whole.rows + row, head)
            largest = max(largest, memory.load_float32(sums + call.output_stride))
        row_ops.clear_lines(merged, call.output_stride // 64)
        total = np.float32(0.0)
        for part in range(merge.parts):
            sums = _partial_sums(call, whole.partial + part * whole.rows + row, head)
            total_of_part = memory.load_float32(sums + call.output_stride + 4)
            if total_of_part != np.float32(0.0):
                decay = np.exp2(memory.load_float32(sums + call.output_stride) - largest)
                total += np.float32(decay) * total_of_part
                row_ops.add_scaled(merged, sums, call.dims, np.float32(decay))
        token, query_head = query_of_row(call, whole, head, row)
        _write_row(call, token, query_head, merged, np.float32(0.0), largest, total)


@inner
def finish(call, item, head, scratch, state):  # type: ignore[no-untyped-def]
    """Write an item's results or its part, and merge the parts if this was the last one."""
    memory.noinline()
    for row in range(item.rows):
        output = scratch + records.OUTPUTS_AT + row * call.output_stride
        largest, total, add = state[row].largest, state[row].total, state[row].offset
        if item.partial < 0:
            token, query_head = query_of_row(call, item, head, row)
            _write_row(call, token, query_head, output, add, largest, total)
        else:
            sums = _partial_sums(call, item.partial + row, head)
            row_ops.store_row(records.FLOAT32, output, sums, call.dims, add, np.float32(1.0))
            memory.store_float32(sums + call.output_stride, largest)
            memory.store_float32(sums + call.output_stride + 4, total)
    if item.partial >= 0:
        merge = records.merge_at(call.merges + records.MERGE_BYTES * item.merge)
        finished = call.counters + 8 * (1 + item.merge * call.num_kv_heads + head)
        if memory.fetch_add(finished) == merge.parts - 1:
            _merge(call, merge, head, scratch)
