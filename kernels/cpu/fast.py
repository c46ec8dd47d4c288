# SPDX-License-Identifier: Apache-2.0
"""What the paths with bf16 products share: widening a chunk's tiles to scratch memory."""

from __future__ import annotations

import numpy as np

from vllm_hybrid_kv.kernels.cpu import drive, memory, widen

TILES = drive.CHUNK // drive.TILE
"""Most tiles of a chunk."""


@drive.inner
def look_ahead(call, item, head, first_ahead, last, chunk, ahead):  # type: ignore[no-untyped-def]
    """Find the tiles to ask for while a chunk is computed: those from token `first_ahead` on.

    While it is the item's last one, those of the first chunk of the thread's next item, which is
    taken for that.

    Returns:
        How many there are, and the number of the next item, -1 where none was taken.
    """
    following = drive.tiles_of_chunk(first_ahead, last, chunk)
    if following > 0:
        drive.tile_addresses(call, item, head, first_ahead, following, ahead)
        return following, np.int64(-1)
    index = memory.take_next(call.counters)
    return drive.first_tiles(call, index, chunk, ahead), index


@drive.inner
def repeat_tiles(found, ahead, following, tiles):  # type: ignore[no-untyped-def]
    """Let the tiles to ask for be known ones where the next chunk has fewer than this one.

    The next chunk may also have more: those addresses are its own and stay as they are.
    """
    for tile in range(following, tiles):
        ahead[tile, 0], ahead[tile, 1] = found[tile, 0], found[tile, 1]
    if tiles % 2:
        # Products take tiles in pairs; the weights of a missing one are zeros.
        for address in range(4):
            found[tiles, address] = found[tiles - 1, address]
        if following <= tiles:
            ahead[tiles, 0], ahead[tiles, 1] = found[tiles, 0], found[tiles, 1]


@drive.inner
def widen_keys(call, scratch, found, ahead, first, last):  # type: ignore[no-untyped-def]
    """Widen a chunk's key tiles `first` to `last - 1`, always to the same memory."""
    for tile in range(first, last):
        to = scratch + drive.KEYS + (tile - first) * (call.dims // 32) * widen.OPERAND
        widen.widen_keys(found[tile, 0], to, call.dims, ahead[tile, 0])


@drive.inner
def widen_values(call, scratch, found, ahead, tiles):  # type: ignore[no-untyped-def]
    """Widen a chunk's values; where their tiles are odd, the last one twice.

    The weights of the one that is not there are zeros, but zero times whatever the memory held
    might be NaN.
    """
    for tile in range((tiles + 1) // 2 * 2):
        to = scratch + drive.VALUES + tile // 2 * (call.dims // 16) * widen.OPERAND
        widen.widen_values(found[tile, 1], to, call.dims, tile % 2, ahead[tile, 1])
