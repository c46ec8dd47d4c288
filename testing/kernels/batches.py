# SPDX-License-Identifier: Apache-2.0
"""Make batches for paged attention on CPUs, and compare results with the integer reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from vllm_hybrid_kv.kernels import k8v4, reference
from vllm_hybrid_kv.kernels.cpu import isa, paged_attention
from vllm_hybrid_kv.kernels.k8v4 import PageFormat

# Kernels round weights to 15 or 16 bits, relative to the largest of up to 256 tokens. The errors in
# a row are independent, so they grow with the root of the tokens: 1.3e-4 of a row is usual.
_WEIGHTS = 2.5e-4
# Largest ||out - reference|| / ||reference|| over the dims of one row, by dtype: the rounding of
# weights, and of outputs to 11 or 8 bits.
TOLERANCE = {
    torch.float32: _WEIGHTS,
    torch.float16: _WEIGHTS + 2.0**-11,
    torch.bfloat16: _WEIGHTS + 2.0**-8,
}
# Largest |lse - reference|, absolute and relative. Scores are exact integer products times scales.
# Errors come from single float32 operations (2^-24 of 43 under a soft cap of 30), from the sums of
# weights and, in the reference, from the sums of products.
LSE_TOLERANCE = {"atol": 5e-6, "rtol": 2e-6}

PATHS = isa.available()

Result: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Outputs and their log-sum-exps."""


@dataclass
class Case:
    """The shapes, lengths and options of one call."""

    head_size: int = 128
    num_heads: int = 8
    num_kv_heads: int = 2
    page_size: int = 128
    lengths: tuple[int, ...] = (300,)
    queries: tuple[int, ...] = (1,)
    dtype: torch.dtype = torch.float32
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)


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
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The tensors that `paged_attention` reads, in its order."""
        return self.query, self.cache, self.block_table, self.seq_lens, self.query_start_loc

    @property
    def page_format(self) -> PageFormat:
        head_size = self.query.shape[2]
        return PageFormat(head_size, self.cache.shape[2], k8v4.Layout.CPU_TILED)

    @property
    def scales(self) -> torch.Tensor:
        """A view of the key and value scales of all pages, float16 [blocks, H, 2, N]."""
        scales = self.cache.flatten(2)[..., self.page_format.key_scale_offset :].view(torch.float16)
        return scales.unflatten(2, (2, -1))

    def place(self, request: int, token: int) -> tuple[int, int]:
        """Return a token's block, and the token's index in the block."""
        page, t = divmod(token, self.page_format.page_size)
        return int(self.block_table[request, page]), t

    def set_keys(self, block: int, t: int, codes: Sequence[int]) -> None:
        """Set the key codes of a token's first dims, in all heads."""
        places = [self.page_format.key_byte(t, dim) for dim in range(len(codes))]
        stored = torch.tensor(codes, dtype=torch.int8).view(torch.uint8)
        self.cache[block].flatten(1)[:, places] = stored ^ self.page_format.key_sign_flip

    def set_values(self, block: int, t: int, codes: Sequence[int]) -> None:
        """Set the value codes of a token's first dims, in all heads."""
        region = self.cache[block].flatten(1)
        for dim, code in enumerate(codes):
            byte, shift = self.page_format.value_byte(t, dim)
            region[:, byte] = region[:, byte] & (0xF0 >> shift) | code << shift


def _random_pages(
    generator: torch.Generator, blocks: int, num_kv_heads: int, page_format: PageFormat
) -> torch.Tensor:
    """Make pages with uniformly random codes, which are valid in any layout."""
    page_size, head_size = page_format.page_size, page_format.head_size
    shape = (blocks, num_kv_heads, page_size)
    cache = torch.empty(*shape, k8v4.slot_bytes(head_size), dtype=torch.uint8)
    cache.random_(generator=generator)
    regions = cache.view(blocks, num_kv_heads, -1)
    # No store writes the key code -128.
    keys = regions[..., : page_format.value_offset]
    keys.masked_fill_(keys == 128 ^ page_format.key_sign_flip, 0)
    for offset, least in (
        (page_format.key_scale_offset, 0.005),
        (page_format.value_scale_offset, 0.05),
    ):
        scales = (torch.rand(shape, generator=generator) * 6 + 1) * least
        regions[..., offset : offset + 2 * page_size] = scales.half().view(torch.uint8)
    return cache


def make(case: Case) -> Batch:
    """Make a batch of random queries, with random pages in random order."""
    generator = torch.Generator().manual_seed(case.seed)
    page_format = PageFormat(case.head_size, case.page_size, k8v4.Layout.CPU_TILED)
    pages = [-(-length // case.page_size) for length in case.lengths]
    cache = _random_pages(generator, sum(pages) + 2, case.num_kv_heads, page_format)
    order = torch.randperm(sum(pages) + 2, generator=generator).to(torch.int32)
    table = torch.full((len(pages), max(pages) + 1), 0, dtype=torch.int32)
    for row, blocks in zip(table, order[: sum(pages)].split(pages), strict=True):
        row[: len(blocks)] = blocks
    query = torch.randn(sum(case.queries), case.num_heads, case.head_size, generator=generator)
    return Batch(
        query.to(case.dtype),
        cache,
        table,
        torch.tensor(case.lengths, dtype=torch.int32),
        torch.tensor([0, *case.queries]).cumsum(0).to(torch.int32),
        {"scale": case.head_size**-0.5, **case.options},
    )


def attend(batch: Batch, path: str) -> Result:
    """Run the CPU kernel. Its results are 7 wherever it wrote nothing."""
    out = torch.full_like(batch.query, 7.0)
    lse = torch.full(batch.query.shape[:2], 7.0)
    paged_attention(*batch.inputs, out, lse=lse, isa=path, debug=True, **batch.options)
    return out, lse


def expected(batch: Batch) -> Result:
    layout = k8v4.Layout.CPU_TILED
    return reference.paged_attention(*batch.inputs, layout, **batch.options)


def assert_close(got: Result, wanted: Result) -> None:
    """Compare outputs row by row, and log-sum-exps. NaN must be in the same places.

    Log-sum-exps of rows with a NaN are not compared, because they are undefined.
    """
    (out, lse), (wanted_out, wanted_lse) = got, wanted
    assert torch.equal(out.isnan(), wanted_out.isnan())
    out, tolerance = out.float().nan_to_num(0.0), TOLERANCE[out.dtype]
    wanted_out = wanted_out.nan_to_num(0.0)
    error = (out - wanted_out).norm(dim=-1) / wanted_out.norm(dim=-1).clamp_min(1e-20)
    assert error.numel() == 0 or error.max() <= tolerance, f"relative error {error.max():.2e}"
    shows_nan = wanted[0].isnan().any(-1)
    lse, wanted_lse = (x.masked_fill(shows_nan, 0.0) for x in (lse, wanted_lse))
    torch.testing.assert_close(lse, wanted_lse, **LSE_TOLERANCE)


def assert_equal(got: Result, wanted: Result) -> None:
    """Compare the bits of outputs and log-sum-exps."""
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


def check(case: Case, path: str) -> None:
    batch = make(case)
    assert_close(attend(batch, path), expected(batch))


MIXED: dict[str, Any] = {"lengths": (300, 1, 0, 77, 140, 64), "queries": (1, 1, 0, 77, 5, 20)}
