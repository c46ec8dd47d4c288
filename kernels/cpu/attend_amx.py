# SPDX-License-Identifier: Apache-2.0
"""Paged attention with AMX tile products, for bf16 queries and `CPU_TILED` pages.

Each tile of a chunk is widened once, to scratch memory that stays in the second-level cache, and
multiplied from there with every row of the block.
"""

from __future__ import annotations

import numpy as np

from . import amx, drive, fast, memory, widen
from .compile_cache import cached_callback

_FEW_ROWS = 16
_CHUNK_OF_FEW = 128
"""Tokens of a chunk for few rows; large enough to hide a chunk's fixed costs, small enough that
the next chunk, asked for ahead of time, still fits the first-level cache beside it."""

_CHUNK_OF_MANY = drive.CHUNK


@drive.inner
def _scores(call, item, scratch, found, ahead, tiles):  # type: ignore[no-untyped-def]
    memory.keep_apart()
    fast.widen_keys(call, scratch, found, ahead, tiles)
    steps = call.dims // 32
    stride = 2 * call.dims
    if item[drive.ROWS] <= _FEW_ROWS:
        for tile in range(0, tiles, 4):
            amx.scores_few(
                scratch + drive.QUERIES,
                stride,
                scratch + drive.KEYS + tile * steps * widen.OPERAND,
                steps,
                scratch + drive.SCORES + 64 * tile,
                drive.SCORE_STRIDE,
            )
        return
    for tile in range(0, tiles, 2):
        for row in range(0, item[drive.ROWS], 32):
            amx.scores_many(
                scratch + drive.QUERIES + row * stride,
                stride,
                scratch + drive.KEYS + tile * steps * widen.OPERAND,
                steps,
                scratch + drive.SCORES + row * drive.SCORE_STRIDE + 64 * tile,
                drive.SCORE_STRIDE,
            )


@drive.inner
def _outputs(call, item, scratch, found, ahead, tiles):  # type: ignore[no-untyped-def]
    memory.keep_apart()
    fast.widen_values(call, scratch, found, ahead, tiles)
    step_bytes = call.dims // 16 * widen.OPERAND
    steps = (tiles + 1) // 2
    if item[drive.ROWS] <= _FEW_ROWS:
        for dim in range(0, call.dims, 64):
            weights = scratch + drive.WEIGHTS
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
        return
    for dim in range(0, call.dims, 32):
        for row in range(0, item[drive.ROWS], 32):
            amx.outputs_many(
                scratch + drive.WEIGHTS + row * drive.SCORE_STRIDE,
                drive.SCORE_STRIDE,
                scratch + drive.VALUES + dim // 16 * widen.OPERAND,
                steps,
                step_bytes,
                scratch + drive.OUTPUTS + row * call.output_stride + 4 * dim,
                call.output_stride,
            )


@drive.inner
def _attend(call, item, head, scratch):  # type: ignore[no-untyped-def]
    state = np.empty((drive.ROW_BLOCK, 3), np.float32)
    found = np.empty((fast.TILES, 4), np.int64)
    ahead = np.empty((fast.TILES, 4), np.int64)
    drive.begin(call, item, head, scratch, state, 2 * call.dims)
    few = item[drive.ROWS] <= _FEW_ROWS
    chunk = np.int64(_CHUNK_OF_FEW if few else _CHUNK_OF_MANY)
    amx.configure(scratch + drive.CONFIGURATION, item[drive.ROWS] if few else np.int64(_FEW_ROWS))
    first, last = drive.keys_of_item(call, item, chunk)
    tiles = drive.tiles_of_chunk(first, last, chunk)
    drive.tile_addresses(call, item, head, first, tiles, found)
    while first < last:
        following = drive.tiles_of_chunk(first + chunk, last, chunk)
        drive.tile_addresses(call, item, head, first + chunk, following, ahead)
        fast.repeat_tiles(found, ahead, following, tiles)
        drive.load_scales(scratch, found, tiles, widen.MIDDLE_CODE)
        _scores(call, item, scratch, found, ahead, tiles)
        drive.weigh(call, item, scratch, state, first, tiles, 1.0, True)
        _outputs(call, item, scratch, found, ahead, tiles)
        found, ahead = ahead, found
        tiles = following
        first += chunk
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
