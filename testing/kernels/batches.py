# SPDX-License-Identifier: Apache-2.0
"""Batches of paged attention on CPUs, and the float32 definition to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vllm_hybrid_kv.kernels import k8v4, reference
from vllm_hybrid_kv.kernels.cpu import isa, paged_attention
from vllm_hybrid_kv.kernels.k8v4 import PageFormat

# Largest ||out - reference|| / ||reference|| over the dims of one row.
TOLERANCE = {
    torch.float32: 2e-5,  # float32 sums in another order
    torch.float16: 2e-3,  # outputs rounded to 11 bits: 2^-11, and room for cancellation
    torch.bfloat16: 1.5e-2,  # weights and outputs rounded to 8 bits: 2^-9 each, likewise
}
# Largest |lse - reference|: float32 products in another order, on scores of size one.
LSE_TOLERANCE = 1e-4

PATHS = isa.available()


@dataclass
class Case:
    """A batch: shapes, lengths and options of one call."""

    head_size: int = 128
    num_heads: int = 8
    num_kv_heads: int = 2
    page_size: int = 128
    lengths: tuple[int, ...] = (300,)
    queries: tuple[int, ...] = (1,)
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    options: dict[str, Any] | None = None


@dataclass
class Batch:
    """The tensors of a call."""

    query: torch.Tensor
    cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    options: dict[str, Any]

    @property
    def page_format(self) -> PageFormat:
        head_size = self.query.shape[2]
        return PageFormat(head_size, self.cache.shape[2], k8v4.cpu_layout(head_size))

    def half(self, request: int, token: int, head: int, offset: int) -> torch.Tensor:
        """The two bytes of a token's scale or zero."""
        block = int(self.block_table[request, token // self.page_format.page_size])
        start = offset + 2 * (token % self.page_format.page_size)
        return self.cache[block, head].view(-1)[start : start + 2]

    def set_scale(self, request: int, token: int, head: int, scale: float) -> None:
        bits = torch.tensor([scale], dtype=torch.float16).view(torch.uint8)
        self.half(request, token, head, self.page_format.scale_offset)[:] = bits


def random_pages(
    generator: torch.Generator, blocks: int, num_kv_heads: int, page_format: PageFormat
) -> torch.Tensor:
    """Pages of independent normal keys and uniform value codes, which need no layout."""
    page_size, head_size = page_format.page_size, page_format.head_size
    cache = torch.randint(
        0,
        256,
        (blocks, num_kv_heads, page_size, k8v4.slot_bytes(head_size)),
        dtype=torch.uint8,
        generator=generator,
    )
    regions = cache.view(blocks, num_kv_heads, -1)
    keys = torch.randn(blocks, num_kv_heads, page_size * head_size, generator=generator)
    regions[..., : page_format.value_offset] = keys.to(torch.float8_e4m3fn).view(torch.uint8)
    shape = (blocks, num_kv_heads, page_size)
    scales = torch.rand(shape, generator=generator) * 0.3 + 0.05
    zeros = torch.randn(shape, generator=generator) - 2.0
    for offset, numbers in ((page_format.scale_offset, scales), (page_format.zero_offset, zeros)):
        plane = numbers.to(torch.float16).view(torch.uint8)
        regions[..., offset : offset + 2 * page_size] = plane
    return cache


def make(case: Case) -> Batch:
    generator = torch.Generator().manual_seed(case.seed)
    page_format = PageFormat(case.head_size, case.page_size, k8v4.cpu_layout(case.head_size))
    pages = [-(-length // case.page_size) for length in case.lengths]
    cache = random_pages(generator, sum(pages) + 2, case.num_kv_heads, page_format)
    order = torch.randperm(sum(pages) + 2, generator=generator).to(torch.int32)
    table = torch.full((len(pages), max(pages) + 1), 0, dtype=torch.int32)
    start = 0
    for request, count in enumerate(pages):
        table[request, :count] = order[start : start + count]
        start += count
    query = torch.randn(sum(case.queries), case.num_heads, case.head_size, generator=generator)
    starts = torch.tensor([0, *case.queries]).cumsum(0).to(torch.int32)
    return Batch(
        query.to(case.dtype),
        cache,
        table,
        torch.tensor(case.lengths, dtype=torch.int32),
        starts,
        {"scale": case.head_size**-0.5, **(case.options or {})},
    )


def attend(batch: Batch, path: str, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
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
        isa=path,
        debug=True,
        **batch.options,
        **more,
    )
    return out, lse


def expected(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.paged_attention(
        batch.query,
        batch.cache,
        batch.block_table,
        batch.seq_lens,
        batch.query_start_loc,
        k8v4.cpu_layout(batch.query.shape[2]),
        **batch.options,
    )


def assert_close(
    got: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor]
) -> None:
    (out, lse), (wanted_out, wanted_lse) = got, wanted
    assert torch.equal(out.isnan(), wanted_out.isnan())
    out, tolerance = out.float().nan_to_num(0.0), TOLERANCE[out.dtype]
    wanted_out = wanted_out.nan_to_num(0.0)
    error = (out - wanted_out).norm(dim=-1) / wanted_out.norm(dim=-1).clamp_min(1e-20)
    assert error.numel() == 0 or error.max() <= tolerance, f"{error.max():.2e} off"
    torch.testing.assert_close(lse, wanted_lse, atol=LSE_TOLERANCE, rtol=1e-5)


def check(case: Case, path: str) -> None:
    batch = make(case)
    assert_close(attend(batch, path), expected(batch))


MIXED = {"lengths": (300, 1, 0, 77, 140, 64), "queries": (1, 1, 0, 77, 5, 20)}
