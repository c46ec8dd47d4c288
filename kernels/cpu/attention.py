# SPDX-License-Identifier: Apache-2.0
"""Paged attention over k8v4 pages on CPUs: one entry for every case."""

from __future__ import annotations

import threading

import numpy as np
import torch

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.cpu import attend_portable, drive, memory
from vllm_hybrid_kv.kernels.cpu import isa as isa_module
from vllm_hybrid_kv.kernels.cpu.plan import Plan, plan_attention
from vllm_hybrid_kv.kernels.cpu.run import run_on_threads
from vllm_hybrid_kv.kernels.cpu.threads import follow_torch
from vllm_hybrid_kv.kernels.inputs import attention_refusal, check_attention
from vllm_hybrid_kv.kernels.k8v4 import Layout, PageFormat

_NUMBERS = {
    torch.bfloat16: drive.BFLOAT16,
    torch.float16: drive.FLOAT16,
    torch.float32: drive.FLOAT32,
}


class _Workspace(threading.local):
    """Memory of one calling thread, kept between calls and grown where needed."""

    def __init__(self) -> None:
        self.scratch = np.empty((0, drive.SCRATCH_BYTES), np.uint8)
        self.partials = np.empty(0, np.float32)
        self.partials_address = 0
        self.counters = np.empty(0, np.int64)
        self.counters_address = 0
        self.call = np.empty(memory.CALL.itemsize, np.uint8)
        self.call_bytes = self.call.data
        self.call_address = self.call.ctypes.data

    def reserve(self, threads: int, partials: int, counters: int) -> None:
        if self.scratch.shape[0] != threads:
            self.scratch = np.empty((threads, drive.SCRATCH_BYTES), np.uint8)
        if self.partials.size < partials + 16:
            self.partials = np.empty(partials + 16, np.float32)
            self.partials_address = (self.partials.ctypes.data + 63) // 64 * 64
        if self.counters.size < counters:
            self.counters = np.empty(2 * counters, np.int64)
            self.counters_address = self.counters.ctypes.data
        self.counters[:counters] = 0


_workspace = _Workspace()


def path_for(query_dtype: torch.dtype, head_size: int, isa: str | None = None) -> str:
    """Return the path that attends with such queries: the fast ones take bf16 tiles only."""
    chosen = isa_module.best_isa() if isa is None else isa_module.require(isa)
    tiled = k8v4.cpu_layout(head_size) is Layout.CPU_TILED
    return chosen if tiled and query_dtype == torch.bfloat16 else isa_module.PORTABLE


def _code_of(path: str) -> int:
    if path == isa_module.AMX:
        from vllm_hybrid_kv.kernels.cpu import attend_amx

        return attend_amx.work()
    if path == isa_module.AVX512_BF16:
        from vllm_hybrid_kv.kernels.cpu import attend_avx512

        return attend_avx512.work()
    return attend_portable.work()


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

    A query of request i at position p sees, of its request's `seq_lens[i]` tokens, those up to p
    if causal, and those in (p - window, p + window) if there is a window. A visible token whose
    scale is NaN makes the rows that see it NaN, and no others; memory behind the last token, and
    tokens that a row does not see, have no influence whatever they hold.

    Args:
        query: bf16, fp16 or fp32 [T, Hq, D], the requests' new tokens one after another; dims
            contiguous.
        cache: uint8 [blocks, H, N, slot_bytes(D)], `k8v4.cpu_layout(D)`, contiguous but for the
            stride between blocks.
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
        isa: A path of `isa.ALL`; the best one, or the environment's, if None. Queries in fp16
            and fp32, and head sizes that are not a multiple of 32, take the portable path.
        debug: Check the contents of the index tensors as well; see `check_attention`.

    Raises:
        ValueError: An argument is not as required, or this CPU cannot run `isa`.
    """
    check_attention(
        query, cache, block_table, seq_lens, query_start_loc, out,
        sinks=sinks, lse=lse, debug=debug,
    )  # fmt: skip
    if not query.is_cpu:
        raise attention_refusal(f"query must be on the CPU, got {query.device}")
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
        raise attention_refusal(
            f"the plan was made for (requests, query tokens, heads, KV "
            f"heads, head size, causal, window) = {plan.made_for}, the call has "
            f"{(made_for[0], tokens, *made_for[1:])}"
        )
    if plan.items.shape[0] == 0:
        return
    page_format = PageFormat(head_size, page_size, k8v4.cpu_layout(head_size))
    if sinks is not None:
        sinks = sinks.to(torch.float32).contiguous()
    output_stride = -(-head_size // 16) * 64
    _workspace.reserve(
        threads,
        plan.partial_rows * num_kv_heads * (output_stride + 64) // 4,
        1 + plan.num_merges * num_kv_heads,
    )
    width = query.element_size()
    tiled = page_format.layout is Layout.CPU_TILED
    memory.CALL_STRUCT.pack_into(
        _workspace.call_bytes, 0,
        # In the order of `memory.CALL`.
        query.data_ptr(), width * query.stride(0), width * query.stride(1),
        out.data_ptr(), width * out.stride(0), width * out.stride(1),
        _NUMBERS[query.dtype],
        *((0, 0, 0) if lse is None else (lse.data_ptr(), 4 * lse.stride(0), 4 * lse.stride(1))),
        cache.data_ptr(), cache.stride(0), page_format.head_bytes,
        page_format.value_offset, page_format.scale_offset, page_format.zero_offset, tiled,
        block_table.data_ptr(), 4 * block_table.stride(0),
        0 if sinks is None else sinks.data_ptr(),
        num_kv_heads, num_heads // num_kv_heads, head_size, output_stride, page_size,
        causal, 0 if window is None else window,
        plan.items_address, plan.items.shape[0], plan.merges_address,
        _workspace.partials_address, _workspace.counters_address,
        scale, soft_cap,
    )  # fmt: skip
    work = _code_of(path_for(query.dtype, head_size, isa))
    run_on_threads(work, _workspace.call_address, _workspace.scratch)
