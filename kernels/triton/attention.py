# SPDX-License-Identifier: Apache-2.0
"""Paged attention over k8v4 pages on GPUs: one entry for every case."""

from __future__ import annotations

import torch
import triton

from vllm_hybrid_kv.kernels import k8v4

from . import convert
from .attend import attend_kernel
from .convert import KeyWords, ValueWords
from .merge import merge_kernel
from .plan import Plan, plan_attention

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

MERGED_AT_A_TIME = 8
"""Partial results that a merging program reads at a time; 8 KiB at a head size of 256."""


def _refused(reason: str) -> ValueError:
    return ValueError(f"k8v4 attention on GPU: {reason}")


def check_inputs(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    out: torch.Tensor,
    *,
    sinks: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> None:
    """Check what the kernels rely on, but for what stands in the index tensors.

    Args:
        query, cache, block_table, seq_lens, query_start_loc, out, sinks, lse: As for
            `paged_attention`.

    Raises:
        ValueError: A shape, dtype or stride is not as required.
    """
    # Messages are put together only where one is needed: this runs at every call.
    if query.dim() != 3 or query.dtype not in _DTYPES:
        raise _refused("query must be bf16, fp16 or fp32 [T, Hq, D]")
    tokens, num_heads, head_size = query.shape
    if cache.dim() != 4 or cache.dtype != torch.uint8:
        raise _refused(
            f"cache must be uint8 [blocks, H, N, bytes], got {cache.dtype} {tuple(cache.shape)}"
        )
    _, num_kv_heads, page_size, slot = cache.shape
    if slot != k8v4.slot_bytes(head_size):
        raise _refused(
            f"a slot of head size {head_size} has {k8v4.slot_bytes(head_size)} bytes, "
            f"the cache's have {slot}"
        )
    if page_size <= 0 or page_size % k8v4.TILE_TOKENS:
        raise _refused(f"a page holds a multiple of {k8v4.TILE_TOKENS} tokens, got {page_size}")
    if cache.stride()[1:] != (page_size * slot, slot, 1):
        raise _refused(
            f"the pages of the cache must be contiguous inside, got strides {cache.stride()}"
        )
    # Every plane starts at a multiple of 16 bytes if the pages do, and is read in such pieces.
    if cache.stride(0) % 16 or cache.data_ptr() % 16:
        raise _refused(
            f"the pages of the cache must start at multiples of 16 bytes, got one at "
            f"{cache.data_ptr():#x} and {cache.stride(0)} bytes from one to the next"
        )
    if num_kv_heads <= 0 or num_heads % num_kv_heads:
        raise _refused(f"{num_heads} query heads are not a multiple of {num_kv_heads} KV heads")
    if out.shape != query.shape or out.dtype not in _DTYPES:
        raise _refused(
            f"out must be bf16, fp16 or fp32 {tuple(query.shape)}, "
            f"got {out.dtype} {tuple(out.shape)}"
        )
    if query.stride(2) != 1 or out.stride(2) != 1:
        raise _refused("the dims of query and out must be contiguous")
    requests = seq_lens.shape[0]
    if seq_lens.dtype != torch.int32 or seq_lens.dim() != 1 or not seq_lens.is_contiguous():
        raise _refused("seq_lens must be contiguous int32 [B]")
    if (
        query_start_loc.dtype != torch.int32
        or query_start_loc.shape != (requests + 1,)
        or not query_start_loc.is_contiguous()
    ):
        raise _refused(f"query_start_loc must be contiguous int32 [{requests + 1}]")
    if (
        block_table.dtype != torch.int32
        or block_table.dim() != 2
        or block_table.shape[0] < requests
        or (block_table.stride(1) != 1 and block_table.shape[1] > 1)
    ):
        raise _refused(
            f"block_table must be int32 with at least {requests} rows, contiguous inside"
        )
    if sinks is not None and sinks.shape != (num_heads,):
        raise _refused(f"sinks must hold {num_heads} numbers, one for each query head")
    if lse is not None and (lse.dtype != torch.float32 or lse.shape != (tokens, num_heads)):
        raise _refused(f"lse must be float32 [{tokens}, {num_heads}]")


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
        out: bf16, fp16 or fp32, of the shape of `query`; written. 0 where nothing is visible.
        scale: Factor of the scores.
        causal, window, soft_cap: As in `reference.attend`.
        sinks: [Hq], any floating dtype.
        lse: float32 [T, Hq], written: natural log of the sum over visible keys and the sink;
            -inf where there is neither.
        plan: From `plan_attention` for this batch; made here if None.
        max_query_len: New tokens of a request at most, for the plan made here; read from the
            device if None.
        key_words, value_words: Ways of widening codes; the device's fastest if None.

    Raises:
        ValueError: An argument is not as required.
    """
    check_inputs(
        query, cache, block_table, seq_lens, query_start_loc, out, sinks=sinks, lse=lse
    )  # fmt: skip
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
        raise _refused(
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
        PARTIAL_ROWS=plan.partial_rows,
        KEY_WAY=int(key_words), VALUE_WAY=int(value_words),
        CAUSAL=causal, WINDOW=window is not None, SOFT_CAP=soft_cap > 0,
        SINKS=sinks is not None, LSE=lse is not None,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip
    if plan.partial_rows:
        merge_kernel[(programs, num_kv_heads, plan.partial_rows)](
            out, out.stride(0), out.stride(1),
            lse_pointer, *lse_strides,
            query_start_loc, plan.items, sinks_pointer, plan.partial_out, plan.partial_lse,
            GROUP=group, D=head_size, DIMS=dims, PARTIAL_ROWS=plan.partial_rows,
            PARTS=MERGED_AT_A_TIME, SINKS=sinks is not None, LSE=lse is not None,
            num_warps=2,
        )  # fmt: skip
