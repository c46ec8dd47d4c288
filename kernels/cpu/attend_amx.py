# SPDX-License-Identifier: Apache-2.0
"""Paged attention with AMX tile products, for bf16 queries and `CPU_TILED` pages.

Tiles are widened to scratch memory, a few at a time so that they stay in the first-level cache,
and multiplied from there with every row of the block.
"""

from __future__ import annotations

import numpy as np

from vllm_hybrid_kv.kernels.cpu import amx, drive, fast, memory, rows, softmax, widen
from vllm_hybrid_kv.kernels.cpu.compile_cache import cached_callback

_FEW_ROWS = 16
_STACKED_ROWS = 8
"""Most rows whose weights' upper and lower bytes make one tile operand."""

_KEY_DIMS = 128
"""Most dims of four key tiles that are widened at once: 16 KB, a third of the first-level cache."""


@drive.inner
def _scores_of_few(call, scratch, found, ahead, tiles):  # type: ignore[no-untyped-def]
    memory.keep_apart()
    for first in range(0, tiles, 4):
        for dim in range(0, call.dims, _KEY_DIMS):
            dims = min(np.int64(_KEY_DIMS), call.dims - dim)
            for tile in range(first, min(first + 4, tiles)):
                to = scratch + drive.KEYS + (tile - first) * (dims // 32) * widen.OPERAND
                soon = ahead[tile, 0] + 8 * dim
                widen.widen_keys_ask_half(found[tile, 0] + 16 * dim, to, dims, soon)
            amx.scores_few(
                scratch + drive.QUERIES + 2 * dim,
                2 * call.dims,
                scratch + drive.KEYS,
                dims // 32,
                scratch + drive.SCORES + 64 * first,
                drive.SCORE_STRIDE,
                dim,
                ahead.ctypes.data + widen.TILE_RECORD * first,
                8 * call.dims + 4 * dim,
            )


@drive.inner
def _scores_of_many(call, item, scratch, found, ahead, tiles):  # type: ignore[no-untyped-def]
    memory.keep_apart()
    steps = call.dims // 32
    stride = 2 * call.dims
    for tile in range(0, tiles, 2):
        fast.widen_keys(call, scratch, found, ahead, tile, min(tile + 2, tiles))
        scores = scratch + drive.SCORES + 64 * tile
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
def _outputs_of_few(call, item, scratch, state, found, ahead, tiles):  # type: ignore[no-untyped-def]
    """Add integer weights times codes, whose sums are exact, to the outputs."""
    memory.keep_apart()
    count = item[drive.ROWS]
    here, soon = found.ctypes.data, ahead.ctypes.data
    weights, codes = scratch + drive.WEIGHTS, scratch + drive.KEYS
    lower = count * drive.SCORE_STRIDE
    stacked = count <= _STACKED_ROWS
    sums = scratch + drive.VALUES
    lower_sums = sums + amx.SUMS_STRIDE * (count if stacked else _FEW_ROWS)
    steps = (tiles + 3) // 4
    dim = np.int64(0)
    while dim < call.dims:
        offset, ask = 8 * dim, 4 * call.dims + 4 * dim
        dims = np.int64(64 if stacked and dim + 64 <= call.dims else 32)
        if dims == 64:
            widen.split_values_64(here, tiles, offset, codes, soon, ask)
            amx.sums_of_codes_64(weights, drive.SCORE_STRIDE, lower, codes, steps, sums, lower_sums)
        else:
            widen.split_values_32(here, tiles, offset, codes, soon, ask)
            if stacked:
                amx.sums_of_codes_32(
                    weights, drive.SCORE_STRIDE, lower, codes, steps, sums, lower_sums
                )
            else:
                amx.sums_of_codes_32_apart(
                    weights, drive.SCORE_STRIDE, lower, codes, steps, sums, lower_sums
                )
        for row in range(count):
            rows.add_limbs(
                scratch + drive.OUTPUTS + row * call.output_stride + 4 * dim,
                sums + amx.SUMS_STRIDE * row,
                lower_sums + amx.SUMS_STRIDE * row,
                dims // 16,
                state[row, 3],
            )
        dim += dims


@drive.inner
def _outputs_of_many(call, item, scratch, tiles):  # type: ignore[no-untyped-def]
    memory.keep_apart()
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
def _attend(call, index, scratch):  # type: ignore[no-untyped-def]
    """Attend for the item with a number, and return the number of the next one.

    That is taken when this one's last chunk begins, so that its first chunk can be asked for.
    """
    number, head = divmod(index, call.num_kv_heads)
    item = drive.item_at(call, number)
    index_ahead = np.int64(-1)
    state = np.empty((drive.ROW_BLOCK, drive.STATE_NUMBERS), np.float32)
    found = np.zeros((fast.TILES, 4), np.int64)
    ahead = np.zeros((fast.TILES, 4), np.int64)
    drive.begin(call, item, head, scratch, state, 2 * call.dims)
    # Of all rows of the request: those left over in its last item are computed as all others.
    few = item[drive.QUERY_LENGTH] * call.group <= _FEW_ROWS
    chunk = np.int64(drive.CHUNK)
    stacked = few and item[drive.ROWS] <= _STACKED_ROWS
    lines = 2 * item[drive.ROWS] if stacked else np.int64(_FEW_ROWS)
    amx.configure(scratch + drive.CONFIGURATION, lines)
    first, last = drive.keys_of_item(call, item)
    tiles = drive.tiles_of_chunk(first, last, chunk)
    drive.tile_addresses(call, item, head, first, tiles, found)
    while first < last:
        first_ahead = drive.next_chunk(first, chunk)
        following, index_ahead = fast.look_ahead(call, item, head, first_ahead, last, chunk, ahead)
        fast.repeat_tiles(found, ahead, following, tiles)
        drive.load_scales(scratch, found, tiles, widen.MIDDLE_CODE)
        if few:
            _scores_of_few(call, scratch, found, ahead, tiles)
            soon = ahead.ctypes.data
            drive.weigh(call, item, scratch, state, first, tiles, 1.0, softmax.LIMBS, soon)
            _outputs_of_few(call, item, scratch, state, found, ahead, tiles)
        else:
            _scores_of_many(call, item, scratch, found, ahead, tiles)
            drive.weigh(call, item, scratch, state, first, tiles, 1.0, softmax.BFLOATS, 0)
            fast.widen_values(call, scratch, found, ahead, tiles)
            _outputs_of_many(call, item, scratch, tiles)
        found, ahead = ahead, found
        tiles = following
        first = first_ahead
    drive.finish(call, item, head, scratch, state)
    return memory.take_next(call.counters) if index_ahead < 0 else index_ahead


@cached_callback
def work(call_address, scratch):  # type: ignore[no-untyped-def]
    """Work off items of a call until none is left; both arguments are addresses."""
    call = memory.call_at(call_address)
    count = call.num_items * call.num_kv_heads
    index = memory.take_next(call.counters)
    while index < count:
        index = _attend(call, index, scratch)
    amx.release(scratch)
