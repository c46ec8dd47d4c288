# SPDX-License-Identifier: Apache-2.0
"""Paged attention over k8v4 pages on GPUs: one entry for every case."""

from __future__ import annotations

import torch
import triton

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.inputs import attention_error, check_attention
from vllm_hybrid_kv.kernels.triton import convert
from vllm_hybrid_kv.kernels.triton.attend import attend_kernel
from vllm_hybrid_kv.kernels.triton.convert import KeyWords, ValueWords
from vllm_hybrid_kv.kernels.triton.merge import merge_kernel
from vllm_hybrid_kv.kernels.triton.plan import Plan, plan_attention
from vllm_hybrid_kv.kernels.triton.rotation import rotation_unit

MERGED_AT_A_TIME = 8
"""Partial results that a merging program reads at a time; 8 KiB at a head size of 256."""


def _check_pages(cache: torch.Tensor) -> None:
    page_size = cache.shape[2]
    if page_size <= 0 or page_size % k8v4.TILE_TOKENS:
        raise attention_error(
            f"a page holds a multiple of {k8v4.TILE_TOKENS} tokens, got {page_size}"
        )
    # Every plane starts at a multiple of 16 bytes if the pages do, and is read in such pieces.
    if cache.stride(0) % 16 or cache.data_ptr() % 16:
        raise attention_error(
            f"the pages of the cache must start at multiples of 16 bytes, got one at "
            f"{cache.data_ptr():#x} and {cache.stride(0)} bytes from one to the next"
        )


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
    plan: Plan | None = None,
    max_query_len: int | None = None,
    key_words: KeyWords | None = None,
    value_words: ValueWords | None = None,
    debug: bool = False,
) -> None:
    """Attend to paged k8v4 tokens for a batch of requests; `reference.attend` has the formula.

    A query of request i at position p sees, of its request's `seq_lens[i]` tokens, those up to p
    if causal, and those in (p - window, p + window) if there is a window. A visible token whose
    scale is NaN makes the rows that see it NaN, and no others, and leaves their `lse` undefined;
    memory behind the last token, and tokens that a row does not see, have no influence whatever
    they hold.

    With a plan nothing waits for the device and nothing is allocated but what `sinks` needs to
    become float32, so that a call can be captured in a graph.

    Args:
        query: bf16, fp16 or fp32 [T, Hq, D], the requests' new tokens one after another; dims
            contiguous.
        cache: uint8 [blocks, H, N, slot_bytes(D)], `LINEAR`, contiguous but for the stride
            between blocks, which is a multiple of 16.
        block_table: int32 [at least B, max blocks].
        seq_lens: int32 [B], tokens of each request including its new ones.
        query_start_loc: int32 [B + 1], offsets of the requests in `query`. Tokens behind the
            last are padding: their rows of `out` and `lse` are left as they are.
        out: Like `query`; written. 0 where nothing is visible.
        scale: Factor of the scores.
        causal, window, soft_cap: As in `reference.attend`.
        sinks: [Hq], any floating dtype.
        lse: float32 [T, Hq], written: natural log of the sum over visible keys and the sink;
            -inf where there is neither.
        plan: From `plan_attention` for this batch; made here if None.
        max_query_len: New tokens of a request at most, for the plan made here; read from the
            device if None.
        key_words, value_words: Ways of widening codes; the device's fastest if None.
        debug: Check the contents of the index tensors as well, which waits for the device; see
            `check_attention`.

    Raises:
        ValueError: An argument is not as required.
    """
    check_attention(
        query, cache, block_table, seq_lens, query_start_loc, out,
        sinks=sinks, lse=lse, debug=debug,
    )  # fmt: skip
    _check_pages(cache)
    tokens, num_heads, head_size = query.shape
    num_kv_heads, page_size = cache.shape[1], cache.shape[2]
    requests = seq_lens.shape[0]
    if requests == 0 or tokens == 0:
        return
    if plan is None:
        if max_query_len is None:
            max_query_len = int((query_start_loc[1:] - query_start_loc[:-1]).max())
        plan = plan_attention(
            seq_lens, query_start_loc, tokens, num_heads, num_kv_heads, head_size,
            max_query_len=max_query_len, causal=causal, window=window,
        )  # fmt: skip
    made_for = (requests, tokens, num_heads, num_kv_heads, head_size, causal, window)
    if plan.made_for != made_for:
        raise attention_error(
            f"the plan was made for (requests, query tokens, heads, KV heads, head size, "
            f"causal, window) = {plan.made_for}, the call has {made_for}"
        )
    if sinks is not None:
        sinks = sinks.to(torch.float32).contiguous()
    if key_words is None:
        key_words = convert.key_words_for(query.device)
    if value_words is None:
        value_words = convert.value_words_for(query.device)
    group = num_heads // num_kv_heads
    dims = triton.next_power_of_2(head_size)
    tiling = plan.tiling
    programs = plan.items.shape[0]
    # Arguments that are not used must still be pointers.
    lse_pointer = plan.partial_lse if lse is None else lse
    lse_strides = (0, 0) if lse is None else lse.stride()
    sinks_pointer = plan.partial_lse if sinks is None else sinks
    attend_kernel[(programs, num_kv_heads)](
        query, query.stride(0), query.stride(1),
        out, out.stride(0), out.stride(1),
        lse_pointer, *lse_strides,
        cache, cache.stride(0) // 2,
        block_table, block_table.stride(0),
        seq_lens, query_start_loc, plan.items, sinks_pointer,
        plan.partial_out, plan.partial_lse,
        scale, 0 if window is None else window, soft_cap,
        GROUP=group, D=head_size, PAGE=page_size,
        DIMS=dims, BLOCK_M=tiling.block_m, BLOCK_N=tiling.block_n,
        LANES=tiling.lanes,
        PARTIAL_ROWS=plan.partial_rows, UNIT=rotation_unit(head_size),
        KEY_WAY=int(key_words), VALUE_WAY=int(value_words),
        CAUSAL=causal, WINDOW=window is not None, SOFT_CAP=soft_cap > 0,
        SINKS=sinks is not None, LSE=lse is not None,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip
    if plan.partial_rows:
        merge_kernel[(programs, num_kv_heads, plan.merged_rows)](
            out, out.stride(0), out.stride(1),
            lse_pointer, *lse_strides,
            query_start_loc, plan.items, sinks_pointer, plan.partial_out, plan.partial_lse,
            GROUP=group, D=head_size, DIMS=dims, PARTIAL_ROWS=plan.partial_rows,
            PARTS=MERGED_AT_A_TIME, SINKS=sinks is not None, LSE=lse is not None,
            num_warps=2,
        )  # fmt: skip
