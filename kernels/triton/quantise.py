# SPDX-License-Identifier: Apache-2.0
"""Quantise new tokens and store them in k8v4 pages, on GPUs, in one launch for K and V.

The results equal those of `reference.quantise` bit for bit. `k8v4.PageFormat` says where each byte
of a page in the layout `LINEAR` is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_hybrid_kv.kernels import inputs, k8v4
from vllm_hybrid_kv.kernels.triton.convert import half_rounded_up, half_to_float, rounded
from vllm_hybrid_kv.kernels.triton.launching import launcher
from vllm_hybrid_kv.kernels.triton.rotation import rotated

_SCALE_MAX = tl.constexpr(k8v4.SCALE_MAX)
_KEY_STEPS = tl.constexpr(float(k8v4.KEY_STEPS))
_VALUE_STEPS = tl.constexpr(k8v4.VALUE_STEPS)
_MIDDLE_CODE = tl.constexpr(k8v4.MIDDLE_VALUE_CODE)
_CODE_BITS = tl.constexpr(k8v4.VALUE_LEVELS - 1)
_NAN_SCALE = tl.constexpr(k8v4.NAN_SCALE_BITS)

NUMBERS_PER_PROGRAM = 4096
"""How many numbers of K a program quantises, and how many of V. Each thread of four warps has 32 of
both, so its value codes fill 16 bytes, which takes one store."""


@triton.jit
def _scaled(  # type: ignore[no-untyped-def]
    x, nan, D: tl.constexpr, UNIT: tl.constexpr, STEPS: tl.constexpr
):
    """Rotate rows and divide them by their scales. Returns quotients, and scales as fp16 bits."""
    LIMIT: tl.constexpr = STEPS * _SCALE_MAX
    x = tl.where(nan[:, None], 0.0, tl.minimum(tl.maximum(x, -LIMIT), LIMIT))
    raw = rotated(x, D)
    limit = tl.math.div_rn(
        tl.full([x.shape[0]], LIMIT, tl.float32), tl.full([x.shape[0]], UNIT, tl.float32)
    )[:, None]
    raw = tl.minimum(tl.maximum(raw, -limit), limit)
    largest = tl.max(tl.abs(raw), axis=1) * UNIT
    # `div_rn` rounds to nearest, as the reference does; Triton's `/` does not.
    scale = tl.math.div_rn(largest, tl.full([x.shape[0]], STEPS, tl.float32))
    bits = half_rounded_up(tl.minimum(scale, _SCALE_MAX))
    scale = half_to_float(bits)
    inverse = tl.math.div_rn(
        tl.full([x.shape[0]], 1.0, tl.float32), tl.where(scale > 0, scale, 1.0)
    )
    inverse = tl.where(scale > 0, inverse, 0.0) * UNIT
    return raw * inverse[:, None], tl.where(nan, _NAN_SCALE, bits)


# Specialising these on 1 and on multiples of 16 would compile more kernels at run time.
@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def quantise_and_store_kernel(  # type: ignore[no-untyped-def]
    k_ptr, stride_k_tok, stride_k_head, stride_k_dim,
    v_ptr, stride_v_tok, stride_v_head, stride_v_dim,
    cache_ptr, stride_cache_block,
    slots_ptr, stride_slot,
    num_rows, num_slots,
    HEADS: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Quantise and store rows of K and V; `reference.quantise` has the formula.

    Args:
        k_ptr, v_ptr: [T, HEADS, D]; strides in elements. A row is one head of one token.
        cache_ptr: uint8 pages of PAGE tokens; blocks start `stride_cache_block` bytes apart.
        num_rows: T * HEADS.
        num_slots: Tokens that the cache has room for.
        DIMS: The smallest power of two >= D.
        ROWS: Rows of a program.
        UNIT: See `k8v4.rotation_unit`.
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
    nan = tl.max(((k != k) | (v != v)).to(tl.int32), axis=1) > 0
    k, key_scale_bits = _scaled(k, nan, D, UNIT, _KEY_STEPS)
    v, value_scale_bits = _scaled(v, nan, D, UNIT, _VALUE_STEPS)
    key_ptrs = cache_ptr + (base + in_page * D)[:, None] + offs_d[None, :]
    tl.store(key_ptrs, rounded(k, _KEY_STEPS).to(tl.uint8), mask=mask)
    # The clamp keeps the compiler from fusing `v`, a product, with this addition; see `rounded`.
    v = tl.minimum(tl.maximum(v, -_MIDDLE_CODE), _MIDDLE_CODE) + _MIDDLE_CODE
    codes = rounded(v, 2.0 * _MIDDLE_CODE) & _CODE_BITS
    low, high = tl.split(tl.reshape(codes, [ROWS, DIMS // 2, 2]))
    offs_pair = tl.arange(0, DIMS // 2)
    tl.store(
        cache_ptr + (base + KEY_BYTES + in_page * (D // 2))[:, None] + offs_pair[None, :],
        (low | (high << 4)).to(tl.uint8),
        mask=mask_row[:, None] & (offs_pair < D // 2)[None, :],
    )  # fmt: skip

    scale_ptrs = cache_ptr + (base + KEY_BYTES + VALUE_BYTES)
    scale_ptrs = scale_ptrs.to(tl.pointer_type(tl.int16)) + in_page
    tl.store(scale_ptrs, key_scale_bits.to(tl.int16), mask=mask_row)
    tl.store(scale_ptrs + PAGE, value_scale_bits.to(tl.int16), mask=mask_row)


def quantise_and_store(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    debug: bool = False,
) -> None:
    """Quantise tokens and write them into their slots, in the layout `LINEAR`.

    The rest of the cache is unchanged. A token whose slot is past the end of the cache is skipped,
    because a kernel cannot raise an error; with `debug`, the call raises one. If a call names a
    slot twice, the slot gets either token or a mixture of both. vLLM never names a slot twice.

    Args:
        key: bfloat16, float16 or float32 [T, H, D], any strides.
        value: Of the same shape and dtype, any strides.
        cache: uint8 [num_blocks, H, N, slot_bytes(D)], contiguous within a block. The stride
            between blocks is even; a multiple of 16 gives the widest stores.
        slot_mapping: int64 or int32 [T'] with T' <= T, block * N + token within the block; the
            tokens after the first T' are padding. A token whose slot is negative is not written.
        debug: Also check the slots, which waits for the device.

    Raises:
        ValueError: A tensor has the wrong shape, dtype or strides. Nothing has been written then.
    """
    inputs.check_store(key, value, cache, slot_mapping, cache.device)
    num_tokens = slot_mapping.shape[0]
    _, num_heads, head_size = key.shape
    blocks, _, page_size, _ = cache.shape
    num_slots = blocks * page_size
    # Scales are stored as 16-bit words.
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
    launcher(quantise_and_store_kernel, (triton.cdiv(num_rows, rows),))(
        key, *key.stride(),
        value, *value.stride(),
        cache, cache.stride(0),
        slot_mapping, slot_mapping.stride(0),
        num_rows, num_slots,
        HEADS=num_heads, D=head_size, DIMS=dims, PAGE=page_size,
        ROWS=rows, UNIT=k8v4.rotation_unit(head_size),
        num_warps=4,
    )  # fmt: skip
