# SPDX-License-Identifier: Apache-2.0
"""Process a work item, except for its products: find pages, weigh scores, merge, write results.

A work item is a block of rows (query tokens times the heads of one KV head's group) against a
range of keys. It processes the keys in chunks. An item with only a part of its rows' keys writes
partial sums. The thread that finishes the last part merges all parts in their order, so the result
does not depend on which thread was first.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

from vllm_hybrid_kv.kernels.cpu import encode, inline, records, rotation, row_ops, softmax
from vllm_hybrid_kv.kernels.cpu.records import TILE

_LOG2_E = np.float32(softmax.LOG2_E)
_LN_2 = np.float32(math.log(2.0))

_TILES = records.CHUNK // TILE
"""Maximum tiles of a chunk."""

inner = numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, error_model="numpy")
"""Compile a function that only other compiled functions call."""


@inner
def _visible_keys(call, item, row):  # type: ignore[no-untyped-def]
    """Return the first token that a row of an item sees, and the token after the last one."""
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
def _keys_of_item(call, item):  # type: ignore[no-untyped-def]
    """Return the range of tokens that any row of an item sees, its start rounded down to a tile."""
    first, _ = _visible_keys(call, item, np.int64(0))
    _, last = _visible_keys(call, item, item.rows - 1)
    first = max(first, item.first_key)
    return first // TILE * TILE, min(last, item.last_key)


@inner
def _query_of_row(call, item, head, row):  # type: ignore[no-untyped-def]
    """Return a row's token in the batch and its query head."""
    token, of_group = divmod(item.first_row + row, call.group)
    return item.query_start + token, head * call.group + of_group


@inner
def query_stride(call, words):  # type: ignore[no-untyped-def]
    """Return the size of a row of query codes (bytes or words), padded to a multiple of 64 dims."""
    return (call.dims + 63) // 64 * (128 if words else 64)


@inner
def _begin(call, item, head, scratch, state, words):  # type: ignore[no-untyped-def]
    """Write the codes of an item's queries, and clear its sums."""
    inline.noinline()
    row_at = scratch + records.TEMPORARY_AT
    stride = query_stride(call, words)
    row_ops.clear_lines(scratch + records.QUERIES_AT, item.rows * (stride // 64))
    for row in range(item.rows):
        token, query_head = _query_of_row(call, item, head, row)
        source = call.query + token * call.query_token_stride + query_head * call.query_head_stride
        row_ops.widen_row(call.dtype_code, source, row_at, call.dims, 0)
        largest = row_at + encode.ROW_BYTES
        rotation.rotate_and_measure(row_at, call.dims, largest)
        to = scratch + records.QUERIES_AT + row * stride
        own = state.ctypes.data + row * records.STATE_BYTES
        encode.encode_query(words, row_at, call.dims, largest, np.float32(call.unit), to, own)
        state[row].largest = -np.inf
        state[row].total = np.float32(0.0)
        state[row].offset = np.float32(0.0)
    row_ops.clear_lines(scratch + records.OUTPUTS_AT, item.rows * (call.output_stride // 64))


@inner
def _next_chunk(first):  # type: ignore[no-untyped-def]
    """Return the first token of the chunk that follows the chunk with token `first`.

    Chunks always end at the same tokens, so that a row's sums do not depend on how its request's
    prefill was divided.
    """
    return (first // records.CHUNK + 1) * records.CHUNK


@inner
def _find_tiles(call, item, head, first, last, tiles):  # type: ignore[no-untyped-def]
    """Write the addresses of a chunk's tiles, from token `first` up to `last`; return how many."""
    inline.noinline()
    tokens = min(last, _next_chunk(first)) - first
    count = (max(tokens, np.int64(0)) + TILE - 1) // TILE
    table = call.block_table + item.request * call.block_table_stride
    plane = call.page_size * call.dims
    head_bytes = plane + plane // 2 + 4 * call.page_size
    for i in range(count):
        page, token = divmod(first + TILE * i, call.page_size)
        block = inline.load_int32(table + 4 * page)
        region = call.cache + block * call.block_stride + head * head_bytes
        tiles[i].keys = region + token * call.dims
        tiles[i].values = region + plane + token * call.dims // 2
        tiles[i].key_scales = region + plane + plane // 2 + 2 * token
        tiles[i].value_scales = tiles[i].key_scales + 2 * call.page_size
    return count


@inner
def _find_next_tiles(call, item, head, first_ahead, last, ahead):  # type: ignore[no-untyped-def]
    """Find the tiles to prefetch during a chunk: those from token `first_ahead` on.

    During the item's last chunk, take the thread's next item and find the tiles of its first chunk.
    Returns how many tiles there are, and the index of the next item, or -1 if none was taken.
    """
    if first_ahead < last:
        return _find_tiles(call, item, head, first_ahead, last, ahead), np.int64(-1)
    index = inline.fetch_add(call.counters)
    number, head = divmod(index, call.num_kv_heads)
    if number >= call.num_items:
        return np.int64(0), index
    item = records.item_at(call.items + records.ITEM_BYTES * number)
    first, last = _keys_of_item(call, item)
    return _find_tiles(call, item, head, first, last, ahead), index


@inner
def _no_setup(item, scratch):  # type: ignore[no-untyped-def]
    pass


def item_loop(attend_chunk: Any, setup: Any = _no_setup, words: int = 0) -> Any:
    """Return a function that processes a call's items, chunk by chunk, until none is left.

    Args:
        attend_chunk: Adds a chunk of `count` tiles, from token `first` on, to the rows' sums.
            `ahead` are the next chunk's tiles, to prefetch. Both lists are padded to a multiple of
            four with tiles that get no weight.
        setup: Called before an item's first chunk.
        words: 1 if query codes are words, 0 if bytes; see `encode_query`.
    """

    @inner
    def attend(call, index, scratch):  # type: ignore[no-untyped-def]
        """Process the item at an index, and return the index of the next item."""
        number, head = divmod(index, call.num_kv_heads)
        item = records.item_at(call.items + records.ITEM_BYTES * number)
        index_ahead = np.int64(-1)
        state = np.empty(records.ROW_BLOCK, records.ROW_STATE)
        tiles = np.zeros(_TILES, records.TILE_ADDRESSES)
        ahead = np.zeros(_TILES, records.TILE_ADDRESSES)
        _begin(call, item, head, scratch, state, words)
        setup(item, scratch)
        first, last = _keys_of_item(call, item)
        count = _find_tiles(call, item, head, first, last, tiles)
        while first < last:
            first_ahead = _next_chunk(first)
            count_ahead, index_ahead = _find_next_tiles(call, item, head, first_ahead, last, ahead)
            filled = (count + 3) // 4 * 4
            for i in range(count, filled):
                tiles[i] = tiles[count - 1]
            # Each tile prefetches one of the next tiles, or itself if there are fewer next tiles.
            for i in range(count_ahead, filled):
                ahead[i] = tiles[i]
            for i in range(count):
                tile = tiles.ctypes.data + records.TILE_RECORD * i
                row_ops.widen_scales(tile, scratch + 64 * i)
                inline.prefetch(0, ahead[i].key_scales, 2 * TILE)
                inline.prefetch(0, ahead[i].value_scales, 2 * TILE)
            attend_chunk(call, item, scratch, state, first, tiles, ahead, count)
            tiles, ahead = ahead, tiles
            count = count_ahead
            first = first_ahead
        _finish(call, item, head, scratch, state)
        return inline.fetch_add(call.counters) if index_ahead < 0 else index_ahead

    @inner
    def attend_to_all(call, scratch):  # type: ignore[no-untyped-def]
        index = inline.fetch_add(call.counters)
        while index < call.num_items * call.num_kv_heads:
            index = attend(call, index, scratch)

    return attend_to_all


def weigher(weight_format: int) -> Any:
    """Return a function that turns a chunk's scores into weights.

    The function also rescales the outputs of rows whose maximum grew. With `softmax.LIMBS`, the
    lower bytes of a row's weights are `lower` bytes after the upper ones.
    """

    @inner
    def weigh(call, item, scratch, state, first, count, lower):  # type: ignore[no-untyped-def]
        inline.noinline()
        scale = np.float32(call.scale)
        cap = np.float32(call.soft_cap)
        if call.soft_cap <= 0.0:
            scale = np.float32(call.scale * softmax.LOG2_E)
        vectors = (count + weight_format - 1) // weight_format * weight_format
        for row in range(item.rows):
            seen, unseen = _visible_keys(call, item, row)
            seen = max(seen - first, np.int64(0))
            unseen = min(min(unseen, item.last_key) - first, TILE * count)
            if unseen <= seen:
                # The row sees no token of this chunk. Its weights in the buffer are those of an
                # earlier chunk, so scale them by 0.
                state[row].weight_step = np.float32(0.0)
                continue
            own = state.ctypes.data + row * records.STATE_BYTES
            decay = softmax.softmax_row(
                weight_format, scratch, row, own, vectors, seen, unseen, scale, cap, lower
            )
            if decay != np.float32(1.0):
                output = scratch + records.OUTPUTS_AT + row * call.output_stride
                dims = call.output_stride // 4
                row_ops.store_row(records.FLOAT32, output, output, dims, np.float32(0.0), decay)

    return weigh


@inner
def _write_row(call, item, head, row, output, add, largest, total):  # type: ignore[no-untyped-def]
    """Write a row's result `(output + add) / total` and its log-sum-exp, both with the sink.

    The output sums rotated values, so each row is rotated back, in place.
    """
    inline.noinline()
    token, query_head = _query_of_row(call, item, head, row)
    decay = np.float32(1.0)
    if call.sinks:
        sink = inline.load_float32(call.sinks + 4 * query_head) * _LOG2_E
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
    row_ops.store_row(records.FLOAT32, output, output, call.dims, add, factor)
    rotation.rotate(output, call.dims)
    unit = np.float32(call.unit)
    row_ops.store_row(call.dtype_code, output, to, call.dims, np.float32(0.0), unit)
    if call.lse:
        inline.store_float32(
            call.lse + token * call.lse_token_stride + query_head * call.lse_head_stride, lse
        )


@inner
def _partial_sums(call, row, head):  # type: ignore[no-untyped-def]
    """Return the address of a row's partial sums: its outputs, largest score and total."""
    return call.partials + (row * call.num_kv_heads + head) * (call.output_stride + 64)


@inner
def _merge(call, item, head, scratch):  # type: ignore[no-untyped-def]
    inline.noinline()
    merged = scratch + records.OUTPUTS_AT
    for row in range(item.rows):
        largest = np.float32(-np.inf)
        for part in range(item.parts):
            sums = _partial_sums(call, item.first_partial + part * item.rows + row, head)
            largest = max(largest, inline.load_float32(sums + call.output_stride))
        row_ops.clear_lines(merged, call.output_stride // 64)
        total = np.float32(0.0)
        for part in range(item.parts):
            sums = _partial_sums(call, item.first_partial + part * item.rows + row, head)
            total_of_part = inline.load_float32(sums + call.output_stride + 4)
            if total_of_part != np.float32(0.0):
                decay = np.exp2(inline.load_float32(sums + call.output_stride) - largest)
                total += np.float32(decay) * total_of_part
                row_ops.add_scaled(merged, sums, call.dims, np.float32(decay))
        _write_row(call, item, head, row, merged, np.float32(0.0), largest, total)


@inner
def _finish(call, item, head, scratch, state):  # type: ignore[no-untyped-def]
    """Write an item's results. A part writes partial sums, and the last part merges all parts."""
    inline.noinline()
    for row in range(item.rows):
        output = scratch + records.OUTPUTS_AT + row * call.output_stride
        largest, total, add = state[row].largest, state[row].total, state[row].offset
        if item.parts == 1:
            _write_row(call, item, head, row, output, add, largest, total)
        else:
            sums = _partial_sums(call, item.partial + row, head)
            row_ops.store_row(records.FLOAT32, output, sums, call.dims, add, np.float32(1.0))
            inline.store_float32(sums + call.output_stride, largest)
            inline.store_float32(sums + call.output_stride + 4, total)
    if item.parts > 1:
        finished = call.counters + 8 * (1 + item.divided * call.num_kv_heads + head)
        if inline.fetch_add(finished) == item.parts - 1:
            _merge(call, item, head, scratch)
