# SPDX-License-Identifier: Apache-2.0
"""The attention kernel: one for every number of new tokens.

Operands are swapped, so that the codes are the left operand of tensor cores, which they reach in
registers without a transposition, and every query row of a KV head shares each byte read:

    S^T [keys, rows] = K Q^T          O^T [dims, rows] = V^T (P scale)

Scores are kept in base 2. With code, scale and zero of a value, p the weights of a row:

    out = rotate((sum p scale code + sum p zero) / sum p)

so that a scale and a zero are applied to a weight once, not to D values, and the rotation, see
`reference.rotate`, is undone once for each row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_hybrid_kv.kernels.triton.convert import (
    HIGH_CODE_UNIT,
    INTEGER_KEY_UNIT,
    LOW_CODE_UNIT,
    KeyWords,
    key_words,
    value_words,
)
from vllm_hybrid_kv.kernels.triton.plan import ITEM_FIELDS, key_range, key_tiles
from vllm_hybrid_kv.kernels.triton.rotation import turned_quarter

_FIELDS = tl.constexpr(ITEM_FIELDS)
_NATIVE_PTX = tl.constexpr(int(KeyWords.NATIVE_PTX))
_KEY_UNIT = tl.constexpr(INTEGER_KEY_UNIT)
_LOW_UNIT = tl.constexpr(1.0 / LOW_CODE_UNIT)
_HIGH_UNIT = tl.constexpr(1.0 / HIGH_CODE_UNIT)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)

# Exponents of float32. Weights times scales are brought below 2^15 before they become fp16, by a
# power of two that follows the largest scale met: fp16 then holds what lies up to 2^29 below
# with all of its bits, and no scale overflows it.
_BIAS = tl.constexpr(127)
_SMALLEST_SCALE = tl.constexpr(127 - 24)  # fp16's smallest denormal
_WEIGHT_BITS = tl.constexpr(14)
_LARGEST_HALF = tl.constexpr(65504.0)


@triton.jit
def _power_of_two(exponent):  # type: ignore[no-untyped-def]
    """Return 2 to the int32 `exponent`, -126 to 127, as float32."""
    return ((exponent + _BIAS) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    """Return tanh, `1 - 2 / (1 + e^2x)`; both infinities of the exponential give +-1."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * _LOG2_E)))


@triton.jit
def _both_halves(words):  # type: ignore[no-untyped-def]
    """Return the two fp16 numbers of each int32 as float32, in their order in memory."""
    low = words.to(tl.int16).to(tl.float16, bitcast=True)
    high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.reshape(tl.join(low, high), [2 * words.shape[0]]).to(tl.float32)


@triton.jit
def _sum_in_threads(x, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return [LANES, 8, rows], sums over those keys of float32 [keys, rows] that a thread holds.

    Tensor cores leave a thread the keys 8 apart in each 16, of every LANES-th 16.
    """
    KEYS: tl.constexpr = x.shape[0] // (16 * LANES)
    apart = tl.reshape(x, [KEYS, LANES, 2, 8, x.shape[1]])
    return tl.sum(tl.sum(apart, axis=2), axis=0)


@triton.jit
def _attend_tile(  # type: ignore[no-untyped-def]
    tile, top, total, offset, exponent, out0, out1, out2, out3,
    query_even, query_odd, unit, position,
    cache, page_stride, head_offset, block_row, first_key, end_key, window, soft_cap,
    D: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    KEY_WAY: tl.constexpr, VALUE_WAY: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, MASKED: tl.constexpr,
    ONE_PAGE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Take one tile of keys into the running results of a row tile.

    Args:
        top: float32 [rows], largest score so far.
        total: float32 [LANES, 8, rows], sums of weights relative to it.
        offset: float32 [LANES, 8, rows], sums of weights times zeros. Like `total` summed over
            threads after the last tile only: sums across threads cost more than all else.
        exponent: int32, float32's exponent of the largest scale so far.
        out0: float32 [dims / 4, rows], sums of weights times scales times codes, dims 4 i; `out1`
            to `out3` dims 4 i + 1 to 4 i + 3. Times `2^(14 - exponent)` and the code's unit.
        unit: float32 [rows], factor of the scores, to base 2 unless SOFT_CAP.
        position: int32 [rows], with MASKED; negative before the first key.
        block_row: The request's row of the block table.
        first_key: First key that some row sees, with MASKED and WINDOW.
        end_key: The key behind the last that some row sees.
        MASKED: Whether some key of the tile may be one that some row does not see.
        ONE_PAGE: Whether all keys of a tile are in one page.
    """
    HALF: tl.constexpr = D // 2
    QUARTER: tl.constexpr = D // 4
    HALVES: tl.constexpr = query_even.shape[0]
    QUARTERS: tl.constexpr = out0.shape[0]
    KEY_WORDS: tl.constexpr = PAGE * HALF
    VALUE_WORDS: tl.constexpr = PAGE * QUARTER

    # All in 16-bit words: two keys, four values, one scale.
    n = tl.arange(0, BLOCK_N)
    half = tl.arange(0, HALVES)
    quarter = tl.arange(0, QUARTERS)
    pair = tl.arange(0, BLOCK_N // 2)
    key = tile * BLOCK_N + n
    words = cache.to(tl.pointer_type(tl.int16))
    if ONE_PAGE:
        # The table has an entry for every tile in range.
        block = tl.load(block_row + tile * BLOCK_N // PAGE)
        region = block.to(tl.int64) * page_stride + head_offset
        region = tl.multiple_of(region, 8)
        start = tile * BLOCK_N % PAGE
        key_at = (words + region + start * HALF) + (n * HALF)[:, None] + half[None, :]
        value_at = words + (region + KEY_WORDS + start * QUARTER)
        value_at = value_at + (n * QUARTER)[None, :] + quarter[:, None]
        pair_at = words + (region + KEY_WORDS + VALUE_WORDS + start) + 2 * pair
    else:
        if MASKED:
            block = tl.load(block_row + key // PAGE, mask=key < end_key, other=0)
        else:
            block = tl.load(block_row + key // PAGE)
        region = block.to(tl.int64) * page_stride + head_offset
        region = tl.max_constancy(tl.multiple_of(region, [8]), [16])
        in_page = key % PAGE
        key_at = words + (region + in_page * HALF)[:, None] + half[None, :]
        value_at = words + (region + KEY_WORDS + in_page * QUARTER)[None, :] + quarter[:, None]
        pair_key = tile * BLOCK_N + 2 * pair
        if MASKED:
            block = tl.load(block_row + pair_key // PAGE, mask=pair_key < end_key, other=0)
        else:
            block = tl.load(block_row + pair_key // PAGE)
        region = block.to(tl.int64) * page_stride + head_offset
        pair_at = words + (region + (KEY_WORDS + VALUE_WORDS)) + pair_key % PAGE
    if HALVES == HALF:
        key_bits = tl.load(key_at)
        value_bits = tl.load(value_at)
    else:
        key_bits = tl.load(key_at, mask=(half < HALF)[None, :], other=0)
        value_bits = tl.load(value_at, mask=(quarter < QUARTER)[:, None], other=0)
    # Scales and zeros in one load of 32-bit words: Triton fetches a load ahead only if it leads
    # to a product of tensor cores, and in no smaller pieces. Zeros alone do not.
    both_at = pair_at[:, None] + (tl.arange(0, 2) * PAGE)[None, :]
    scale_words, zero_words = tl.split(tl.load(both_at.to(tl.pointer_type(tl.int32))))
    scale, zero = _both_halves(scale_words), _both_halves(zero_words)
    # A token whose scale is not finite makes every row that sees it NaN, and no other row. The
    # NaN travels with the zeros, which are masked for each row. In the product one NaN or
    # infinity would reach all rows.
    finite = tl.abs(scale) <= _LARGEST_HALF
    scale = tl.where(finite, scale, 0.0)
    zero = tl.where(finite, zero, float("nan"))
    if MASKED:
        # The bytes of a token that no row sees may hold a scale of any size.
        scale = tl.where(key < end_key, scale, 0.0)
        if WINDOW:
            scale = tl.where(key >= first_key, scale, 0.0)

    even, odd = key_words(key_bits, KEY_WAY)
    scores = tl.dot(even, query_even)
    scores = tl.dot(odd, query_odd, scores) * unit[None, :]
    if SOFT_CAP:
        scores = _tanh(scores / soft_cap) * (soft_cap * _LOG2_E)
    if MASKED:
        seen = (key < end_key)[:, None] & (position >= 0)[None, :]
        if CAUSAL:
            seen = seen & (key[:, None] <= position[None, :])
        if WINDOW:
            seen = seen & (key[:, None] > position[None, :] - window)
            seen = seen & (key[:, None] < position[None, :] + window)
        scores = tl.where(seen, scores, -float("inf"))

    new_top = tl.maximum(top, tl.max(scores, axis=0))
    if MASKED:
        # A row that has seen no key yet: weights relative to 0, all of them 0.
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
    else:
        base = new_top
    shrink = tl.exp2(top - base)
    weight = tl.exp2(scores - base[None, :])
    lane_shrink = shrink[None, None, :]
    total = total * lane_shrink + _sum_in_threads(weight, LANES)
    zeros = weight * zero[:, None]
    if MASKED:
        zeros = tl.where(scores == -float("inf"), 0.0, zeros)
    offset = offset * lane_shrink + _sum_in_threads(zeros, LANES)

    largest = tl.max(scale, axis=0).to(tl.int32, bitcast=True) >> 23
    new_exponent = tl.maximum(exponent, largest)
    scaled = weight * (scale * _power_of_two(-new_exponent + (_WEIGHT_BITS + _BIAS)))[:, None]
    scaled = scaled.to(tl.float16)
    shrink = (shrink * _power_of_two(exponent - new_exponent))[None, :]
    code0, code1, code2, code3 = value_words(value_bits, VALUE_WAY)
    out0 = tl.dot(code0, scaled, out0 * shrink)
    out1 = tl.dot(code1, scaled, out1 * shrink)
    out2 = tl.dot(code2, scaled, out2 * shrink)
    out3 = tl.dot(code3, scaled, out3 * shrink)
    return new_top, total, offset, new_exponent, out0, out1, out2, out3


# A launch would compile anew where one of these turned 1 or a multiple of 16.
@triton.jit(
    do_not_specialize=[
        "lse_token", "lse_head", "page_stride", "block_table_row", "window", "soft_cap", "scale",
    ]
)  # fmt: skip
def attend_kernel(  # type: ignore[no-untyped-def]
    query, query_token, query_head,
    out, out_token, out_head,
    lse, lse_token, lse_head,
    cache, page_stride,
    block_table, block_table_row,
    seq_lens, query_start_loc, items, sinks,
    partial_out, partial_lse,
    scale, window, soft_cap,
    GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    DIMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr,
    PARTIAL_ROWS: tl.constexpr, UNIT: tl.constexpr,
    KEY_WAY: tl.constexpr, VALUE_WAY: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
    SINKS: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Attend with one row tile to one split of its keys; see `reference.attend` for the formula.

    The grid is [programs of the plan, KV heads].

    Args:
        query: bf16, fp16 or fp32 [T, H GROUP, D]; strides in elements, dims contiguous.
        out: Likewise; written for row tiles of one split.
        lse: float32 [T, H GROUP], natural logarithms, written likewise with LSE.
        cache: uint8 [blocks, H, PAGE, slot]; `page_stride` 16-bit words between blocks.
        block_table: int32 [requests, blocks of a request].
        seq_lens: int32 [requests].
        query_start_loc: int32 [requests + 1].
        items: int32 [programs, ITEM_FIELDS], from `plan_attention`.
        sinks: float32 [H GROUP] with SINKS.
        partial_out: float32 [parts, H, PARTIAL_ROWS, D], written for several splits.
        partial_lse: float32 [parts, H, PARTIAL_ROWS], likewise, to base 2.
        scale: Factor of the scores.
        DIMS: The power of two that is not below D.
        LANES: Warps that tensor cores give different keys.
        UNIT: Factor of rotated values, see `rotation_unit`.
        KEY_WAY: One of `KeyWords`.
        VALUE_WAY: One of `ValueWords`.
    """
    HALVES: tl.constexpr = DIMS // 2
    QUARTERS: tl.constexpr = DIMS // 4
    HEAD_WORDS: tl.constexpr = PAGE * (D + D // 2 + 4) // 2
    # Large heads have no registers left for what the shortcut keeps: Triton 3.9 then spills on
    # compute capability 10.0.
    ONE_PAGE: tl.constexpr = PAGE % BLOCK_N == 0 and DIMS <= 128
    program = tl.program_id(0)
    kv_head = tl.program_id(1)
    kv_heads = tl.num_programs(1)
    request = tl.load(items + program * _FIELDS)
    if request < 0:
        return
    first_row = tl.load(items + program * _FIELDS + 1)
    split = tl.load(items + program * _FIELDS + 2)
    splits = tl.load(items + program * _FIELDS + 3)
    first_token = tl.load(query_start_loc + request)
    queries = tl.load(query_start_loc + request + 1) - first_token
    length = tl.load(seq_lens + request)

    m = tl.arange(0, BLOCK_M)
    row = first_row + m
    here = row < queries * GROUP
    token = (first_token + row // GROUP).to(tl.int64)
    head = kv_head * GROUP + row % GROUP

    half = tl.arange(0, HALVES)
    even_at = query + (token * query_token + head * query_head)[None, :] + 2 * half[:, None]
    load = here[None, :] & (half < D // 2)[:, None]
    query_even = tl.load(even_at, mask=load, other=0.0).to(tl.float32)
    query_odd = tl.load(even_at + 1, mask=load, other=0.0).to(tl.float32)
    # Rows are brought below 1 by a power of two, so that fp16 holds large and small ones alike
    # with all bits of bf16; dividing by the largest number itself would round every one.
    largest = tl.maximum(
        tl.max(tl.abs(query_even), axis=0), tl.max(tl.abs(query_odd), axis=0)
    )  # fmt: skip
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - _BIAS
    exponent = tl.minimum(tl.maximum(exponent, -100), 100)
    unit = _power_of_two(exponent + 1) * scale
    query_even = (query_even * _power_of_two(-1 - exponent)[None, :]).to(tl.float16)
    query_odd = (query_odd * _power_of_two(-1 - exponent)[None, :]).to(tl.float16)
    if KEY_WAY != _NATIVE_PTX:
        unit = unit * _KEY_UNIT
    if not SOFT_CAP:
        unit = unit * _LOG2_E

    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([LANES, 8, BLOCK_M], tl.float32)
    offset = tl.zeros([LANES, 8, BLOCK_M], tl.float32)
    scale_exponent = tl.full([], _SMALLEST_SCALE, tl.int32)
    out0 = tl.zeros([QUARTERS, BLOCK_M], tl.float32)
    out1 = tl.zeros([QUARTERS, BLOCK_M], tl.float32)
    out2 = tl.zeros([QUARTERS, BLOCK_M], tl.float32)
    out3 = tl.zeros([QUARTERS, BLOCK_M], tl.float32)

    first_tile, last_tile = key_tiles(
        length, queries, first_row, window, GROUP, BLOCK_M, BLOCK_N, CAUSAL, WINDOW
    )
    tiles = last_tile - first_tile
    last_tile = first_tile + tiles * (split + 1) // splits
    first_tile = first_tile + tiles * split // splits
    # Up to here every row sees every key; of a window the ends are few tiles of not many.
    clear = first_tile
    if not WINDOW:
        clear = length
        if CAUSAL:
            clear = tl.minimum(clear, length - queries + first_row // GROUP + 1)
        clear = tl.maximum(clear, 0) // BLOCK_N
        clear = tl.minimum(tl.maximum(clear, first_tile), last_tile)
    block_row = block_table + request.to(tl.int64) * block_table_row
    head_offset = kv_head * HEAD_WORDS
    for tile in tl.range(first_tile, clear):
        top, total, offset, scale_exponent, out0, out1, out2, out3 = _attend_tile(
            tile, top, total, offset, scale_exponent, out0, out1, out2, out3,
            query_even, query_odd, unit, m,
            cache, page_stride, head_offset, block_row, 0, length, window, soft_cap,
            D, PAGE, BLOCK_N, KEY_WAY, VALUE_WAY, CAUSAL, WINDOW, SOFT_CAP, False, ONE_PAGE,
            LANES,
        )  # fmt: skip
    # What follows the loop over most of the tiles is read again, so that nothing made of it lies
    # in registers during the loop, which needs them all.
    first_row = tl.load(items + program * _FIELDS + 1, volatile=True)
    its_part = tl.load(items + program * _FIELDS + 4, volatile=True)
    first_token = tl.load(query_start_loc + request, volatile=True)
    queries = tl.load(query_start_loc + request + 1, volatile=True) - first_token
    row = first_row + m
    here = row < queries * GROUP
    token = (first_token + row // GROUP).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    # Rows behind the last see what the last sees.
    position = length - queries + tl.minimum(row // GROUP, queries - 1)
    first_key, end_key = key_range(
        length, queries, first_row, window, GROUP, BLOCK_M, CAUSAL, WINDOW
    )
    for tile in tl.range(clear, last_tile):
        top, total, offset, scale_exponent, out0, out1, out2, out3 = _attend_tile(
            tile, top, total, offset, scale_exponent, out0, out1, out2, out3,
            query_even, query_odd, unit, position,
            cache, page_stride, head_offset, block_row, first_key, end_key, window, soft_cap,
            D, PAGE, BLOCK_N, KEY_WAY, VALUE_WAY, CAUSAL, WINDOW, SOFT_CAP, True,
            ONE_PAGE, LANES,
        )  # fmt: skip

    total = tl.sum(tl.sum(total, axis=0), axis=0)
    offset = tl.sum(tl.sum(offset, axis=0), axis=0)
    if SINKS:  # noqa: SIM102 - decided when compiled, and `sinks` may be no sinks
        if splits == 1:
            sink = tl.load(sinks + head, mask=here, other=-float("inf")) * _LOG2_E
            new_top = tl.maximum(top, sink)
            base = tl.where(new_top == -float("inf"), 0.0, new_top)
            shrink = tl.exp2(top - base)
            total = total * shrink + tl.exp2(sink - base)
            offset = offset * shrink
            out0, out1 = out0 * shrink[None, :], out1 * shrink[None, :]
            out2, out3 = out2 * shrink[None, :], out3 * shrink[None, :]
            top = new_top
    # Not `total > 0`, which would turn a NaN into 0.
    inverse = tl.where(total == 0.0, 0.0, UNIT / total)
    low = (inverse * (_power_of_two(scale_exponent - (_WEIGHT_BITS + _BIAS)) * _LOW_UNIT))[None, :]
    high = low * (_HIGH_UNIT / _LOW_UNIT)
    constant = (offset * inverse)[None, :]
    out0, out1 = out0 * low + constant, out1 * high + constant
    out2, out3 = out2 * low + constant, out3 * high + constant
    # Rotated values were summed. The stage of stride 1 is among the four, the others within each.
    four = (out0 + out1) + (out2 + out3)
    out0 = turned_quarter(four - 2.0 * out0, D)
    out1 = turned_quarter(four - 2.0 * out1, D)
    out2 = turned_quarter(four - 2.0 * out2, D)
    out3 = turned_quarter(four - 2.0 * out3, D)
    low_pair = tl.join(out0, out1)
    high_pair = tl.join(out2, out3)
    # [dims / 4, rows, which of a pair, which pair] to [dims, rows].
    result = tl.permute(tl.join(low_pair, high_pair), (0, 3, 2, 1))
    result = tl.reshape(result, [DIMS, BLOCK_M])
    dim = tl.arange(0, DIMS)
    result_lse = top + tl.log2(total)
    keep = here[None, :] & (dim < D)[:, None]
    if splits == 1:
        out_at = out + (token * out_token + head * out_head)[None, :] + dim[:, None]
        tl.store(out_at, result.to(out.dtype.element_ty), mask=keep)
        if LSE:
            lse_at = lse + token * lse_token + head * lse_head
            tl.store(lse_at, result_lse * _LN_2, mask=here)
    else:
        part = (its_part.to(tl.int64) * kv_heads + kv_head) * PARTIAL_ROWS + m
        tl.store(partial_out + (part * D)[None, :] + dim[:, None], result, mask=keep)
        tl.store(partial_lse + part, result_lse, mask=here)
