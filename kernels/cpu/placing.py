# SPDX-License-Identifier: Apache-2.0
"""Where the bytes of quantised tokens go in a page, and what is asked for ahead, in numba code.

The places are those of `k8v4.PageFormat`. What is placed stands in a thread's scratch memory: four
rows of rotated float32 values, four of key codes, and the scales of `scales.write_scales`.
"""

from __future__ import annotations

import numba

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.cpu import codes, lanes, scales
from vllm_hybrid_kv.kernels.cpu.memory import read_float

ROW_BYTES = 4 * k8v4.MAX_HEAD_SIZE
"""Bytes between two rows of values."""

KEY_BYTES = k8v4.MAX_HEAD_SIZE
"""Bytes between two rows of key codes."""

_LANES = lanes.LANES
_TILE = k8v4.TILE_TOKENS
_BYTE_OF_TOKEN = k8v4.QUAD_BYTE_OF_TOKEN
_CACHE_LINE = 64


@numba.njit
def _place_linear(keys, row, zero, inverse, head_size, region, plane, t):  # type: ignore[no-untyped-def]
    """Store one token of `Layout.LINEAR`; the key codes' buffer then holds the values'."""
    lanes.copy_bytes(region + t * head_size, keys, head_size)
    for d in range(0, head_size, _LANES):
        x = codes.value_codes(lanes.load_float32(row + 4 * d), zero, inverse)
        codes.store_packed(keys + d // 2, x)
    lanes.copy_bytes(plane + t * (head_size // 2), keys, head_size // 2)


@numba.njit
def _place_tiled(keys, row, zero, inverse, head_size, region, plane, t):  # type: ignore[no-untyped-def]
    """Store one token of `Layout.CPU_TILED`; the key codes' buffer then holds the values'."""
    tile, of_tile = t // _TILE * _TILE, t % _TILE
    to = region + tile * head_size + 16 * (of_tile // 4) + 2 * (of_tile % 4)
    for line in range(head_size // 4):
        lanes.copy_pair(to + 64 * line, keys + 4 * line)
        lanes.copy_pair(to + 64 * line + 8, keys + 4 * line + 2)
    to = plane + tile * (head_size // 2) + 64 * (of_tile // 4) + _BYTE_OF_TOKEN[t % 4]
    for chunk in range(head_size // 32):
        low = codes.value_codes(lanes.load_float32(row + 128 * chunk), zero, inverse)
        high = codes.value_codes(lanes.load_float32(row + 128 * chunk + 64), zero, inverse)
        lanes.store_bytes(keys, codes.nibbles(low, high))
        for i in range(_LANES):
            lanes.copy_byte(to + 256 * chunk + 4 * i, keys + i)


@numba.njit
def place_token(keys, rows, results, token, head_size, region, page_size, t, tiled):  # type: ignore[no-untyped-def]
    """Store one of the four tokens in place t of the page of a head."""
    plane = region + page_size * head_size
    to = plane + page_size * (head_size // 2) + 2 * t
    lanes.copy_pair(to, results + scales.SCALES + 2 * token)
    lanes.copy_pair(to + 2 * page_size, results + scales.ZEROS + 2 * token)
    zero = read_float(results + scales.ZERO_NUMBERS + 4 * token)
    inverse = read_float(results + scales.INVERSES + 4 * token)
    keys, row = keys + token * KEY_BYTES, rows + token * ROW_BYTES
    if tiled:
        _place_tiled(keys, row, zero, inverse, head_size, region, plane, t)
    else:
        _place_linear(keys, row, zero, inverse, head_size, region, plane, t)


@numba.njit
def place_quad(keys, rows, results, head_size, region, page_size, t):  # type: ignore[no-untyped-def]
    """Store the four tokens of a quad of `Layout.CPU_TILED` at once; `t` is its first."""
    plane = region + page_size * head_size
    to = plane + page_size * (head_size // 2) + 2 * t
    lanes.copy_bytes(to, results + scales.SCALES, 8)
    lanes.copy_bytes(to + 2 * page_size, results + scales.ZEROS, 8)
    tile, of_tile = t // _TILE * _TILE, t % _TILE
    to = region + tile * head_size + 16 * (of_tile // 4)
    for d in range(0, head_size, _LANES):
        codes.scatter_keys(to + _TILE * d, keys + d, KEY_BYTES)
    to = plane + tile * (head_size // 2) + 64 * (of_tile // 4)
    zeros, inverses = results + scales.ZERO_NUMBERS, results + scales.INVERSES
    for chunk in range(head_size // 32):
        codes.store_quad(to + 256 * chunk, rows + 128 * chunk, ROW_BYTES, zeros, inverses)


@numba.njit
def prefetch_rows(source, stride, row_bytes, count):  # type: ignore[no-untyped-def]
    """Ask for the rows of the `count` tokens after the `count` at hand."""
    for token in range(count, 2 * count):
        for byte in range(0, row_bytes, _CACHE_LINE):
            lanes.prefetch_read(source + token * stride + byte)


@numba.njit
def prefetch_next_tile(region, page_size, t, head_size):  # type: ignore[no-untyped-def]
    """Ask for a quarter of the lines that the tile after the one of this quad is stored in."""
    plane = region + page_size * head_size
    for byte in range(0, 4 * head_size, _CACHE_LINE):
        lanes.prefetch_write(region + (t + _TILE) * head_size + byte)
    for byte in range(0, 2 * head_size, _CACHE_LINE):
        lanes.prefetch_write(plane + (t + _TILE) * (head_size // 2) + byte)
