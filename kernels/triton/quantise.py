# SPDX-License-Identifier: Apache-2.0
"""Quantise new tokens and store them in k8v4 pages, on GPUs, in one launch for K and V.

The arithmetic is `reference.quantise`, bit for bit; the place of each byte is `k8v4.PageFormat`
with the layout `LINEAR`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_hybrid_kv.kernels import inputs, k8v4
from vllm_hybrid_kv.kernels.triton import convert
from vllm_hybrid_kv.kernels.triton.convert import half_rounded_down, key_codes, widened_half
from vllm_hybrid_kv.kernels.triton.rotation import rotation_unit, turned

_VALUE_MAX = tl.constexpr(k8v4.VALUE_MAX)
_LAST_CODE = tl.constexpr(float(k8v4.VALUE_LEVELS - 1))
_CODE_BITS = tl.constexpr(k8v4.VALUE_LEVELS - 1)
_NAN_SCALE = tl.constexpr(k8v4.NAN_SCALE_BITS)
# Adding 1.5 x 2^23 leaves float32 a last bit of 1: numbers are rounded half to even, and the
# integer stands in the low bits.
_INTEGER_ROUNDER = tl.constexpr(1.5 * 2.0**23)

NUMBERS_PER_PROGRAM = 4096
"""Keys that a program takes, and as many values: 32 of each for every thread of four warps, whose
value codes are the 16 bytes that a thread stores at once."""


# A launch would compile anew where one of these turned 1 or a multiple of 16.
@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def quantise_and_store_kernel(  # type: ignore[no-untyped-def]
    key, key_token, key_head, key_dim,
    value, value_token, value_head, value_dim,
    cache, cache_block,
    slots, slot_stride,
    num_rows, num_slots,
    HEADS: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, UNIT: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Store rows (token, head) of K and V as codes, see `reference.quantise` for the formula.

    Args:
        key: bf16, fp16 or fp32 [T, HEADS, D]; strides in elements.
        value: Likewise.
        cache: uint8; regions of PAGE tokens, `cache_block` bytes between blocks.
        slots: int64 or int32 [T].
        num_rows: T * HEADS.
        num_slots: Tokens that the cache has room for.
        DIMS: The power of two that is not below D.
        ROWS: Rows of a program.
        UNIT: Factor of rotated values, see `rotation_unit`.
        NATIVE: Whether Triton converts to e4m3fn; see `key_codes`.
    """
    KEY_BYTES: tl.constexpr = PAGE * D
    VALUE_BYTES: tl.constexpr = PAGE * (D // 2)
    HEAD_BYTES: tl.constexpr = KEY_BYTES + VALUE_BYTES + 4 * PAGE
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = row // HEADS, row % HEADS
    slot = tl.load(slots + token * slot_stride, mask=row < num_rows, other=-1).to(tl.int64)
    # A slot past the end would spoil another tensor, and a kernel cannot raise.
    kept = (slot >= 0) & (slot < num_slots)
    slot = tl.where(kept, slot, 0)
    in_page = slot % PAGE
    region = slot // PAGE * cache_block + head * HEAD_BYTES

    dim = tl.arange(0, DIMS)
    here = kept[:, None] & (dim < D)[None, :]
    k = tl.load(
        key + (token * key_token + head * key_head)[:, None] + (dim * key_dim)[None, :],
        mask=here, other=0.0,
    ).to(tl.float32)  # fmt: skip
    v = tl.load(
        value + (token * value_token + head * value_head)[:, None] + (dim * value_dim)[None, :],
        mask=here, other=0.0,
    ).to(tl.float32)  # fmt: skip
    tl.store(
        cache + (region + in_page * D)[:, None] + dim[None, :],
        key_codes(k, NATIVE), mask=here,
    )  # fmt: skip

    nan = tl.max(((k != k) | (v != v)).to(tl.int32), axis=1) > 0
    v = tl.where(nan[:, None], 0.0, tl.minimum(tl.maximum(v, -_VALUE_MAX), _VALUE_MAX))
    v = turned(v, D) * UNIT
    v = tl.minimum(tl.maximum(v, -_VALUE_MAX), _VALUE_MAX)
    lowest = tl.min(tl.where((dim < D)[None, :], v, _VALUE_MAX), axis=1)
    highest = tl.max(tl.where((dim < D)[None, :], v, -_VALUE_MAX), axis=1)
    zero_bits = half_rounded_down(lowest)
    zero = widened_half(zero_bits)
    # Both divisions are rounded to nearest; Triton's `/` is not.
    step = tl.math.div_rn(highest - zero, tl.full([ROWS], _LAST_CODE, tl.float32))
    # Rounding up is rounding the negative down; the sign bit is taken off again below.
    scale_bits = half_rounded_down(-step) & 0x7FFF
    scale = widened_half(scale_bits)
    inverse = tl.math.div_rn(
        tl.full([ROWS], 1.0, tl.float32), tl.where(scale > 0, scale, 1.0)
    )  # fmt: skip
    inverse = tl.where(scale > 0, inverse, 0.0)
    # Kept in range before it is rounded, which gives the same code and keeps the compiler from
    # fusing the product with the sum: a fused one rounds once instead of twice.
    steps = tl.minimum(tl.maximum((v - zero[:, None]) * inverse[:, None], 0.0), _LAST_CODE)
    codes = (steps + _INTEGER_ROUNDER).to(tl.int32, bitcast=True) & _CODE_BITS
    low, high = tl.split(tl.reshape(codes, [ROWS, DIMS // 2, 2]))
    pair = tl.arange(0, DIMS // 2)
    tl.store(
        cache + (region + KEY_BYTES + in_page * (D // 2))[:, None] + pair[None, :],
        (low | (high << 4)).to(tl.uint8),
        mask=kept[:, None] & (pair < D // 2)[None, :],
    )  # fmt: skip

    scale_bits = tl.where(nan, _NAN_SCALE, scale_bits)
    zero_bits = tl.where(zero == 0.0, 0, zero_bits)  # the bits of a zero of either sign
    numbers = (cache + (region + KEY_BYTES + VALUE_BYTES)).to(tl.pointer_type(tl.int16)) + in_page
    tl.store(numbers, scale_bits.to(tl.int16), mask=kept)
    tl.store(numbers + PAGE, zero_bits.to(tl.int16), mask=kept)


def _check_slots(slots: torch.Tensor, num_slots: int) -> None:
    if len(slots) and int(slots.max()) >= num_slots:
        expected = f"below the cache's {num_slots} slots"
        raise inputs.store_error("slot_mapping", expected, f"slot {int(slots.max())}")
    inputs.check_duplicates(slots)


def quantise_and_store(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    native: bool | None = None,
    debug: bool = False,
) -> None:
    """Quantise tokens and write them into their slots, in the layout `LINEAR`.

    Nothing else in the cache is touched. A slot past the end of the cache is not written, since
    a kernel cannot raise; `debug` refuses it. If one call names a slot twice, its bytes are those
    of either token or a mixture; vLLM never does so.

    Args:
        key: bfloat16, float16 or float32 [T, H, D], any strides.
        value: Likewise, of the same shape and dtype.
        cache: uint8 [num_blocks, H, N, slot_bytes(D)], contiguous within a block; blocks may
            stand any even number of bytes apart, stores are widest with a multiple of 16.
        slot_mapping: int64 or int32 [T'] with T' <= T, block * N + token within the block; the
            tokens after the first T' are padding. A token whose slot is negative is not written.
        native: Whether the device converts to e4m3fn itself; found out if None. The stored bits
            are the same.
        debug: Check the slots as well, which waits for the device.

    Raises:
        ValueError: A tensor has the wrong shape, dtype or strides. Nothing has been written then.
    """
    inputs.check_store(key, value, cache, slot_mapping, cache.device)
    num_tokens = slot_mapping.shape[0]
    _, num_heads, head_size = key.shape
    # Scales and zeros are stored as 16-bit words.
    if cache.shape[0] > 1 and cache.stride(0) % 2:
        expected = "with an even number of bytes between blocks"
        raise inputs.store_error("cache", expected, list(cache.stride()))
    page_size = cache.shape[2]
    num_slots = cache.shape[0] * page_size
    if debug:
        _check_slots(slot_mapping, num_slots)
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
        NATIVE=convert.has_native_e4m3(key.device) if native is None else native,
        num_warps=4,
    )  # fmt: skip
