# SPDX-License-Identifier: Apache-2.0
"""Paged attention with the AVX-512 BF16 dot product, for bf16 queries and `CPU_TILED` pages."""

from __future__ import annotations

import numpy as np

from vllm_hybrid_kv.kernels.cpu import avx512, drive, fast, memory, softmax, widen
from vllm_hybrid_kv.kernels.cpu.compile_cache import cached_callback

_FEW_ROWS = 8
"""Most rows that are multiplied straight from the page; for more it is widened first."""

_CHUNK_OF_FEW = 64
_CHUNK_OF_MANY = drive.CHUNK


@drive.inner
def _scores_of_few(call, item, scratch, found, ahead, tiles):  # type: ignore[no-untyped-def]
    memory.keep_apart()
    count = item[drive.ROWS]
    queries = scratch + drive.QUERIES
    for tile in range(0, tiles, 2):
        here = found.ctypes.data + widen.TILE_RECORD * tile
        soon = ahead.ctypes.data + widen.TILE_RECORD * tile
        scores = scratch + drive.SCORES + 64 * tile
        if count > 4:
            avx512.scores_of_page_8(here, soon, queries, call.dims, scores, drive.SCORE_STRIDE)
        elif count > 2:
            avx512.scores_of_page_4(here, soon, queries, call.dims, scores, drive.SCORE_STRIDE)
        elif count > 1:
            avx512.scores_of_page_2(here, soon, queries, call.dims, scores, drive.SCORE_STRIDE)
        else:
            avx512.scores_of_page_1(here, soon, queries, call.dims, scores, drive.SCORE_STRIDE)


@drive.inner
def _outputs_of_few(call, item, scratch, found, ahead, tiles):  # type: ignore[no-untyped-def]
    memory.keep_apart()
    count = item[drive.ROWS]
    here, soon = found.ctypes.data, ahead.ctypes.data
    weights, outputs = scratch + drive.WEIGHTS, scratch + drive.OUTPUTS
    for chunk in range(call.dims // 32):
        if count > 4:
            avx512.outputs_of_page_8(
                here, tiles, chunk, soon, weights, drive.SCORE_STRIDE, outputs, call.output_stride
            )
        elif count > 2:
            avx512.outputs_of_page_4(
                here, tiles, chunk, soon, weights, drive.SCORE_STRIDE, outputs, call.output_stride
            )
        elif count > 1:
            avx512.outputs_of_page_2(
                here, tiles, chunk, soon, weights, drive.SCORE_STRIDE, outputs, call.output_stride
            )
        else:
            avx512.outputs_of_page_1(
                here, tiles, chunk, soon, weights, drive.SCORE_STRIDE, outputs, call.output_stride
            )


@drive.inner
def _scores_of_many(call, item, scratch, found, ahead, tiles):  # type: ignore[no-untyped-def]
    memory.keep_apart()
    for tile in range(0, tiles, 2):
        fast.widen_keys(call, scratch, found, ahead, tile, min(tile + 2, tiles))
        for row in range(0, item[drive.ROWS], 8):
            avx512.scores_widened(
                scratch + drive.KEYS,
                scratch + drive.QUERIES + row * 2 * call.dims,
                call.dims,
                scratch + drive.SCORES + row * drive.SCORE_STRIDE + 64 * tile,
                drive.SCORE_STRIDE,
            )


@drive.inner
def _outputs_of_many(call, item, scratch, found, ahead, tiles):  # type: ignore[no-untyped-def]
    memory.keep_apart()
    fast.widen_values(call, scratch, found, ahead, tiles)
    for chunk in range(call.dims // 32):
        for row in range(0, item[drive.ROWS], 8):
            avx512.outputs_widened(
                scratch + drive.VALUES,
                tiles,
                chunk,
                call.dims,
                scratch + drive.WEIGHTS + row * drive.SCORE_STRIDE,
                drive.SCORE_STRIDE,
                scratch + drive.OUTPUTS + row * call.output_stride,
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
    found = np.empty((fast.TILES, 4), np.int64)
    ahead = np.empty((fast.TILES, 4), np.int64)
    drive.begin(call, item, head, scratch, state, 2 * call.dims)
    # Of all rows of the request: those left over in its last item are computed as all others.
    few = item[drive.QUERY_LENGTH] * call.group <= _FEW_ROWS
    chunk = np.int64(_CHUNK_OF_FEW if few else _CHUNK_OF_MANY)
    first, last = drive.keys_of_item(call, item)
    tiles = drive.tiles_of_chunk(first, last, chunk)
    drive.tile_addresses(call, item, head, first, tiles, found)
    while first < last:
        first_ahead = drive.next_chunk(first, chunk)
        following, index_ahead = fast.look_ahead(call, item, head, first_ahead, last, chunk, ahead)
        fast.repeat_tiles(found, ahead, following, tiles)
        drive.load_scales(scratch, found, tiles, widen.MIDDLE_CODE)
        if few:
            _scores_of_few(call, item, scratch, found, ahead, tiles)
        else:
            _scores_of_many(call, item, scratch, found, ahead, tiles)
        drive.weigh(call, item, scratch, state, first, tiles, 1.0, softmax.BFLOATS, 0)
        if few:
            _outputs_of_few(call, item, scratch, found, ahead, tiles)
        else:
            _outputs_of_many(call, item, scratch, found, ahead, tiles)
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
