# SPDX-License-Identifier: Apache-2.0
"""Paged attention in float32 on any CPU."""

from __future__ import annotations

import numpy as np

from vllm_hybrid_kv.kernels.cpu import drive, memory, portable, softmax
from vllm_hybrid_kv.kernels.cpu.compile_cache import cached_callback

_CHUNK = 64
_TILES = _CHUNK // drive.TILE
_QUERY_STRIDE = 4 * drive.MAX_DIMS


@drive.inner
def _scores(call, item, scratch, found, tiles):  # type: ignore[no-untyped-def]
    memory.keep_apart()
    keys = scratch + drive.KEYS
    for first in range(0, tiles, 2):
        for tile in range(first, min(first + 2, tiles)):
            to = keys + 4 * drive.TILE * (tile - first)
            if call.tiled:
                portable.decode_tiled_keys(found[tile, 0], to, call.dims)
            else:
                portable.decode_linear_keys(found[tile, 0], to, call.dims)
        row = 0
        while row < item[drive.ROWS]:
            queries = scratch + drive.QUERIES + row * _QUERY_STRIDE
            scores = scratch + drive.SCORES + row * drive.SCORE_STRIDE + 4 * drive.TILE * first
            left = item[drive.ROWS] - row
            if left >= 4:
                portable.dot_four(
                    queries, _QUERY_STRIDE, keys, call.dims, scores, drive.SCORE_STRIDE
                )
                row += 4
            elif left >= 2:
                portable.dot_two(
                    queries, _QUERY_STRIDE, keys, call.dims, scores, drive.SCORE_STRIDE
                )
                row += 2
            else:
                portable.dot_one(
                    queries, _QUERY_STRIDE, keys, call.dims, scores, drive.SCORE_STRIDE
                )
                row += 1


@drive.inner
def _accumulate(call, item, scratch, found, tiles):  # type: ignore[no-untyped-def]
    memory.keep_apart()
    values = scratch + drive.VALUES
    for tile in range(tiles):
        to = values + tile * drive.TILE * call.output_stride
        if call.tiled:
            portable.decode_tiled_values(found[tile, 1], to, call.dims)
        else:
            portable.decode_linear_values(found[tile, 1], to, call.dims, call.output_stride)
    tokens = drive.TILE * tiles
    row = 0
    while row < item[drive.ROWS]:
        weights = scratch + drive.WEIGHTS + row * drive.SCORE_STRIDE
        outputs = scratch + drive.OUTPUTS + row * call.output_stride
        left = item[drive.ROWS] - row
        if left >= 4:
            portable.accumulate_four(
                weights, drive.SCORE_STRIDE, values, tokens, outputs, call.output_stride
            )
            row += 4
        elif left >= 2:
            portable.accumulate_two(
                weights, drive.SCORE_STRIDE, values, tokens, outputs, call.output_stride
            )
            row += 2
        else:
            portable.accumulate_one(
                weights, drive.SCORE_STRIDE, values, tokens, outputs, call.output_stride
            )
            row += 1


@drive.inner
def _attend(call, item, head, scratch):  # type: ignore[no-untyped-def]
    state = np.empty((drive.ROW_BLOCK, drive.STATE_NUMBERS), np.float32)
    found = np.empty((_TILES, 4), np.int64)
    drive.begin(call, item, head, scratch, state, _QUERY_STRIDE)
    first, last = drive.keys_of_item(call, item)
    while first < last:
        tiles = drive.tiles_of_chunk(first, last, np.int64(_CHUNK))
        drive.tile_addresses(call, item, head, first, tiles, found)
        drive.load_scales(scratch, found, tiles, 0.0)
        _scores(call, item, scratch, found, tiles)
        drive.weigh(call, item, scratch, state, first, tiles, portable.KEY_SCALE, softmax.FLOATS, 0)
        _accumulate(call, item, scratch, found, tiles)
        first = drive.next_chunk(first, np.int64(_CHUNK))
    drive.finish(call, item, head, scratch, state)


@cached_callback
def work(call_address, scratch):  # type: ignore[no-untyped-def]
    """Work off items of a call until none is left; both arguments are addresses."""
    call = memory.call_at(call_address)
    count = call.num_items * call.num_kv_heads
    index = memory.take_next(call.counters)
    while index < count:
        item, head = divmod(index, call.num_kv_heads)
        _attend(call, drive.item_at(call, item), head, scratch)
        index = memory.take_next(call.counters)
