# SPDX-License-Identifier: Apache-2.0
"""Quantise new tokens and store them in k8v4 pages, on CPUs.

The results equal those of `reference.quantise`, bit for bit; `k8v4.PageFormat` says where each byte
goes. One kernel serves every dtype, head size and page size: it widens a row to float32 in a buffer
that stays in the first-level cache. Vector operations, not memory, limit its speed, so it skips the
reference's clamps when they would change nothing; see `_store_item`.
"""

from __future__ import annotations

import numba
import numpy as np
import torch

from vllm_hybrid_kv.kernels import inputs, k8v4
from vllm_hybrid_kv.kernels.cpu import encode, inline, records, rotation, row_ops
from vllm_hybrid_kv.kernels.cpu.compile_cache import cached
from vllm_hybrid_kv.kernels.cpu.encode import INFINITY_BITS, ROW_BYTES
from vllm_hybrid_kv.kernels.cpu.llvm import LANES, LINE
from vllm_hybrid_kv.kernels.cpu.threads import follow_torch

_KEY_MAX = np.float32(k8v4.KEY_MAX)
_VALUE_MAX = np.float32(k8v4.VALUE_MAX)

_NO_CLAMP = int(np.float32(2.0**18).view(np.int32))
"""The float32 bits of 2^18. If no entry of a row's `rotation_sums` exceeds 2^18, none of the row's
numbers does, and 2^18 is below `KEY_MAX` and `VALUE_MAX`, so the row needs no clamp."""

_SCRATCH = 8 * ROW_BYTES + encode.LARGEST_BYTES + encode.RESULT_BYTES
"""Bytes of a thread's scratch for four tokens: rows of float32, partial maxima, and scales."""

_ITEM_TOKENS = 16
"""A thread takes this many tokens at a time, with all their heads, so it reads memory in order."""

SERIAL_ROWS = 256
"""One thread stores up to this many rows (tokens times heads): waking others would take longer."""

_CPU = torch.device("cpu")
_call = records.CallBuffer(records.StoreCall)


@numba.njit
def _rotate(source, dtype_code, head_size, row, largest, ahead):  # type: ignore[no-untyped-def]
    """Rotate a row, except for the factor `unit`, and write its partial maxima to `largest`.

    Prefetches the row `ahead` bytes after `source`.
    """
    row_ops.widen_row(dtype_code, source, row, head_size, ahead)
    rotation.rotate_and_measure(row, head_size, largest)


@numba.njit
def _rotate_clamped(source, dtype_code, head_size, row, largest, limit, unit):  # type: ignore[no-untyped-def]
    """Clamp and rotate a row, except for the factor `unit`, and write its partial maxima.

    The row is clamped to `limit` before the rotation, and to `limit / unit` after it. Returns
    whether the row has a NaN.
    """
    row_ops.widen_row(dtype_code, source, row, head_size, 0)
    if encode.any_above(INFINITY_BITS, row, (head_size + LANES - 1) // LANES):
        return True
    encode.clamp_row(row, head_size, limit)
    rotation.rotate_and_measure(row, head_size, largest)
    encode.clamp_row(row, head_size, limit / unit)
    encode.clamp_row(largest, LANES, limit / unit)
    return False


@numba.njit
def _rotate_token_clamped(key, value, dtype_code, head_size, row, largest, unit):  # type: ignore[no-untyped-def]
    """Rotate a token's key and value. If either has a NaN, write zeros for both and return True."""
    inline.noinline()
    value_row, largest_value = row + encode.VALUE_ROWS, largest + 4 * LINE
    nan = _rotate_clamped(key, dtype_code, head_size, row, largest, _KEY_MAX, unit)
    nan |= _rotate_clamped(value, dtype_code, head_size, value_row, largest_value, _VALUE_MAX, unit)
    if nan:
        lines = (head_size + LANES - 1) // LANES
        row_ops.clear_lines(row, lines)
        row_ops.clear_lines(value_row, lines)
        row_ops.clear_lines(largest, 1)
        row_ops.clear_lines(largest_value, 1)
    return nan


@numba.njit
def _is_quad(slots, i, last):  # type: ignore[no-untyped-def]
    """Return whether token i and the three after it go to the four slots of one quad."""
    slot = inline.load_int64(slots + 8 * i)
    is_quad = i + 4 <= last and slot >= 0 and slot % 4 == 0
    for token in range(1, 4):
        is_quad = is_quad and inline.load_int64(slots + 8 * (i + token)) == slot + token
    return is_quad


@numba.njit
def _tokens_before_quad(slots, i, last):  # type: ignore[no-untyped-def]
    """Return how many tokens to store at once: one to four, from token i up to the next quad."""
    count = 1
    while count < 4 and i + count < last and not _is_quad(slots, i + count, last):
        count += 1
    return count


@numba.njit
def _store_item(call, item):  # type: ignore[no-untyped-def]
    """Quantise and store up to `_ITEM_TOKENS` tokens, four at a time.

    Meanwhile it prefetches the next tokens' rows, and a quarter of the lines of the next tile.
    """
    rows = inline.stack_bytes(_SCRATCH)
    largest = rows + 8 * ROW_BYTES
    results = largest + encode.LARGEST_BYTES
    row_ops.clear_lines(largest, encode.LARGEST_BYTES // LINE)  # tokens of a quad may be missing
    slots, dtype_code = call.slots, call.dtype_code
    head_size, page_size, block_stride = call.head_size, call.page_size, call.block_stride
    key_stride, value_stride = call.key_token_stride, call.value_token_stride
    unit = np.float32(call.unit)
    head_bytes = page_size * (head_size + head_size // 2 + 4)
    i = item * _ITEM_TOKENS
    last = min(i + _ITEM_TOKENS, call.num_tokens)
    while i < last:
        quad = _is_quad(slots, i, last)
        count = 4 if quad else _tokens_before_quad(slots, i, last)
        for h in range(call.num_heads):
            head = call.cache + h * head_bytes
            key = call.key + i * key_stride + h * call.key_head_stride
            value = call.value + i * value_stride + h * call.value_head_stride
            if quad:
                slot = inline.load_int64(slots + 8 * i)
                region, t = head + slot // page_size * block_stride, slot % page_size
                ahead = t + k8v4.TILE_TOKENS
                inline.prefetch(1, region + ahead * head_size, 4 * head_size)
                plane = region + page_size * head_size
                inline.prefetch(1, plane + ahead * (head_size // 2), 2 * head_size)
            for token in range(count):
                row, top = rows + token * ROW_BYTES, largest + token * LINE
                key_row, value_row = key + token * key_stride, value + token * value_stride
                _rotate(key_row, dtype_code, head_size, row, top, count * key_stride)
                row, top = row + encode.VALUE_ROWS, top + 4 * LINE
                _rotate(value_row, dtype_code, head_size, row, top, count * value_stride)
            nan_tokens = 0
            if encode.any_above(_NO_CLAMP, largest, encode.LARGEST_BYTES // LINE):
                for token in range(count):
                    nan = _rotate_token_clamped(
                        key + token * key_stride, value + token * value_stride, dtype_code,
                        head_size, rows + token * ROW_BYTES, largest + token * LINE, unit,
                    )  # fmt: skip
                    nan_tokens |= nan << token
            encode.write_scales(largest, unit, nan_tokens, results)
            for token in range(1 if quad else count):
                slot = inline.load_int64(slots + 8 * (i + token))
                if slot >= 0:
                    region = head + slot // page_size * block_stride
                    encode.place(
                        rows, results, token, quad, head_size, region, page_size, slot % page_size
                    )
        i += count


def _store(call_address, num_items):  # type: ignore[no-untyped-def]
    """Store all tokens and return -1. If a slot is past the end, only return its token's index."""
    call = records.store_call_at(call_address)
    for i in range(call.num_tokens):
        if inline.load_int64(call.slots + 8 * i) >= call.num_slots:
            return i
    for item in numba.prange(num_items):
        _store_item(records.store_call_at(call_address), item)
    return -1


_store_serial = cached(_store, nogil=True)
_store_parallel = cached(_store, nogil=True, parallel=True)


def quantise_and_store(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    debug: bool = False,
) -> None:
    """Quantise tokens and write them into their slots, in the layout `CPU_TILED`.

    Nothing else in the cache changes. If one call names a slot twice, which vLLM never does, the
    slot gets the bytes of either token or, with several threads, a mixture of both.

    Args:
        key: bfloat16, float16 or float32 [T, H, D], any strides.
        value: Same shape and dtype as `key`, any strides.
        cache: uint8 [num_blocks, H, N, slot_bytes(D)], contiguous within a block; any number of
            bytes between blocks.
        slot_mapping: int64 or int32 [T'] with T' <= T, block * N + token within the block; the
            tokens after the first T' are padding. A token whose slot is negative is not written.
        debug: Also reject a slot that is named twice.

    Raises:
        ValueError: A tensor has the wrong shape, dtype, strides or device, or a slot is past the
            end of the cache. In both cases nothing was written.
    """
    inputs.check_store(key, value, cache, slot_mapping, _CPU)
    num_tokens = slot_mapping.shape[0]
    _, num_heads, head_size = key.shape
    num_blocks, _, page_size, _ = cache.shape
    slots = slot_mapping.to(torch.int64).contiguous()
    if debug:
        inputs.check_duplicates(slots)
    key = key if key.stride(2) == 1 else key.contiguous()
    value = value if value.stride(2) == 1 else value.contiguous()
    size = key.element_size()
    call = _call.write(
        key=key.data_ptr(),
        key_token_stride=key.stride(0) * size,
        key_head_stride=key.stride(1) * size,
        value=value.data_ptr(),
        value_token_stride=value.stride(0) * size,
        value_head_stride=value.stride(1) * size,
        dtype_code=records.DTYPE_CODES[key.dtype],
        cache=cache.data_ptr(),
        block_stride=cache.stride(0),
        slots=slots.data_ptr(),
        num_slots=num_blocks * page_size,
        num_tokens=num_tokens,
        num_heads=num_heads,
        head_size=head_size,
        page_size=page_size,
        unit=k8v4.rotation_unit(head_size),
    )
    serial = num_tokens * num_heads <= SERIAL_ROWS or follow_torch() == 1
    store = _store_serial if serial else _store_parallel
    outside = store(call, -(-num_tokens // _ITEM_TOKENS))
    if outside >= 0:
        raise ValueError(
            f"quantise_and_store: slot {int(slots[outside])} of token {outside} is past the end "
            f"of the cache, {num_blocks} blocks of {page_size} tokens"
        )
