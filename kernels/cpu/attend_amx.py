# SPDX-License-Identifier: Apache-2.0
"""Paged attention with AMX tile products, for bf16 queries and `CPU_TILED` pages.

Tiles are widened to scratch memory, a few at a time so that they stay in the first-level cache,
and multiplied from there with every row of the block.
"""

from __future__ import annotations

import numpy as np

from . import amx, drive, fast, memory, widen
from .compile_cache import cached_callback

_FEW_ROWS = 16

_VALUE_TILES = 4
"""Value tiles that few rows take at once: widened, they and the outputs fit the first-level
cache; fewer would load and store the outputs more often."""


@drive.inner
def _scores(call, item, scratch, found, ahead, tiles):  # type: ignore[no-untyped-def]
    memory.keep_apart()
    steps = call.dims // 32
    stride = 2 * call.dims
    few = item[drive.ROWS] <= _FEW_ROWS
    at_once = 4 if few else 2
    for tile in range(0, tiles, at_once):
        fast.widen_keys(call, scratch, found, ahead, tile, min(tile + at_once, tiles))
        scores = scratch + drive.SCORES + 64 * tile
        if few:
            amx.scores_few(
                scratch + drive.QUERIES, stride, scratch + drive.KEYS, steps, scores,
                drive.SCORE_STRIDE,
            )  # fmt: skip
            continue
        for row in range(0, item[drive.ROWS], 32):
            amx.scores_many(
                scratch + drive.QUERIES + row * stride,
                stride,
                scratch + drive.KEYS,
                steps,
                scores + row * drive.SCORE_STRIDE,
                drive.SCORE_STRIDE,
            )


@drive.inner
def _outputs_of_few(call, scratch, first, last):  # type: ignore[no-untyped-def]
    step_bytes = call.dims // 16 * widen.OPERAND
    steps = (last - first + 1) // 2
    weights = scratch + drive.WEIGHTS + 32 * first
    for dim in range(0, call.dims, 64):
        values = scratch + drive.VALUES + dim // 16 * widen.OPERAND
        outputs = scratch + drive.OUTPUTS + 4 * dim
        if dim + 64 <= call.dims:
            amx.outputs_few(
                weights, drive.SCORE_STRIDE, values, steps, step_bytes, outputs,
                call.output_stride,
            )  # fmt: skip
        else:
            amx.outputs_few_last(
                weights, drive.SCORE_STRIDE, values, steps, step_bytes, outputs,
                call.output_stride,
            )  # fmt: skip


@drive.inner
def _outputs_of_many(call, item, scratch, tiles):  # type: ignore[no-untyped-def]
    for dim in range(0, call.dims, 32):
        for row in range(0, item[drive.ROWS], 32):
            amx.outputs_many(
                scratch + drive.WEIGHTS + row * drive.SCORE_STRIDE,
                drive.SCORE_STRIDE,
                scratch + drive.VALUES + dim // 16 * widen.OPERAND,
                (tiles + 1) // 2,
                call.dims // 16 * widen.OPERAND,
                scratch + drive.OUTPUTS + row * call.output_stride + 4 * dim,
                call.output_stride,
            )


@drive.inner
def _outputs(call, item, scratch, found, ahead, tiles):  # type: ignore[no-untyped-def]
    memory.keep_apart()
    if item[drive.ROWS] <= _FEW_ROWS:
        for tile in range(0, tiles, _VALUE_TILES):
            last = min(tile + _VALUE_TILES, tiles)
            fast.widen_values(call, scratch, found, ahead, tile, last)
            _outputs_of_few(call, scratch, tile, last)
    else:
        fast.widen_values(call, scratch, found, ahead, 0, tiles)
        _outputs_of_many(call, item, scratch, tiles)


@drive.inner
def _attend(call, item, head, scratch):  # type: ignore[no-untyped-def]
    state = np.empty((drive.ROW_BLOCK, 3), np.float32)
    found = np.empty((fast.TILES, 4), np.int64)
    ahead = np.empty((fast.TILES, 4), np.int64)
    drive.begin(call, item, head, scratch, state, 2 * call.dims)
    few = item[drive.ROWS] <= _FEW_ROWS
    chunk = np.int64(drive.CHUNK)
    amx.configure(scratch + drive.CONFIGURATION, item[drive.ROWS] if few else np.int64(_FEW_ROWS))
    first, last = drive.keys_of_item(call, item)
    tiles = drive.tiles_of_chunk(first, last, chunk)
    drive.tile_addresses(call, item, head, first, tiles, found)
    while first < last:
        first_ahead = drive.next_chunk(first, chunk)
        following = drive.tiles_of_chunk(first_ahead, last, chunk)
        drive.tile_addresses(call, item, head, first_ahead, following, ahead)
        fast.repeat_tiles(found, ahead, following, tiles)
        drive.load_scales(scratch, found, tiles, widen.MIDDLE_CODE)
        _scores(call, item, scratch, found, ahead, tiles)
        drive.weigh(call, item, scratch, state, first, tiles, 1.0, True)
        _outputs(call, item, scratch, found, ahead, tiles)
        found, ahead = ahead, found
        tiles = following
        first = first_ahead
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
    amx.release(scratch)
