# SPDX-License-Identifier: Apache-2.0
"""Launch paged attention over k8v4 pages on GPUs, and merge the results of splits."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from vllm_hybrid_kv.kernels import inputs, k8v4
from vllm_hybrid_kv.kernels.triton.attend import LN_2, LOG2_E, attend_kernel
from vllm_hybrid_kv.kernels.triton.convert import is_nvidia
from vllm_hybrid_kv.kernels.triton.launching import launcher
from vllm_hybrid_kv.kernels.triton.plan import ROW_TILE_FIELDS, LaunchPlan, plan_attention

MERGED_AT_A_TIME = 8
"""How many partial results a merging program reads at a time: 8 KiB at a head size of 256."""


@triton.jit(do_not_specialize=["stride_lse_tok", "stride_lse_head"])
def merge_kernel(  # type: ignore[no-untyped-def]
    out_ptr, stride_out_tok, stride_out_head,
    lse_ptr, stride_lse_tok, stride_lse_head,
    query_start_loc_ptr, row_tiles_ptr, sinks_ptr, partial_out_ptr, partial_lse_ptr,
    GROUP: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr, PARTIAL_ROWS: tl.constexpr,
    PARTS: tl.constexpr, SINKS: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Merge the parts of one row and its sink.

    The grid is [row tiles of the plan, KV heads, rows of a row tile]. If a row tile has several
    parts, one program merges each of its rows. All other programs return at once.

        lse = log2(sum 2^lse_i + 2^sink),  out = sum out_i 2^(lse_i - lse)

    Args:
        PARTS: How many parts are read at a time.
    """
    row_tile_ptr = row_tiles_ptr + tl.program_id(0) * ROW_TILE_FIELDS
    kv_head_idx = tl.program_id(1)
    num_kv_heads = tl.num_programs(1)
    row_in_tile = tl.program_id(2)
    req_idx = tl.load(row_tile_ptr)
    first_program = tl.load(row_tile_ptr + 3)
    num_parts = tl.load(row_tile_ptr + 4) - first_program + 1
    if (req_idx < 0) | (num_parts == 1):
        return
    row = tl.load(row_tile_ptr + 1) + row_in_tile
    q_start = tl.load(query_start_loc_ptr + req_idx)
    query_len = tl.load(query_start_loc_ptr + req_idx + 1) - q_start
    if row >= query_len * GROUP:
        return
    q_tok = (q_start + row // GROUP).to(tl.int64)
    q_head = kv_head_idx * GROUP + row % GROUP
    m_i = -float("inf")
    l_i = 0.0
    if SINKS:
        m_i = tl.load(sinks_ptr + q_head).to(tl.float32) * LOG2_E
        l_i = tl.where(m_i == -float("inf"), 0.0, 1.0)
    offs_d = tl.arange(0, DIMS)
    acc = tl.zeros([DIMS], tl.float32)
    for start in range(0, num_parts, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = part < num_parts
        # See `LaunchPlan.partial_out`.
        part_idx = 2 * (first_program + part) + tl.where(part == 0, 1, 0)
        part_row = (part_idx.to(tl.int64) * num_kv_heads + kv_head_idx) * PARTIAL_ROWS
        part_row = part_row + row_in_tile
        part_lse = tl.load(partial_lse_ptr + part_row, mask=mask, other=-float("inf"))
        part_out = tl.load(
            partial_out_ptr + (part_row * D)[:, None] + offs_d[None, :],
            mask=mask[:, None] & (offs_d < D)[None, :], other=0.0,
        )  # fmt: skip
        m_j = tl.maximum(m_i, tl.max(part_lse, axis=0))
        # If the row sees no key of a part, the part's lse is -inf and its output is 0.
        m_ref = tl.where(m_j == -float("inf"), 0.0, m_j)
        alpha = tl.exp2(m_i - m_ref)
        p = tl.exp2(part_lse - m_ref)
        l_i = l_i * alpha + tl.sum(p, axis=0)
        acc = acc * alpha + tl.sum(part_out * p[:, None], axis=0)
        m_i = m_j
    acc = acc * tl.where(l_i == 0.0, 0.0, 1.0 / l_i)
    out_ptrs = out_ptr + q_tok * stride_out_tok + q_head * stride_out_head + offs_d
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=offs_d < D)
    if LSE:
        lse_ptrs = lse_ptr + q_tok * stride_lse_tok + q_head * stride_lse_head
        tl.store(lse_ptrs, (m_i + tl.log2(l_i)) * LN_2)


def paged_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    plan: LaunchPlan | None = None,
    debug: bool = False,
) -> None:
    """Attend to paged k8v4 tokens for a batch of requests; `reference.attend` has the formula.

    Request i has `seq_lens[i]` tokens. Its query at position p sees all of them, or only those up
    to p if causal, or only those in (p - window, p + window) with a window. If the scale of a
    token is NaN, the rows that see the token become NaN and their `lse` is undefined. Tokens that
    a row does not see and memory after the last token never influence the row.

    With a plan the call does not wait for the device, and it allocates no memory if `sinks` are
    contiguous, so a graph can capture the call.

    Args:
        query, block_table, seq_lens, scale, causal, window, soft_cap: As for
            `reference.paged_attention`; dims of `query` contiguous.
        cache: uint8 [blocks, H, N, slot_bytes(D)], `LINEAR`, contiguous within a block; the
            stride between blocks is a multiple of 16.
        query_start_loc: int32 [B + 1], offsets of the requests in `query`. Tokens after the last
            request are padding: their rows of `out` and `lse` are not written.
        out: Like `query`; written. 0 if nothing is visible.
        sinks: [Hq], any floating dtype.
        lse: float32 [T, Hq]; receives the natural log of the sum of exp(score) over the visible
            keys and the sink, or -inf if there are none.
        plan: From `plan_attention` for this batch. If None, the call waits for the device to plan.
        debug: Also check the contents of the index tensors (see `check_attention`), which waits
            for the device.

    Raises:
        ValueError: An argument is not as required.
    """
    inputs.check_attention(
        query, cache, block_table, seq_lens, query_start_loc, out,
        sinks=sinks, lse=lse, debug=debug,
    )  # fmt: skip
    tokens, num_heads, head_size = query.shape
    num_kv_heads, page_size = cache.shape[1], cache.shape[2]
    # Loads are 16 bytes wide, and every plane starts at a multiple of 16 bytes if the pages do.
    if cache.stride(0) % 16 or cache.data_ptr() % 16:
        raise inputs.invalid(
            inputs.ATTENTION, "cache", cache,
            "with an address and a block stride that are multiples of 16 bytes; address",
            cache.data_ptr(),
        )  # fmt: skip
    requests = seq_lens.shape[0]
    if requests == 0 or tokens == 0:
        return
    if plan is None:
        plan = plan_attention(
            seq_lens, query_start_loc, tokens, num_heads, num_kv_heads, head_size,
            max_query_len=int(query_start_loc.diff().max()), causal=causal, window=window,
        )  # fmt: skip
    made_for = (requests, tokens, num_heads, num_kv_heads, head_size, causal, window)
    if plan.made_for != made_for:
        raise inputs.attention_error(
            f"the plan was made for (requests, query tokens, heads, KV heads, head size, "
            f"causal, window) = {plan.made_for}, the call has {made_for}"
        )
    if sinks is not None:
        sinks = sinks.contiguous()
    tiling, partial_rows = plan.tiling, plan.partial_lse.shape[2]
    # The kernels take pointers even for an lse and sinks that they do not use.
    lse_and_strides = (plan.partial_lse, 0, 0) if lse is None else (lse, *lse.stride())
    sinks_or_unused = plan.partial_lse if sinks is None else sinks
    shared: dict[str, Any] = {
        "GROUP": num_heads // num_kv_heads, "D": head_size,
        "DIMS": triton.next_power_of_2(head_size), "PARTIAL_ROWS": partial_rows,
        "SINKS": sinks is not None, "LSE": lse is not None,
    }  # fmt: skip
    launcher(attend_kernel, (len(plan.pieces), num_kv_heads))(
        query, query.stride(0), query.stride(1),
        out, out.stride(0), out.stride(1),
        *lse_and_strides,
        cache, cache.stride(0) // 2,
        block_table, block_table.stride(0),
        seq_lens, query_start_loc, plan.pieces, plan.row_tiles, sinks_or_unused,
        plan.partial_out, plan.partial_lse,
        scale, 0 if window is None else window, soft_cap,
        PAGE=page_size, UNIT=k8v4.rotation_unit(head_size),
        BLOCK_M=tiling.block_m, BLOCK_N=tiling.block_n, LANES=tiling.lanes,
        VALUE_PTX=is_nvidia(query.device),
        CAUSAL=causal, WINDOW=window is not None, SOFT_CAP=soft_cap > 0,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages, **shared,
    )  # fmt: skip
    if partial_rows:
        launcher(merge_kernel, (len(plan.row_tiles), num_kv_heads, plan.merged_rows))(
            out, out.stride(0), out.stride(1),
            *lse_and_strides,
            query_start_loc, plan.row_tiles, sinks_or_unused, plan.partial_out, plan.partial_lse,
            PARTS=MERGED_AT_A_TIME, num_warps=2, **shared,
        )  # fmt: skip
