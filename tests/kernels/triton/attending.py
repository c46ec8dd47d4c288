# SPDX-License-Identifier: Apache-2.0
"""Attend with the kernels and with the reference; run where Triton interprets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from vllm_hybrid_kv.kernels import k8v4, reference
from vllm_hybrid_kv.kernels.k8v4 import Layout, PageFormat
from vllm_hybrid_kv.kernels.triton import paged_attention, plan_attention
from vllm_hybrid_kv.kernels.triton.plan import Plan

# Largest ||out - reference|| / ||reference|| over the dims of one row.
TOLERANCE = {
    torch.float32: 2e-3,  # queries and weights rounded to fp16's 11 bits: 2^-12 each
    torch.float16: 2e-3,  # likewise, and outputs
    torch.bfloat16: 6e-3,  # outputs rounded to 8 bits: 2^-9, and room for cancellation
}
# Largest |lse - reference|: queries rounded to fp16, on scores of size one.
LSE_TOLERANCE = 2e-3


@dataclass
class Case:
    """A batch: shapes, lengths and options of one call."""

    head_size: int = 64
    num_heads: int = 4
    num_kv_heads: int = 1
    page_size: int = 32
    lengths: tuple[int, ...] = (150,)
    queries: tuple[int, ...] = (1,)
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    options: dict[str, Any] | None = None
    plan: dict[str, Any] | None = None
    value_size: float = 1.0
    query_size: float = 1.0


@dataclass
class Batch:
    """The tensors of a call."""

    query: torch.Tensor
    cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    options: dict[str, Any]

    def halves(self, request: int, head: int, plane: str) -> list[torch.Tensor]:
        """Views of the fp16 scales or zeros of a request's pages, in order."""
        page_size = self.cache.shape[2]
        page_format = PageFormat(self.query.shape[2], page_size, Layout.LINEAR)
        start = page_format.scale_offset if plane == "scale" else page_format.zero_offset
        count = -(-int(self.seq_lens[request]) // page_size)
        return [
            self.cache[block, head].view(-1)[start : start + 2 * page_size].view(torch.float16)
            for block in self.block_table[request, :count].tolist()
        ]


def make(case: Case) -> Batch:
    """Requests in shuffled pages; every byte that belongs to no token is 0xFF, a NaN."""
    generator = torch.Generator().manual_seed(case.seed)
    pages = [-(-length // case.page_size) for length in case.lengths]
    shape = (sum(pages) + 2, case.num_kv_heads, case.page_size, k8v4.slot_bytes(case.head_size))
    cache = torch.full(shape, 0xFF, dtype=torch.uint8)
    order = torch.randperm(shape[0], generator=generator)
    table = torch.full((len(pages), max(pages, default=0) + 1), 10**8, dtype=torch.int32)
    start = 0
    for request, (count, length) in enumerate(zip(pages, case.lengths, strict=True)):
        mine = order[start : start + count]
        start += count
        table[request, :count] = mine
        shape3 = (2, length, case.num_kv_heads, case.head_size)
        key, value = torch.randn(shape3, generator=generator)
        value = (value + torch.randn(shape3[1:3], generator=generator)[..., None]) * case.value_size
        position = torch.arange(length)
        slots = mine[position // case.page_size] * case.page_size + position % case.page_size
        reference.store(reference.quantise(key, value), cache, slots, Layout.LINEAR)
    query = torch.randn(sum(case.queries), case.num_heads, case.head_size, generator=generator)
    starts = torch.tensor([0, *case.queries]).cumsum(0).to(torch.int32)
    return Batch(
        (query * case.query_size).to(case.dtype),
        cache,
        table,
        torch.tensor(case.lengths, dtype=torch.int32),
        starts,
        {"scale": case.head_size**-0.5, **(case.options or {})},
    )


def planned(batch: Batch, into: Plan | None = None, **options: Any) -> Plan:
    counts = batch.query_start_loc[1:] - batch.query_start_loc[:-1]
    longest = int(counts.max())
    return plan_attention(
        batch.seq_lens,
        batch.query_start_loc,
        batch.query.shape[0],
        batch.query.shape[1],
        batch.cache.shape[1],
        batch.query.shape[2],
        causal=batch.options.get("causal", True),
        window=batch.options.get("window"),
        into=into,
        **{"max_query_len": longest, **options},
    )


def attend(
    batch: Batch, plan: Plan | None = None, **more: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.full_like(batch.query, 7.0)
    lse = torch.full(batch.query.shape[:2], 7.0)
    paged_attention(
        batch.query,
        batch.cache,
        batch.block_table,
        batch.seq_lens,
        batch.query_start_loc,
        out,
        lse=lse,
        plan=plan,
        **batch.options,
        **more,
    )
    return out, lse


def expected(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What the reference gives; rows of no request keep what `attend` fills in."""
    out = torch.full(batch.query.shape, 7.0)
    lse = torch.full(batch.query.shape[:2], 7.0)
    for request, length in enumerate(batch.seq_lens.tolist()):
        rows = slice(*batch.query_start_loc[request : request + 2].tolist())
        if length == 0:
            sinks = batch.options.get("sinks")
            out[rows], lse[rows] = 0.0, -math.inf if sinks is None else sinks
            continue
        out[rows], lse[rows] = reference.paged_attention(
            batch.query[rows],
            batch.cache,
            batch.block_table[request : request + 1],
            batch.seq_lens[request : request + 1],
            torch.tensor([0, rows.stop - rows.start]),
            Layout.LINEAR,
            **batch.options,
        )
    return out, lse


def assert_close(
    got: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor]
) -> None:
    (out, lse), (wanted_out, wanted_lse) = got, wanted
    assert torch.equal(out.isnan(), wanted_out.isnan())
    nan = wanted_out.isnan().any(-1)
    out, tolerance = out.float().nan_to_num(0.0), TOLERANCE[out.dtype]
    wanted_out = wanted_out.nan_to_num(0.0)
    error = (out - wanted_out).norm(dim=-1) / wanted_out.norm(dim=-1).clamp_min(1e-20)
    assert error.numel() == 0 or error.max() <= tolerance, f"{error.max():.2e} off"
    lse, wanted_lse = lse.masked_fill(nan, 0.0), wanted_lse.masked_fill(nan, 0.0)
    torch.testing.assert_close(lse, wanted_lse, atol=LSE_TOLERANCE, rtol=1e-3)


def check(case: Case) -> None:
    batch = make(case)
    plan = None if case.plan is None else planned(batch, **case.plan)
    assert_close(attend(batch, plan), expected(batch))


MIXED: dict[str, Any] = {"lengths": (150, 1, 0, 37, 90, 64), "queries": (1, 1, 0, 37, 5, 20)}
DECODE: dict[str, Any] = {"lengths": (600, 1, 0, 37, 64, 65), "queries": (1, 1, 1, 1, 1, 1)}
