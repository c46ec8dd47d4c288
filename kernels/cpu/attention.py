# SPDX-License-Identifier: Apache-2.0
"""Paged attention over k8v4 pages on CPUs."""

from __future__ import annotations

import functools
import importlib
import threading

import numpy as np
import torch
from numba.core.ccallback import CFunc

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.cpu import isa as instruction_sets
from vllm_hybrid_kv.kernels.cpu import records
from vllm_hybrid_kv.kernels.cpu.compile_cache import compile_callback
from vllm_hybrid_kv.kernels.cpu.plan import Plan, plan_attention
from vllm_hybrid_kv.kernels.cpu.threads import follow_torch, run_on_threads
from vllm_hybrid_kv.kernels.inputs import attention_error, check_attention
from vllm_hybrid_kv.kernels.k8v4 import Layout, PageFormat


class _Workspace(threading.local):
    """Buffers of one calling thread. Later calls reuse them; they grow on demand."""

    def __init__(self) -> None:
        self.call = records.CallBuffer(records.AttentionCall)
        self.scratch = np.empty((0, records.SCRATCH_BYTES), np.uint8)
        self.partials = torch.empty(0)

    def reserve(self, threads: int, partials: int) -> None:
        if self.scratch.shape[0] != threads:
            self.scratch = np.empty((threads, records.SCRATCH_BYTES), np.uint8)
        if self.partials.numel() < partials:
            self.partials = torch.empty(partials)


_workspace = _Workspace()


def isa_for(head_size: int, isa: str | None = None) -> str:
    """Return the instruction set to use: `isa`, or the fastest that this CPU can run.

    The AMX kernel needs a multiple of 32 dims. For other head sizes, AVX-512 VNNI replaces it.
    """
    chosen = instruction_sets.available()[-1] if isa is None else instruction_sets.require(isa)
    if chosen == instruction_sets.AMX and head_size % 32:
        return instruction_sets.AVX512_VNNI
    return chosen


@functools.cache
def _work_of(isa: str) -> CFunc:
    """Compile or load a kernel. It is cached here forever, so its code address stays valid."""
    return compile_callback(importlib.import_module(f"{__package__}.attend_{isa}").work)


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
    isa: str | None = None,
    debug: bool = False,
) -> None:
    """Attend to paged k8v4 tokens for a batch of requests; `reference.attend` has the formula.

    A query at position p sees the tokens of its own request: only those up to p if `causal`, and
    only those in (p - window, p + window) if there is a window. If a token has a NaN scale, exactly
    the rows that see the token become NaN. A row never depends on tokens that it does not see, or
    on memory after the last token.

    Args:
        query: bf16, fp16 or fp32 [T, Hq, D], the requests' new tokens one after another; dims
            contiguous.
        cache: uint8 [blocks, H, N, slot_bytes(D)], `CPU_TILED`, contiguous except for
            the stride between blocks.
        block_table: int32 [at least B, max blocks].
        seq_lens: int32 [B], tokens of each request including its new ones.
        query_start_loc: int32 [B + 1], offsets of the requests in `query`. Tokens after the last
            request are padding: their rows of `out` and `lse` stay unchanged.
        out: Written, with the shape and dtype of `query`. 0 for a query that sees no token.
        scale: Factor of the scores.
        causal, window, soft_cap: As in `reference.attend`.
        sinks: [Hq], any floating dtype.
        lse: float32 [T, Hq], written: natural log of the softmax's sum over visible keys and the
            sink; -inf if there is neither.
        plan: From `plan_attention` for this batch; made here if None.
        isa: One of `isa.ALL`; see `isa_for`.
        debug: Also check the contents of the index tensors; see `check_attention`.

    Raises:
        ValueError: An argument does not meet its requirements, or this CPU cannot run `isa`.
    """
    check_attention(
        query, cache, block_table, seq_lens, query_start_loc, out,
        sinks=sinks, lse=lse, debug=debug,
    )  # fmt: skip
    if not query.is_cpu:
        raise attention_error(f"query must be on the CPU, got {query.device}")
    tokens, num_heads, head_size = query.shape
    num_kv_heads, page_size = cache.shape[1], cache.shape[2]
    threads = follow_torch()
    if plan is None:
        plan = plan_attention(
            seq_lens, query_start_loc, num_heads, num_kv_heads, head_size, page_size,
            causal=causal, window=window, num_threads=threads,
        )  # fmt: skip
    made_for = (seq_lens.shape[0], num_heads, num_kv_heads, head_size, causal, window)
    if plan.made_for[:1] + plan.made_for[2:] != made_for or plan.made_for[1] > tokens:
        raise attention_error(
            "the plan was made for (requests, query tokens, heads, KV heads, head size, causal, "
            f"window) = {plan.made_for}, the call has {(made_for[0], tokens, *made_for[1:])}"
        )
    if plan.items.shape[0] == 0:
        return
    PageFormat(head_size, page_size, Layout.CPU_TILED)  # raises for a wrong page size
    if sinks is not None:
        sinks = sinks.to(torch.float32).contiguous()
    output_stride = -(-head_size // 32) * 128
    _workspace.reserve(threads, plan.partial_rows * num_kv_heads * (output_stride + 64) // 4)
    counters = np.zeros(1 + plan.num_divided * num_kv_heads, np.int64)
    width = query.element_size()
    call = _workspace.call.write(
        query=query.data_ptr(),
        query_token_stride=width * query.stride(0),
        query_head_stride=width * query.stride(1),
        out=out.data_ptr(),
        out_token_stride=width * out.stride(0),
        out_head_stride=width * out.stride(1),
        dtype_code=records.DTYPE_CODES[query.dtype],
        lse=0 if lse is None else lse.data_ptr(),
        lse_token_stride=0 if lse is None else 4 * lse.stride(0),
        lse_head_stride=0 if lse is None else 4 * lse.stride(1),
        cache=cache.data_ptr(),
        block_stride=cache.stride(0),
        block_table=block_table.data_ptr(),
        block_table_stride=4 * block_table.stride(0),
        sinks=0 if sinks is None else sinks.data_ptr(),
        num_kv_heads=num_kv_heads,
        group=num_heads // num_kv_heads,
        dims=head_size,
        output_stride=output_stride,
        page_size=page_size,
        causal=causal,
        window=window or 0,
        items=plan.items_address,
        num_items=plan.items.shape[0],
        partials=_workspace.partials.data_ptr(),
        counters=counters.ctypes.data,
        scale=scale,
        soft_cap=soft_cap,
        unit=k8v4.rotation_unit(head_size),
    )
    work = _work_of(isa_for(head_size, isa)).address
    run_on_threads(work, call, _workspace.scratch)
