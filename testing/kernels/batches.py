# SPDX-License-Identifier: Apache-2.0
"""Make batches for paged attention on CPUs, and compare results with the integer reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from testing.kernels import paged_batch
from testing.kernels.paged_batch import Case, Outputs
from vllm_hybrid_kv.kernels import k8v4, reference
from vllm_hybrid_kv.kernels.cpu import isa, paged_attention
from vllm_hybrid_kv.kernels.k8v4 import PageFormat

# Kernels round weights to 15 or 16 bits, relative to the largest of up to 256 tokens. The errors in
# a row are independent, so they grow with the root of the tokens. Usually they add up to 1.3e-4.
_WEIGHTS = 2.5e-4
# Largest ||out - reference|| / ||reference|| over the dims of one row. It allows for
# rounding weights, and for rounding outputs to 11 or 8 bits.
TOLERANCE = {
    torch.float32: _WEIGHTS,
    torch.float16: _WEIGHTS + 2.0**-11,
    torch.bfloat16: _WEIGHTS + 2.0**-8,
}
# Largest |lse - reference|, absolute and relative. Scores are exact integer products times scales,
# so only float32 rounding differs. A soft cap of 30 limits scores to 43, in units of log2. Rounding
# such a score changes it by up to 2.6e-6. Rounding sums of weights or products changes lse by more.
LSE_TOLERANCE = {"atol": 5e-6, "rtol": 2e-6}

PATHS = isa.available()


@dataclass
class Batch(paged_batch.Batch):
    """The tensors of a call, with pages of `k8v4.Layout.CPU_TILED`."""

    layout = k8v4.Layout.CPU_TILED

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
    page_format = PageFormat(case.head_size, case.page_size, Batch.layout)
    cache = _random_pages(generator, sum(case.pages) + 2, case.num_kv_heads, page_format)
    return Batch.build(case, cache, generator, unused=0)


def attend(batch: Batch, path: str) -> Outputs:
    """Run the CPU kernel on tensors full of 7, so that tests see what it leaves unwritten."""
    out = torch.full_like(batch.query, 7.0)
    lse = torch.full(batch.query.shape[:2], 7.0)
    paged_attention(*batch.inputs, out, lse=lse, isa=path, debug=True, **batch.options)
    return out, lse


def expected(batch: Batch) -> Outputs:
    return reference.paged_attention(*batch.inputs, batch.layout, **batch.options)


def assert_close(got: Outputs, wanted: Outputs) -> None:
    paged_batch.assert_close(got, wanted, TOLERANCE, **LSE_TOLERANCE)


def assert_equal(got: Outputs, wanted: Outputs) -> None:
    """Compare the bits of outputs and log-sum-exps."""
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


def check(case: Case, path: str) -> None:
    batch = make(case)
    assert_close(attend(batch, path), expected(batch))


MIXED: dict[str, Any] = {"lengths": (300, 1, 0, 77, 140, 64), "queries": (1, 1, 0, 77, 5, 20)}
