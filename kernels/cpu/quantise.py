# SPDX-License-Identifier: Apache-2.0
"""Quantise new tokens and store them in k8v4 pages, on CPUs.

The arithmetic is `reference.quantise`, bit for bit; the place of each byte is `k8v4.PageFormat`.
One kernel serves every dtype, head size and page size: it widens a row of D numbers to float32
in a buffer that stays in the first-level cache, and everything after works on that buffer.

What limits it is the number of vector operations, not memory. So the reference's clamps are left
out where they change nothing, which is nearly always; see `_quantise_row`.
"""

from __future__ import annotations

import functools

import numba
import numpy as np
import torch

from vllm_hybrid_kv.kernels import inputs, k8v4
from vllm_hybrid_kv.kernels.cpu import codes, lanes, placing, rotation, scales
from vllm_hybrid_kv.kernels.cpu.compile_cache import cached
from vllm_hybrid_kv.kernels.cpu.threads import follow_torch
from vllm_hybrid_kv.kernels.k8v4 import Layout, PageFormat

_BFLOAT16, _FLOAT16, _FLOAT32 = 0, 1, 2
_KINDS = {torch.bfloat16: _BFLOAT16, torch.float16: _FLOAT16, torch.float32: _FLOAT32}

_LANES = lanes.LANES
_VALUE_MAX = np.float32(k8v4.VALUE_MAX)
_INFINITY = codes.INFINITY_BITS

_NO_CLAMP = int(np.float32(2048).view(np.int32))
"""The bits of a magnitude up to which no value of a row is clamped, before the rotation or after:
each of its four stages at most doubles the largest."""

_ROW_BYTES = placing.ROW_BYTES
_KEY_BYTES = placing.KEY_BYTES
_EXTREMES_BYTES = scales.EXTREMES_BYTES
_SCRATCH = 4 * (_ROW_BYTES + _KEY_BYTES + _EXTREMES_BYTES) + scales.RESULT_BYTES
"""Bytes a thread works in: four rows of float32, four of key codes, extremes and scales of four."""

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
def _any_magnitude_above(source, kind, head_size, row, limit):  # type: ignore[no-untyped-def]
    """Return whether a row that was widened holds a magnitude above a limit of bf16, or a NaN."""
    magnitude = lanes.no_words()
    if kind == _BFLOAT16 and head_size % (2 * _LANES) == 0:
        for at in range(source, source + 2 * head_size, 4 * _LANES):
            magnitude = codes.largest_bfloat16(magnitude, at)
        return codes.any_bfloat16_above(magnitude, limit)
    for at in range(row, row + 4 * head_size, 4 * _LANES):
        magnitude = codes.largest_magnitude(magnitude, lanes.load_float32(at))
    return codes.any_above(magnitude, limit)


@numba.njit
def _encode_keys(row, head_size, keys, nan):  # type: ignore[no-untyped-def]
    """Write the e4m3fn codes of a row."""
    if nan:
        for d in range(0, head_size, _LANES):
            x = lanes.load_float32(row + 4 * d)
            lanes.store_bytes(keys + d, codes.key_codes_or_nan(x))
    else:
        for d in range(0, head_size, _LANES):
            lanes.store_bytes(keys + d, codes.key_codes(lanes.load_float32(row + 4 * d)))


@numba.njit
def _clamp(row, head_size, limit):  # type: ignore[no-untyped-def]
    """Clamp a row in place; a NaN becomes -limit."""
    for at in range(row, row + 4 * head_size, 4 * _LANES):
        lanes.store_floats(at, lanes.clamp(lanes.load_float32(at), limit))


@numba.njit
def _quantise_row(key, value, kind, head_size, row, keys, extremes, unit):  # type: ignore[no-untyped-def]
    """Write the codes of a key, a value rotated but for `unit`, and its extremes.

    Only a row with a magnitude above `_NO_CLAMP` is clamped: by 65504 before it is rotated, and
    after it by what `unit` makes 65504 of, and its extremes with it.

    Returns:
        Whether the key or the value holds a NaN.
    """
    _widen(key, kind, head_size, row)
    nan = _any_magnitude_above(key, kind, head_size, row, _INFINITY)
    _encode_keys(row, head_size, keys, nan)
    _widen(value, kind, head_size, row)
    large = _any_magnitude_above(value, kind, head_size, row, _NO_CLAMP)
    if large:
        nan |= _any_magnitude_above(value, kind, head_size, row, _INFINITY)
        _clamp(row, head_size, _VALUE_MAX)
    lo, hi = rotation.rotate(row, head_size)
    lanes.store_floats(extremes, lo)
    lanes.store_floats(extremes + 4 * _LANES, hi)
    if large:
        _clamp(row, head_size, _VALUE_MAX / unit)
        _clamp(extremes, 2 * _LANES, _VALUE_MAX / unit)
    return nan


@numba.njit
def _is_quad(slots, i, last):  # type: ignore[no-untyped-def]
    """Return whether token i and the three after it have the slots of a quad."""
    if i + 4 > last:
        return False
    slot = lanes.load_slot(slots + 8 * i)
    if slot % 4 != 0:
        return False
    for token in range(1, 4):
        if lanes.load_slot(slots + 8 * (i + token)) != slot + token:
            return False
    return slot >= 0


@numba.njit
def _tokens_before_quad(slots, i, last):  # type: ignore[no-untyped-def]
    """Return how many tokens from i on, four at most, come before the next quad."""
    count = 1
    while count < 4 and i + count < last and not _is_quad(slots, i + count, last):
        count += 1
    return count


@numba.njit
def _store_item(  # type: ignore[no-untyped-def]
    item, key, key_token, key_head, value, value_token, value_head, kind, cache, block_stride,
    slots, num_tokens, num_heads, head_size, page_size, tiled,
):  # fmt: skip
    """Quantise and store up to `_ITEM_TOKENS` tokens, four at a time."""
    rows = lanes.stack_bytes(_SCRATCH)
    keys = rows + 4 * _ROW_BYTES
    extremes = keys + 4 * _KEY_BYTES
    results = extremes + 4 * _EXTREMES_BYTES
    for at in range(extremes, results, 4 * _LANES):
        lanes.store_floats(at, lanes.same(np.float32(0.0)))  # of tokens that are not there
    unit = rotation.unit(head_size)
    head_bytes = page_size * (head_size + head_size // 2 + 4)
    row_bytes = head_size * (4 if kind == _FLOAT32 else 2)
    i = item * _ITEM_TOKENS
    last = min(i + _ITEM_TOKENS, num_tokens)
    while i < last:
        quad = tiled and _is_quad(slots, i, last)
        count = 4 if quad else _tokens_before_quad(slots, i, last)
        for h in range(num_heads):
            head = cache + h * head_bytes
            k = key + i * key_token + h * key_head
            v = value + i * value_token + h * value_head
            placing.prefetch_rows(k, key_token, row_bytes, count)
            placing.prefetch_rows(v, value_token, row_bytes, count)
            if quad:
                slot = lanes.load_slot(slots + 8 * i)
                region, t = head + slot // page_size * block_stride, slot % page_size
                placing.prefetch_next_tile(region, page_size, t, head_size)
            nan_tokens = 0
            for token in range(count):
                nan = _quantise_row(
                    k + token * key_token, v + token * value_token, kind, head_size,
                    rows + token * _ROW_BYTES, keys + token * _KEY_BYTES,
                    extremes + token * _EXTREMES_BYTES, unit,
                )  # fmt: skip
                nan_tokens |= nan << token
            scales.write_scales(extremes, unit, nan_tokens, results)
            if quad:
                placing.place_quad(keys, rows, results, head_size, region, page_size, t)
            else:
                for token in range(count):
                    slot = lanes.load_slot(slots + 8 * (i + token))
                    if slot >= 0:
                        region = head + slot // page_size * block_stride
                        placing.place_token(
                            keys, rows, results, token, head_size, region, page_size,
                            slot % page_size, tiled,
                        )  # fmt: skip
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
