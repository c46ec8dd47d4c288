# SPDX-License-Identifier: Apache-2.0
"""Quantise new tokens and store them in k8v4 pages, on CPUs.

The arithmetic is `reference.quantise`, bit for bit; the place of each byte is `k8v4.PageFormat`.
One kernel serves every dtype, head size and page size: it widens a row of D numbers to float32
in a buffer that stays in the first-level cache, and everything after works on that buffer.
"""

from __future__ import annotations

import functools

import numba
import numpy as np
import torch

from vllm_hybrid_kv.kernels import inputs, k8v4
from vllm_hybrid_kv.kernels.k8v4 import Layout, PageFormat

from . import codes, halves, lanes, rotation
from .compile_cache import cached
from .threads import follow_torch

_BFLOAT16, _FLOAT16, _FLOAT32 = 0, 1, 2
_KINDS = {torch.bfloat16: _BFLOAT16, torch.float16: _FLOAT16, torch.float32: _FLOAT32}

_LANES = lanes.LANES
_TILE = k8v4.TILE_TOKENS
_VALUE_MAX = np.float32(k8v4.VALUE_MAX)
_LAST_CODE = np.float32(k8v4.VALUE_LEVELS - 1)
_NAN_SCALE = k8v4.NAN_SCALE_BITS
_INFINITY = codes.INFINITY_BITS
_BYTE_OF_TOKEN = k8v4.QUAD_BYTE_OF_TOKEN

_CACHE_LINE = 64
_ROW_BYTES = 4 * k8v4.MAX_HEAD_SIZE
_KEY_BYTES = k8v4.MAX_HEAD_SIZE
_SCRATCH = 4 * (_ROW_BYTES + _KEY_BYTES)
"""Bytes a thread works in: four rows of float32, four of key codes."""

_ITEM_TOKENS = 16
"""Tokens that a thread takes at a time, all heads of each, so that it reads straight on."""

SERIAL_ROWS = 256
"""Rows (tokens times heads) up to which waking other threads costs more than it saves."""


@numba.njit
def _widen(source, kind, head_size, row):  # type: ignore[no-untyped-def]
    """Write a row as float32; repeat its last 8 numbers if D is no multiple of 16."""
    whole = head_size // _LANES * _LANES
    if kind == _BFLOAT16:
        for d in range(0, whole, _LANES):
            lanes.store_floats(row + 4 * d, lanes.load_bfloat16(source + 2 * d))
        if whole < head_size:
            lanes.store_floats(row + 4 * whole, lanes.load_half_bfloat16(source + 2 * whole))
    elif kind == _FLOAT16:
        for d in range(0, whole, _LANES):
            lanes.store_floats(row + 4 * d, lanes.load_float16(source + 2 * d))
        if whole < head_size:
            lanes.store_floats(row + 4 * whole, lanes.load_half_float16(source + 2 * whole))
    else:
        for d in range(0, whole, _LANES):
            lanes.store_floats(row + 4 * d, lanes.load_float32(source + 4 * d))
        if whole < head_size:
            lanes.store_floats(row + 4 * whole, lanes.load_half_float32(source + 4 * whole))


@numba.njit
def _encode_keys(row, head_size, keys):  # type: ignore[no-untyped-def]
    """Write the e4m3fn codes of a row; return the bits of its largest magnitude."""
    magnitude = lanes.no_words()
    for d in range(0, head_size, _LANES):
        x = lanes.load_float32(row + 4 * d)
        magnitude = codes.largest_magnitude(magnitude, x)
        lanes.store_bytes(keys + d, codes.key_codes(x))
    return lanes.largest_word(magnitude)


@numba.njit
def _rotate_values(row, head_size):  # type: ignore[no-untyped-def]
    """Clamp a row in place and rotate it; return the bits of its largest magnitude before."""
    magnitude = lanes.no_words()
    for d in range(0, head_size, _LANES):
        x = lanes.load_float32(row + 4 * d)
        magnitude = codes.largest_magnitude(magnitude, x)
        x = rotation.within_fours(lanes.clamp(x, _VALUE_MAX))
        if head_size % _LANES == 0:
            x = rotation.within_sixteen(x)
        lanes.store_floats(row + 4 * d, x)
    rotation.across(row, head_size)
    return lanes.largest_word(magnitude)


@numba.njit
def _measure_values(row, head_size, nan_key):  # type: ignore[no-untyped-def]
    """Rotate a row in place; return the bits of its scale and its zero."""
    magnitude = _rotate_values(row, head_size)
    unit = rotation.unit(head_size)
    lo = hi = lanes.clamp(lanes.times(lanes.load_float32(row), unit), _VALUE_MAX)
    for d in range(0, head_size, _LANES):
        x = lanes.clamp(lanes.times(lanes.load_float32(row + 4 * d), unit), _VALUE_MAX)
        lo, hi = lanes.minimum(lo, x), lanes.maximum(hi, x)
        lanes.store_floats(row + 4 * d, x)
    if nan_key or magnitude > _INFINITY:
        return _NAN_SCALE, 0
    zero = halves.round_down(lanes.smallest(lo))
    return halves.round_up((lanes.largest(hi) - halves.widen(zero)) / _LAST_CODE), zero


@numba.njit
def _inverse(scale):  # type: ignore[no-untyped-def]
    """Return the factor of the codes; 0, which makes every code 0, for scales of 0 and NaN."""
    if 0 < scale < _NAN_SCALE:
        return np.float32(1.0) / halves.widen(scale)
    return np.float32(0.0)


@numba.njit
def _place_linear(keys, row, zero, inverse, head_size, region, plane, t):  # type: ignore[no-untyped-def]
    """Store one token of `Layout.LINEAR`; the key codes' buffer then holds the values'."""
    lanes.copy_bytes(region + t * head_size, keys, head_size)
    for d in range(0, head_size, _LANES):
        x = codes.value_codes(lanes.load_float32(row + 4 * d), zero, inverse)
        codes.store_packed(keys + d // 2, x)
    lanes.copy_bytes(plane + t * (head_size // 2), keys, head_size // 2)


@numba.njit
def _chunk(row, chunk, zero, inverse):  # type: ignore[no-untyped-def]
    """Return the 16 bytes of a token's chunk of 32 values in `Layout.CPU_TILED`."""
    low = codes.value_codes(lanes.load_float32(row + 128 * chunk), zero, inverse)
    high = codes.value_codes(lanes.load_float32(row + 128 * chunk + 64), zero, inverse)
    return codes.nibbles(low, high)


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
        lanes.store_bytes(keys, _chunk(row, chunk, zero, inverse))
        for i in range(_LANES):
            lanes.copy_byte(to + 256 * chunk + 4 * i, keys + i)


@numba.njit
def _place_quad(keys, row, zeros, inverses, head_size, region, plane, t):  # type: ignore[no-untyped-def]
    """Store the four tokens of a quad of `Layout.CPU_TILED` at once; `t` is its first."""
    tile, of_tile = t // _TILE * _TILE, t % _TILE
    to = region + tile * head_size + 16 * (of_tile // 4)
    for d in range(0, head_size, _LANES):
        codes.scatter_keys(to + _TILE * d, keys + d, _KEY_BYTES)
    to = plane + tile * (head_size // 2) + 64 * (of_tile // 4)
    for chunk in range(head_size // 32):
        codes.store_interleaved(
            to + 256 * chunk,
            _chunk(row, chunk, zeros[0], inverses[0]),
            _chunk(row + 2 * _ROW_BYTES, chunk, zeros[2], inverses[2]),
            _chunk(row + _ROW_BYTES, chunk, zeros[1], inverses[1]),
            _chunk(row + 3 * _ROW_BYTES, chunk, zeros[3], inverses[3]),
        )


@numba.njit
def _is_quad(slots, i, last):  # type: ignore[no-untyped-def]
    """Return whether token i and the three after it have the slots of a quad."""
    if i + 4 > last:
        return False
    slot = lanes.load_slot(slots + 8 * i)
    for token in range(1, 4):
        if lanes.load_slot(slots + 8 * (i + token)) != slot + token:
            return False
    return slot % 4 == 0


@numba.njit
def _prefetch_rows(source, stride, row_bytes, count):  # type: ignore[no-untyped-def]
    """Ask for the rows of the `count` tokens after the `count` at hand."""
    for token in range(count, 2 * count):
        for byte in range(0, row_bytes, _CACHE_LINE):
            lanes.prefetch_read(source + token * stride + byte)


@numba.njit
def _prefetch_next_tile(region, plane, t, head_size):  # type: ignore[no-untyped-def]
    """Ask for a quarter of the lines that the tile after the one of this quad is stored in."""
    for byte in range(0, 4 * head_size, _CACHE_LINE):
        lanes.prefetch_write(region + (t + _TILE) * head_size + byte)
    for byte in range(0, 2 * head_size, _CACHE_LINE):
        lanes.prefetch_write(plane + (t + _TILE) * (head_size // 2) + byte)


@numba.njit
def _store_item(  # type: ignore[no-untyped-def]
    item, key, key_token, key_head, value, value_token, value_head, kind, cache, block_stride,
    slots, num_tokens, num_heads, head_size, page_size, tiled,
):  # fmt: skip
    """Quantise and store up to `_ITEM_TOKENS` tokens."""
    rows = lanes.stack_bytes(_SCRATCH)
    keys = rows + 4 * _ROW_BYTES
    zeros, inverses = np.empty(4, np.float32), np.empty(4, np.float32)
    head_bytes = page_size * (head_size + head_size // 2 + 4)
    row_bytes = head_size * (4 if kind == _FLOAT32 else 2)
    i = item * _ITEM_TOKENS
    last = min(i + _ITEM_TOKENS, num_tokens)
    while i < last:
        slot = lanes.load_slot(slots + 8 * i)
        quad = tiled and _is_quad(slots, i, last)
        count = 4 if quad else 1
        block, t = slot // page_size, slot % page_size
        for h in range(num_heads if slot >= 0 else 0):
            region = cache + block * block_stride + h * head_bytes
            plane = region + page_size * head_size
            scales = plane + page_size * (head_size // 2) + 2 * t
            k = key + i * key_token + h * key_head
            v = value + i * value_token + h * value_head
            _prefetch_rows(k, key_token, row_bytes, count)
            _prefetch_rows(v, value_token, row_bytes, count)
            if quad:
                _prefetch_next_tile(region, plane, t, head_size)
            for token in range(count):
                row = rows + token * _ROW_BYTES
                _widen(k + token * key_token, kind, head_size, row)
                magnitude = _encode_keys(row, head_size, keys + token * _KEY_BYTES)
                _widen(v + token * value_token, kind, head_size, row)
                scale, zero = _measure_values(row, head_size, magnitude > _INFINITY)
                zeros[token], inverses[token] = halves.widen(zero), _inverse(scale)
                lanes.store_half(scales + 2 * token, scale)
                lanes.store_half(scales + 2 * (page_size + token), zero)
            if quad:
                _place_quad(keys, rows, zeros, inverses, head_size, region, plane, t)
            elif tiled:
                _place_tiled(keys, rows, zeros[0], inverses[0], head_size, region, plane, t)
            else:
                _place_linear(keys, rows, zeros[0], inverses[0], head_size, region, plane, t)
        i += count


@numba.njit
def _first_outside(slots, num_tokens, num_slots):  # type: ignore[no-untyped-def]
    """Return the first token whose slot is past the cache's end, or -1."""
    for i in range(num_tokens):
        if lanes.load_slot(slots + 8 * i) >= num_slots:
            return i
    return -1


@cached(nogil=True)
def _store_serial(  # type: ignore[no-untyped-def]
    num_items, num_slots, key, key_token, key_head, value, value_token, value_head, kind, cache,
    block_stride, slots, num_tokens, num_heads, head_size, page_size, tiled,
):  # fmt: skip
    outside = _first_outside(slots, num_tokens, num_slots)
    if outside >= 0:
        return outside
    for item in range(num_items):
        _store_item(
            item, key, key_token, key_head, value, value_token, value_head, kind, cache,
            block_stride, slots, num_tokens, num_heads, head_size, page_size, tiled,
        )  # fmt: skip
    return -1


@cached(nogil=True, parallel=True)
def _store_parallel(  # type: ignore[no-untyped-def]
    num_items, num_slots, key, key_token, key_head, value, value_token, value_head, kind, cache,
    block_stride, slots, num_tokens, num_heads, head_size, page_size, tiled,
):  # fmt: skip
    outside = _first_outside(slots, num_tokens, num_slots)
    if outside >= 0:
        return outside
    for item in numba.prange(num_items):
        _store_item(
            item, key, key_token, key_head, value, value_token, value_head, kind, cache,
            block_stride, slots, num_tokens, num_heads, head_size, page_size, tiled,
        )  # fmt: skip
    return -1


@functools.lru_cache(maxsize=64)
def _is_tiled(head_size: int, page_size: int) -> bool:
    """Return whether pages of these sizes are tiled, once they are found to be valid."""
    page_format = PageFormat(head_size, page_size, k8v4.cpu_layout(head_size))
    return page_format.layout is Layout.CPU_TILED


def quantise_and_store(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    debug: bool = False,
) -> None:
    """Quantise tokens and write them into their slots, in the layout `k8v4.cpu_layout(D)`.

    Nothing else in the cache is touched. If one call names a slot twice, its bytes are those of
    one of the two tokens or, where two threads met, some of either; vLLM never does so.

    Args:
        key: bfloat16, float16 or float32 [T, H, D], any strides.
        value: Likewise, of the same shape and dtype.
        cache: uint8 [num_blocks, H, N, slot_bytes(D)], contiguous within a block; blocks may
            stand any number of bytes apart.
        slot_mapping: int64 or int32 [T'] with T' <= T, block * N + token within the block; the
            tokens after the first T' are padding. A token whose slot is negative is not written.
        debug: Also refuse a slot named twice.

    Raises:
        ValueError: A tensor has the wrong shape, dtype, strides or device, or a slot is past the
            end of the cache. Nothing has been written then.
    """
    inputs.check_tokens(key, value, slot_mapping)
    num_tokens = slot_mapping.shape[0]
    _, num_heads, head_size = key.shape
    inputs.check_pages(cache, num_heads, head_size)
    tensors = {"key": key, "value": value, "slot_mapping": slot_mapping, "cache": cache}
    for name, tensor in tensors.items():
        if not tensor.is_cpu:
            raise inputs.store_refusal(name, "on the CPU", tensor.device)
    num_blocks, _, page_size, _ = cache.shape
    slots = slot_mapping.to(torch.int64).contiguous()
    if debug:
        inputs.check_duplicates(slots)
    key = key if key.stride(2) == 1 else key.contiguous()
    value = value if value.stride(2) == 1 else value.contiguous()
    size = key.element_size()
    arguments = (
        -(-num_tokens // _ITEM_TOKENS),
        num_blocks * page_size,
        key.data_ptr(),
        key.stride(0) * size,
        key.stride(1) * size,
        value.data_ptr(),
        value.stride(0) * size,
        value.stride(1) * size,
        _KINDS[key.dtype],
        cache.data_ptr(),
        cache.stride(0),
        slots.data_ptr(),
        num_tokens,
        num_heads,
        head_size,
        page_size,
        _is_tiled(head_size, page_size),
    )
    if num_tokens * num_heads <= SERIAL_ROWS or follow_torch() == 1:
        outside = _store_serial(*arguments)
    else:
        outside = _store_parallel(*arguments)
    if outside >= 0:
        raise ValueError(
            f"quantise_and_store: slot {int(slots[outside])} of token {outside} is past the end "
            f"of the cache, {num_blocks} blocks of {page_size} tokens"
        )
