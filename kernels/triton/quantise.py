# SPDX-License-Identifier: Apache-2.0
"""Quantise new tokens and store them in k8v4 pages, on GPUs, in one launch for K and V.

The arithmetic is `reference.quantise`, bit for bit; `k8v4.PageFormat` with the layout `LINEAR`
gives the offset of each byte.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_hybrid_kv.kernels import inputs, k8v4
from vllm_hybrid_kv.kernels.triton.convert import (
    encode_keys,
    half_rounded_down,
    half_to_float,
    has_native_e4m3,
)
from vllm_hybrid_kv.kernels.triton.rotation import rotated, rotation_unit

_VALUE_MAX = tl.constexpr(k8v4.VALUE_MAX)
_LAST_CODE = tl.constexpr(float(k8v4.VALUE_LEVELS - 1))
_CODE_BITS = tl.constexpr(k8v4.VALUE_LEVELS - 1)
_NAN_SCALE = tl.constexpr(k8v4.NAN_SCALE_BITS)
# Adding 1.5 x 2^23 leaves float32 a last bit of 1: numbers are rounded half to even, and the low
# bits hold the integer.
_INTEGER_ROUNDER = tl.constexpr(1.5 * 2.0**23)

NUMBERS_PER_PROGRAM = 4096
"""Keys of a program, and as many values: 32 of each for every thread of four warps. The value
codes of a thread are then 16 bytes, one store."""


# Specialising these on 1 and on multiples of 16 would compile more kernels at run time.
@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def quantise_and_store_kernel(  # type: ignore[no-untyped-def]
    k_ptr, stride_k_tok, stride_k_head, stride_k_dim,
    v_ptr, stride_v_tok, stride_v_head, stride_v_dim,
    cache_ptr, stride_cache_block,
    slots_ptr, stride_slot,
    num_rows, num_slots,
    HEADS: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, UNIT: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Store rows (token, head) of K and V as codes, see `reference.quantise` for the formula.

    Args:
        k_ptr, v_ptr: [T, HEADS, D]; strides in elements.
        cache_ptr: uint8; regions of PAGE tokens, `stride_cache_block` bytes between blocks.
        num_rows: T * HEADS.
        num_slots: Tokens that the cache has room for.
        DIMS: The smallest power of two >= D.
        ROWS: Rows of a program.
        UNIT: Factor of rotated values, see `rotation_unit`.
        NATIVE: Whether Triton converts to e4m3fn; see `encode_keys`.
    """
    KEY_BYTES: tl.constexpr = PAGE * D
    VALUE_BYTES: tl.constexpr = PAGE * (D // 2)
    HEAD_BYTES: tl.constexpr = KEY_BYTES + VALUE_BYTES + 4 * PAGE
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tok, head = row // HEADS, row % HEADS
    slot = tl.load(slots_ptr + tok * stride_slot, mask=row < num_rows, other=-1).to(tl.int64)
    # A row whose slot is past the end is skipped, because it would overwrite another tensor and a
    # kernel cannot raise.
    mask_row = (slot >= 0) & (slot < num_slots)
    slot = tl.where(mask_row, slot, 0)
    in_page = slot % PAGE
    base = slot // PAGE * stride_cache_block + head * HEAD_BYTES

    offs_d = tl.arange(0, DIMS)
    mask = mask_row[:, None] & (offs_d < D)[None, :]
    k_rows = k_ptr + (tok * stride_k_tok + head * stride_k_head)[:, None]
    k = tl.load(k_rows + (offs_d * stride_k_dim)[None, :], mask=mask, other=0.0).to(tl.float32)
    v_rows = v_ptr + (tok * stride_v_tok + head * stride_v_head)[:, None]
    v = tl.load(v_rows + (offs_d * stride_v_dim)[None, :], mask=mask, other=0.0).to(tl.float32)
    key_ptrs = cache_ptr + (base + in_page * D)[:, None] + offs_d[None, :]
    tl.store(key_ptrs, encode_keys(k, NATIVE), mask=mask)

    nan = tl.max(((k != k) | (v != v)).to(tl.int32), axis=1) > 0
    v = tl.where(nan[:, None], 0.0, tl.minimum(tl.maximum(v, -_VALUE_MAX), _VALUE_MAX))
    v = rotated(v, D) * UNIT
    v = tl.minimum(tl.maximum(v, -_VALUE_MAX), _VALUE_MAX)
    lowest = tl.min(tl.where((offs_d < D)[None, :], v, _VALUE_MAX), axis=1)
    highest = tl.max(tl.where((offs_d < D)[None, :], v, -_VALUE_MAX), axis=1)
    zero_bits = half_rounded_down(lowest)
    zero = half_to_float(zero_bits)
    # Both divisions are rounded to nearest; Triton's `/` is not.
    step = tl.math.div_rn(highest - zero, tl.full([ROWS], _LAST_CODE, tl.float32))
    # To round up, the negative is rounded down and its sign bit removed.
    scale_bits = half_rounded_down(-step) & 0x7FFF
    scale = half_to_float(scale_bits)
    inverse = tl.math.div_rn(
        tl.full([ROWS], 1.0, tl.float32), tl.where(scale > 0, scale, 1.0)
    )  # fmt: skip
    inverse = tl.where(scale > 0, inverse, 0.0)
    # Clamping before rounding gives the same codes and prevents the compiler from fusing the
    # product with the sum: a fused one rounds once instead of twice.
    steps = tl.minimum(tl.maximum((v - zero[:, None]) * inverse[:, None], 0.0), _LAST_CODE)
    codes = (steps + _INTEGER_ROUNDER).to(tl.int32, bitcast=True) & _CODE_BITS
    low, high = tl.split(tl.reshape(codes, [ROWS, DIMS // 2, 2]))
    offs_pair = tl.arange(0, DIMS // 2)
    tl.store(
        cache_ptr + (base + KEY_BYTES + in_page * (D // 2))[:, None] + offs_pair[None, :],
        (low | (high << 4)).to(tl.uint8),
        mask=mask_row[:, None] & (offs_pair < D // 2)[None, :],
    )  # fmt: skip

    scale_bits = tl.where(nan, _NAN_SCALE, scale_bits)
    zero_bits = tl.where(zero == 0.0, 0, zero_bits)  # -0.0 is stored as 0.0
    scale_ptrs = cache_ptr + (base + KEY_BYTES + VALUE_BYTES)
    scale_ptrs = scale_ptrs.to(tl.pointer_type(tl.int16)) + in_page
    tl.store(scale_ptrs, scale_bits.to(tl.int16), mask=mask_row)
    tl.store(scale_ptrs + PAGE, zero_bits.to(tl.int16), mask=mask_row)


def quantise_and_store(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    debug: bool = False,
) -> None:
    """Quantise tokens and write them into their slots, in the layout `LINEAR`.

    The rest of the cache is unchanged. A slot past the end of the cache is not written, since a
    kernel cannot raise; `debug` raises. If one call names a slot twice, its bytes are those of
    either token or a mixture; vLLM never does so.

    Args:
        key: bfloat16, float16 or float32 [T, H, D], any strides.
        value: Of the same shape and dtype, any strides.
        cache: uint8 [num_blocks, H, N, slot_bytes(D)], contiguous within a block; an even number
            of bytes between blocks. Stores are widest with a multiple of 16.
        slot_mapping: int64 or int32 [T'] with T' <= T, block * N + token within the block; the
            tokens after the first T' are padding. A token whose slot is negative is not written.
        debug: Check the slots as well, which waits for the device.

    Raises:
        ValueError: A tensor has the wrong shape, dtype or strides. Nothing has been written then.
    """
    inputs.check_store(key, value, cache, slot_mapping, cache.device)
    num_tokens = slot_mapping.shape[0]
    _, num_heads, head_size = key.shape
    blocks, _, page_size, _ = cache.shape
    num_slots = blocks * page_size
    # Scales and zeros are stored as 16-bit words.
    if blocks > 1 and cache.stride(0) % 2:
        raise inputs.invalid(
            inputs.STORE, "cache", cache, "with an even number of bytes between blocks"
        )
    if debug:
        if num_tokens and int(slot_mapping.max()) >= num_slots:
            raise ValueError(
                f"quantise_and_store: slot_mapping names slot {int(slot_mapping.max())}, which is "
                f"past the end of the cache, {blocks} blocks of {page_size} tokens"
            )
        inputs.check_duplicates(slot_mapping)
    num_rows = num_tokens * num_heads
    if num_rows == 0:
        return
    dims = triton.next_power_of_2(head_size)
    rows = NUMBERS_PER_PROGRAM // dims
    quantise_and_store_kernel[(triton.cdiv(num_rows, rows),)](
        key, *key.stride(),
        value, *value.stride(),
        cache, cache.stride(0),
        slot_mapping, slot_mapping.stride(0),
        num_rows, num_slots,
        HEADS=num_heads, D=head_size, DIMS=dims, PAGE=page_size,
        ROWS=rows, UNIT=rotation_unit(head_size),
        NATIVE=has_native_e4m3(key.device),
        num_warps=4,
    )  # fmt: skip
