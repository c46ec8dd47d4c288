# SPDX-License-Identifier: Apache-2.0
"""The attention kernel. The same kernel serves any number of new tokens.

All query rows of a KV head share each byte that is read. Both matrix products are computed
transposed, so that the codes are the left operand of the tensor cores and reach them in registers
without a transposition:

    S^T [keys, rows] = K Q^T          O^T [dims, rows] = V^T (P scale)

A score is a product of int8 codes, times the key's scale and the query row's scale, in base 2. If
p is the weight that a row gives to a token, and code and scale are those of the token's value:

    out = rotate((sum p scale code - 7.5 sum p scale) / sum p)

So a scale multiplies one weight instead of D values, and the rotation (see `reference.rotate`) is
undone once for each row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.triton.convert import (
    HIGH_CODE_UNIT,
    LOW_CODE_UNIT,
    decode_values,
    rounded,
)
from vllm_hybrid_kv.kernels.triton.plan import (
    PIECE_FIELDS,
    ROW_TILE_FIELDS,
    key_range,
    key_tiles,
)
from vllm_hybrid_kv.kernels.triton.rotation import rotated, rotated_quarter

_KEY_STEPS = tl.constexpr(float(k8v4.KEY_STEPS))
_MIDDLE_CODE = tl.constexpr(k8v4.MIDDLE_VALUE_CODE)
_LOW_UNIT = tl.constexpr(1.0 / LOW_CODE_UNIT)
_HIGH_UNIT = tl.constexpr(1.0 / HIGH_CODE_UNIT)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# Float32 exponents. A product of a weight and a scale is multiplied by a power of two before it
# becomes fp16. The power of two follows the largest scale so far and keeps products below 2^15, so
# none overflows. Products down to 2^-29 of the largest are normal fp16 numbers.
_BIAS = tl.constexpr(127)
_SMALLEST_SCALE = tl.constexpr(127 - 24)  # fp16's smallest denormal
_WEIGHT_BITS = tl.constexpr(14)
_LARGEST_HALF = tl.constexpr(65504.0)


@triton.jit
def _power_of_two(exponent):  # type: ignore[no-untyped-def]
    """Return 2 to the int32 `exponent`, -126 to 127, as float32."""
    return ((exponent + _BIAS) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _both_halves(words):  # type: ignore[no-untyped-def]
    """Unpack each int32 into its two fp16 numbers, in memory order, and return them as float32."""
    low = words.to(tl.int16).to(tl.float16, bitcast=True)
    high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.reshape(tl.join(low, high), [2 * words.shape[0]]).to(tl.float32)


@triton.jit
def _sum_in_threads(x, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum float32 `x` [keys, rows] over the keys of each thread, and return [LANES, 8, rows].

    After a tensor-core product, a thread holds two keys, 8 apart, of every LANES-th group of 16.
    """
    KEYS: tl.constexpr = x.shape[0] // (16 * LANES)
    apart = tl.reshape(x, [KEYS, LANES, 2, 8, x.shape[1]])
    return tl.sum(tl.sum(apart, axis=2), axis=0)


@triton.jit
def _load_tile(  # type: ignore[no-untyped-def]
    tile, pages, end_key,
    D: tl.constexpr, DIMS: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, ONE_PAGE: tl.constexpr,
):  # fmt: skip
    """Load a tile of tokens from its pages.

    Returns:
        int8 [keys, dims], the key codes; int16 [dims / 4, keys], the value codes; float32 [keys],
        the scales of the keys and of the values.
    """
    cache_ptr, stride_cache_block, head_offset, block_table_row_ptr = pages
    QUARTER_D: tl.constexpr = D // 4
    KEY_WORDS: tl.constexpr = PAGE * (D // 2)
    VALUE_WORDS: tl.constexpr = PAGE * QUARTER_D

    # Keys are addressed in bytes, values and scales in 16-bit words: four values or one scale.
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, DIMS)
    offs_quarter = tl.arange(0, DIMS // 4)
    offs_pair = tl.arange(0, BLOCK_N // 2)
    key_pos = tile * BLOCK_N + offs_n
    words_ptr = cache_ptr.to(tl.pointer_type(tl.int16))
    codes_ptr = cache_ptr.to(tl.pointer_type(tl.int8))
    if ONE_PAGE:
        # The table has an entry for every tile in range.
        block = tl.load(block_table_row_ptr + tile * BLOCK_N // PAGE)
        base = tl.multiple_of(block.to(tl.int64) * stride_cache_block + head_offset, 8)
        start = tile * BLOCK_N % PAGE
        key_ptrs = codes_ptr + (tl.multiple_of(2 * base, 16) + start * D) + (offs_n * D)[:, None]
        key_ptrs = key_ptrs + offs_d[None, :]
        value_ptrs = words_ptr + (base + KEY_WORDS + start * QUARTER_D)
        value_ptrs = value_ptrs + (offs_n * QUARTER_D)[None, :] + offs_quarter[:, None]
        pair_ptrs = words_ptr + (base + KEY_WORDS + VALUE_WORDS + start) + 2 * offs_pair
    else:
        # Positions after the last key use the last key's block. A mask would occupy registers.
        last_key = end_key - 1
        in_table = tl.minimum(key_pos, last_key) if MASKED else key_pos
        block = tl.load(block_table_row_ptr + in_table // PAGE)
        base = block.to(tl.int64) * stride_cache_block + head_offset
        base = tl.max_constancy(tl.multiple_of(base, [8]), [16])
        in_page = key_pos % PAGE
        byte = tl.max_constancy(tl.multiple_of(2 * base, [16]), [16])
        key_ptrs = codes_ptr + (byte + in_page * D)[:, None] + offs_d[None, :]
        value_ptrs = words_ptr + (base + KEY_WORDS + in_page * QUARTER_D)[None, :]
        value_ptrs = value_ptrs + offs_quarter[:, None]
        pair_pos = tile * BLOCK_N + 2 * offs_pair
        in_table = tl.minimum(pair_pos, last_key) if MASKED else pair_pos
        block = tl.load(block_table_row_ptr + in_table // PAGE)
        base = block.to(tl.int64) * stride_cache_block + head_offset
        pair_ptrs = words_ptr + (base + (KEY_WORDS + VALUE_WORDS)) + pair_pos % PAGE
    if DIMS == D:
        key_codes = tl.load(key_ptrs)
        value_bits = tl.load(value_ptrs)
    else:
        key_codes = tl.load(key_ptrs, mask=(offs_d < D)[None, :], other=0)
        value_bits = tl.load(value_ptrs, mask=(offs_quarter < QUARTER_D)[:, None], other=0)
    # One load of 32-bit words gets both scales: Triton pipelines a load only if it leads to a
    # tensor-core product, and only in pieces of at least 32 bits.
    scale_ptrs = pair_ptrs[:, None] + (tl.arange(0, 2) * PAGE)[None, :]
    key_words, value_words = tl.split(tl.load(scale_ptrs.to(tl.pointer_type(tl.int32))))
    return key_codes, value_bits, _both_halves(key_words), _both_halves(value_words)


@triton.jit
def _score_tile(  # type: ignore[no-untyped-def]
    key_codes, key_scale, key_pos, query, end_key, window, soft_cap,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return float32 [keys, rows], the scores in base 2; -inf where a row does not see a key."""
    q_codes, qk_scale, query_pos = query
    qk = tl.dot(key_codes, q_codes, out_dtype=tl.int32).to(tl.float32)
    qk = qk * key_scale[:, None] * qk_scale[None, :]
    if SOFT_CAP:
        # tanh is `1 - 2 / (1 + e^2x)`. An exponential of 0 or infinity gives -1 or +1.
        tanh = 1.0 - 2.0 / (1.0 + tl.exp2(qk / soft_cap * (2.0 * LOG2_E)))
        qk = tanh * (soft_cap * LOG2_E)
    if MASKED:
        mask = tl.broadcast_to((key_pos < end_key)[:, None], qk.shape)
        if CAUSAL:
            mask = mask & (key_pos[:, None] <= query_pos[None, :])
        if WINDOW:
            mask = mask & (key_pos[:, None] > query_pos[None, :] - window)
            mask = mask & (key_pos[:, None] < query_pos[None, :] + window)
        qk = tl.where(mask, qk, -float("inf"))
    return qk


@triton.jit
def _softmax_step(  # type: ignore[no-untyped-def]
    qk, scale, finite, m_i, l_i, z_i, scale_exp, MASKED: tl.constexpr, LANES: tl.constexpr
):
    """Add the weights of a tile to the running sums of `_attend_tile`.

    Returns:
        The new m_i, l_i, z_i and scale_exp; fp16 [keys, rows], the weights times scales; float32
        [1, rows], the factor of the accumulators.
    """
    m_j = tl.maximum(m_i, tl.max(qk, axis=0))
    # A row that has seen no key yet has the maximum -inf. With the reference 0, all weights are 0.
    m_ref = tl.where(m_j == -float("inf"), 0.0, m_j) if MASKED else m_j
    alpha = tl.exp2(m_i - m_ref)
    p = tl.exp2(qk - m_ref[None, :])
    alpha_lanes = alpha[None, None, :]
    l_i = l_i * alpha_lanes + _sum_in_threads(p, LANES)

    largest = tl.max(scale, axis=0).to(tl.int32, bitcast=True) >> 23
    new_exp = tl.maximum(scale_exp, largest)
    scale = tl.where(finite, scale, float("nan"))
    p_scale = p * (scale * _power_of_two(-new_exp + (_WEIGHT_BITS + _BIAS)))[:, None]
    if MASKED:
        # Zero times NaN is NaN, so select 0 where the row does not see the token.
        p_scale = tl.where(qk == -float("inf"), 0.0, p_scale)
    p_scale = p_scale.to(tl.float16)
    alpha = (alpha * _power_of_two(scale_exp - new_exp))[None, :]
    z_i = z_i * alpha[:, None, :] + _sum_in_threads(p_scale.to(tl.float32), LANES)
    return m_j, l_i, z_i, new_exp, p_scale, alpha


@triton.jit
def _attend_tile(  # type: ignore[no-untyped-def]
    tile, state, query, pages, first_key, end_key, window, soft_cap,
    D: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    VALUE_PTX: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, MASKED: tl.constexpr,
    ONE_PAGE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to the running results of a row tile, and return the new results.

    Args:
        state: The running results:
            m_i: float32 [rows], largest score.
            l_i, z_i: float32 [LANES, 8, rows], each thread's sums of weights (relative to `m_i`)
                and of weights times scales (scaled like `acc0`). Adding up the threads costs more
                than all else, so it is left until after the last tile.
            scale_exp: int32, the biased float32 exponent of the largest scale.
            acc0 to acc3: float32 [dims / 4, rows], for every fourth dim, sums of weights times
                scales times codes, times `2^(14 + 127 - scale_exp)` and the unit of a code.
        query: int8 [dims, rows], the codes; float32 [rows], the factor of the scores, in base 2
            unless SOFT_CAP; int32 [rows], the positions, used only with MASKED. A negative
            position is before the first key.
        pages: The cache, its block stride and the offset of a KV head (both in 16-bit words), and
            the request's row of the block table.
        first_key: The first key that some row sees; used only with MASKED and WINDOW.
        end_key: 1 + the last key that some row sees.
        MASKED: Whether a row may not see every key of the tile.
        ONE_PAGE: Whether all keys of a tile are in one page.
    """
    m_i, l_i, z_i, scale_exp, acc0, acc1, acc2, acc3 = state
    DIMS: tl.constexpr = query[0].shape[0]
    key_codes, value_bits, key_scale, scale = _load_tile(
        tile, pages, end_key, D, DIMS, PAGE, BLOCK_N, MASKED, ONE_PAGE
    )
    key_pos = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    # A token whose scale is not finite makes every row that sees it NaN, and no other row.
    key_scale = tl.where(tl.abs(key_scale) <= _LARGEST_HALF, key_scale, float("nan"))
    finite = tl.abs(scale) <= _LARGEST_HALF
    scale = tl.where(finite, scale, 0.0)
    if MASKED:
        # The bytes of a token that no row sees may hold a scale of any size.
        scale = tl.where(key_pos < end_key, scale, 0.0)
        if WINDOW:
            scale = tl.where(key_pos >= first_key, scale, 0.0)

    qk = _score_tile(
        key_codes, key_scale, key_pos, query, end_key, window, soft_cap,
        CAUSAL, WINDOW, SOFT_CAP, MASKED,
    )  # fmt: skip
    m_i, l_i, z_i, scale_exp, p_scale, alpha = _softmax_step(
        qk, scale, finite, m_i, l_i, z_i, scale_exp, MASKED, LANES
    )
    v0, v1, v2, v3 = decode_values(value_bits, VALUE_PTX)
    return (
        m_i, l_i, z_i, scale_exp,
        tl.dot(v0, p_scale, acc0 * alpha), tl.dot(v1, p_scale, acc1 * alpha),
        tl.dot(v2, p_scale, acc2 * alpha), tl.dot(v3, p_scale, acc3 * alpha),
    )  # fmt: skip


@triton.jit
def _load_query(  # type: ignore[no-untyped-def]
    q_ptrs, mask_m, scale,
    D: tl.constexpr, DIMS: tl.constexpr, UNIT: tl.constexpr, SOFT_CAP: tl.constexpr,
):  # fmt: skip
    """Load query rows, round them as `reference.round_query` does, and return codes and factors.

    See `query` of `_attend_tile`.
    """
    offs_d = tl.arange(0, DIMS)
    q = tl.load(
        q_ptrs[:, None] + offs_d[None, :], mask=mask_m[:, None] & (offs_d < D)[None, :], other=0.0
    ).to(tl.float32)
    q = rotated(q, D)
    largest = tl.max(tl.abs(q), axis=1)
    steps = tl.full([q.shape[0]], _KEY_STEPS, tl.float32)
    inverse = tl.math.div_rn(steps, tl.where(largest > 0, largest, 1.0))
    q_codes = tl.trans(rounded(q * inverse[:, None], _KEY_STEPS).to(tl.int8))
    # Zero times NaN or infinity is NaN, so either of them makes all scores of its row NaN.
    qk_scale = (largest * (UNIT / _KEY_STEPS) + tl.sum(q * 0.0, axis=1)) * scale
    if not SOFT_CAP:
        qk_scale = qk_scale * LOG2_E
    return q_codes, qk_scale


@triton.jit
def _rotated_back(  # type: ignore[no-untyped-def]
    acc0, acc1, acc2, acc3, l_i, z_i, scale_exp, D: tl.constexpr, UNIT: tl.constexpr
):
    """Divide the accumulators by the sums of weights, and undo the rotation.

    `l_i` and `z_i` are the sums of all threads, float32 [rows]. Returns float32 [dims, rows].
    """
    # `l_i > 0` instead would turn a NaN into 0.
    inverse = tl.where(l_i == 0.0, 0.0, UNIT / l_i)
    weight_unit = inverse * _power_of_two(scale_exp - (_WEIGHT_BITS + _BIAS))
    low = (weight_unit * _LOW_UNIT)[None, :]
    high = low * (_HIGH_UNIT / _LOW_UNIT)
    offset = (z_i * weight_unit * -_MIDDLE_CODE)[None, :]
    acc0, acc1 = acc0 * low + offset, acc1 * high + offset
    acc2, acc3 = acc2 * low + offset, acc3 * high + offset
    # Undo the rotation. The stage of stride 1 combines the four accumulators. The other stages
    # work within each of them.
    total = (acc0 + acc1) + (acc2 + acc3)
    low_pair = tl.join(
        rotated_quarter(total - 2.0 * acc0, D), rotated_quarter(total - 2.0 * acc1, D)
    )
    high_pair = tl.join(
        rotated_quarter(total - 2.0 * acc2, D), rotated_quarter(total - 2.0 * acc3, D)
    )
    # [dims / 4, rows, which of a pair, which pair] to [dims, rows].
    acc = tl.permute(tl.join(low_pair, high_pair), (0, 3, 2, 1))
    return tl.reshape(acc, [4 * acc0.shape[0], acc0.shape[1]])


# Specialising these on 1 and on multiples of 16 would compile more kernels at run time.
@triton.jit(
    do_not_specialize=[
        "stride_lse_tok", "stride_lse_head", "stride_cache_block", "stride_block_table", "window",
        "soft_cap", "scale",
    ]
)  # fmt: skip
def attend_kernel(  # type: ignore[no-untyped-def]
    q_ptr, stride_q_tok, stride_q_head,
    out_ptr, stride_out_tok, stride_out_head,
    lse_ptr, stride_lse_tok, stride_lse_head,
    cache_ptr, stride_cache_block,
    block_table_ptr, stride_block_table,
    seq_lens_ptr, query_start_loc_ptr, pieces_ptr, row_tiles_ptr, sinks_ptr,
    partial_out_ptr, partial_lse_ptr,
    scale, window, soft_cap,
    GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    DIMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr,
    PARTIAL_ROWS: tl.constexpr, UNIT: tl.constexpr,
    VALUE_PTX: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
    SINKS: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Attend from the row tiles of a program; see `reference.attend` for the formula.

    The grid is [programs of the plan, KV heads].

    Args:
        q_ptr, out_ptr: [T, H GROUP, D]; strides in elements, dims contiguous. The kernel writes
            outputs only for row tiles that one program has alone.
        lse_ptr: float32 [T, H GROUP], natural logarithms; with LSE, written for these row tiles.
        cache_ptr: uint8 [blocks, H, PAGE, slot]; `stride_cache_block` in 16-bit words.
        pieces_ptr, row_tiles_ptr, partial_out_ptr, partial_lse_ptr: From `plan_attention`; the
            kernel writes partial results for the other row tiles.
        sinks_ptr: [H GROUP] with SINKS, any floating dtype.
        DIMS: The smallest power of two >= D.
        LANES: See `Tiling.lanes`.
        UNIT: See `k8v4.rotation_unit`.
        VALUE_PTX: See `decode_values`.
    """
    QUARTERS: tl.constexpr = DIMS // 4
    HEAD_WORDS: tl.constexpr = PAGE * (D + D // 2 + 4) // 2
    # Large heads have no registers left for the values that this shortcut keeps: with it Triton
    # 3.9 spills on compute capability 10.0.
    ONE_PAGE: tl.constexpr = PAGE % BLOCK_N == 0 and DIMS <= 128
    program = tl.program_id(0)
    kv_head_idx = tl.program_id(1)
    num_kv_heads = tl.num_programs(1)
    first_row_tile = tl.load(pieces_ptr + program * PIECE_FIELDS)
    end_row_tile = tl.load(pieces_ptr + program * PIECE_FIELDS + 1)
    for row_tile in tl.range(first_row_tile, end_row_tile):
        req_idx = tl.load(row_tiles_ptr + row_tile * ROW_TILE_FIELDS)
        exists = req_idx >= 0
        req_idx = tl.maximum(req_idx, 0)
        first_row = tl.load(row_tiles_ptr + row_tile * ROW_TILE_FIELDS + 1)
        # The part of the row tile's key tiles that is in this program's piece of the list.
        row_tile_pos = tl.load(row_tiles_ptr + row_tile * ROW_TILE_FIELDS + 2)
        tiles_before = tl.load(pieces_ptr + program * PIECE_FIELDS + 2) - row_tile_pos
        tiles_until = tl.load(pieces_ptr + program * PIECE_FIELDS + 3) - row_tile_pos
        q_start = tl.load(query_start_loc_ptr + req_idx)
        query_len = tl.load(query_start_loc_ptr + req_idx + 1) - q_start
        query_len = tl.where(exists, query_len, 0)
        seq_len = tl.where(exists, tl.load(seq_lens_ptr + req_idx), 0)

        offs_m = tl.arange(0, BLOCK_M)
        row = first_row + offs_m
        mask_m = row < query_len * GROUP
        q_tok = (q_start + row // GROUP).to(tl.int64)
        q_head = kv_head_idx * GROUP + row % GROUP

        offs_d = tl.arange(0, DIMS)
        q_ptrs = q_ptr + q_tok * stride_q_tok + q_head * stride_q_head
        q_codes, qk_scale = _load_query(q_ptrs, mask_m, scale, D, DIMS, UNIT, SOFT_CAP)
        sums = tl.zeros([LANES, 8, BLOCK_M], tl.float32)
        acc = tl.zeros([QUARTERS, BLOCK_M], tl.float32)
        m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
        state = (m_i, sums, sums, tl.full([], _SMALLEST_SCALE, tl.int32), acc, acc, acc, acc)
        first_tile, end_tile = key_tiles(
            seq_len, query_len, first_row, window, GROUP, BLOCK_M, BLOCK_N, CAUSAL, WINDOW
        )
        end_tile = tl.minimum(end_tile, first_tile + tiles_until)
        first_tile = first_tile + tl.maximum(tiles_before, 0)
        # Before `masked_tile` every row sees every key, so those tiles need no mask. With a window
        # all tiles are masked, because both ends of the window are a large part of its few tiles.
        masked_tile = first_tile
        if not WINDOW:
            masked_tile = seq_len
            if CAUSAL:
                masked_tile = tl.minimum(masked_tile, seq_len - query_len + first_row // GROUP + 1)
            masked_tile = tl.maximum(masked_tile, 0) // BLOCK_N
            masked_tile = tl.minimum(tl.maximum(masked_tile, first_tile), end_tile)
        block_table_row_ptr = block_table_ptr + req_idx.to(tl.int64) * stride_block_table
        pages = (cache_ptr, stride_cache_block, kv_head_idx * HEAD_WORDS, block_table_row_ptr)
        for tile in tl.range(first_tile, masked_tile):
            state = _attend_tile(
                tile, state, (q_codes, qk_scale, offs_m), pages, 0, seq_len, window, soft_cap,
                D, PAGE, BLOCK_N, VALUE_PTX,
                CAUSAL, WINDOW, SOFT_CAP, False, ONE_PAGE, LANES,
            )  # fmt: skip
        # Values needed after the main loop are read again. The loop needs all registers, so nothing
        # derived from these values may occupy registers during the loop.
        row_tile_ptr = row_tiles_ptr + row_tile * ROW_TILE_FIELDS
        first_row = tl.load(row_tile_ptr + 1, volatile=True)
        first_program = tl.load(row_tile_ptr + 3, volatile=True)
        is_whole = first_program == tl.load(row_tile_ptr + 4, volatile=True)
        q_start = tl.load(query_start_loc_ptr + req_idx, volatile=True)
        query_len = tl.load(query_start_loc_ptr + req_idx + 1, volatile=True) - q_start
        query_len = tl.where(exists, query_len, 0)
        row = first_row + offs_m
        mask_m = row < query_len * GROUP
        q_tok = (q_start + row // GROUP).to(tl.int64)
        q_head = kv_head_idx * GROUP + row % GROUP
        # Rows after the request's last row get the position of the last row.
        query_pos = seq_len - query_len + tl.minimum(row // GROUP, query_len - 1)
        first_key, end_key = key_range(
            seq_len, query_len, first_row, window, GROUP, BLOCK_M, CAUSAL, WINDOW
        )
        query = (q_codes, qk_scale, query_pos)
        for tile in tl.range(masked_tile, end_tile):
            state = _attend_tile(
                tile, state, query, pages, first_key, end_key, window, soft_cap,
                D, PAGE, BLOCK_N, VALUE_PTX,
                CAUSAL, WINDOW, SOFT_CAP, True, ONE_PAGE, LANES,
            )  # fmt: skip

        m_i, l_i, z_i, scale_exp, acc0, acc1, acc2, acc3 = state
        l_i = tl.sum(tl.sum(l_i, axis=0), axis=0)
        z_i = tl.sum(tl.sum(z_i, axis=0), axis=0)
        if SINKS:  # noqa: SIM102 - a constexpr; without SINKS there is no valid `sinks_ptr`
            if is_whole:
                sink = tl.load(sinks_ptr + q_head, mask=mask_m, other=-float("inf"))
                sink = sink.to(tl.float32) * LOG2_E
                m_j = tl.maximum(m_i, sink)
                m_ref = tl.where(m_j == -float("inf"), 0.0, m_j)
                alpha = tl.exp2(m_i - m_ref)
                l_i = l_i * alpha + tl.exp2(sink - m_ref)
                z_i = z_i * alpha
                acc0, acc1 = acc0 * alpha[None, :], acc1 * alpha[None, :]
                acc2, acc3 = acc2 * alpha[None, :], acc3 * alpha[None, :]
                m_i = m_j
        acc = _rotated_back(acc0, acc1, acc2, acc3, l_i, z_i, scale_exp, D, UNIT)
        lse = m_i + tl.log2(l_i)
        mask_out = mask_m[None, :] & (offs_d < D)[:, None]
        if is_whole:
            out_ptrs = out_ptr + (q_tok * stride_out_tok + q_head * stride_out_head)[None, :]
            tl.store(out_ptrs + offs_d[:, None], acc.to(out_ptr.dtype.element_ty), mask=mask_out)
            if LSE:
                lse_ptrs = lse_ptr + q_tok * stride_lse_tok + q_head * stride_lse_head
                tl.store(lse_ptrs, lse * LN_2, mask=mask_m)
        else:
            # See `LaunchPlan.partial_out`.
            part_idx = 2 * program + tl.where(program == first_program, 1, 0)
            part_row = (part_idx.to(tl.int64) * num_kv_heads + kv_head_idx) * PARTIAL_ROWS + offs_m
            partial_ptrs = partial_out_ptr + (part_row * D)[None, :] + offs_d[:, None]
            tl.store(partial_ptrs, acc, mask=mask_out)
            tl.store(partial_lse_ptr + part_row, lse, mask=mask_m)
