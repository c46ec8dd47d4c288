# SPDX-License-Identifier: Apache-2.0
"""Batches of paged attention in any layout, and the comparison of their results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeAlias

import torch

from vllm_hybrid_kv.kernels.k8v4 import Layout, PageFormat

Outputs: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Outputs [T, Hq, D] and log-sum-exps [T, Hq]."""


@dataclass(frozen=True)
class Case:
    """The shapes, lengths and options (keyword arguments) of one call."""

    head_size: int = 128
    num_heads: int = 8
    num_kv_heads: int = 2
    page_size: int = 128
    lengths: tuple[int, ...] = (300,)
    queries: tuple[int, ...] = (1,)
    dtype: torch.dtype = torch.float32
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def pages(self) -> list[int]:
        return [-(-length // self.page_size) for length in self.lengths]


@dataclass
class Batch:
    """The tensors of a call."""

    layout: ClassVar[Layout]

    query: torch.Tensor
    cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    options: dict[str, Any]

    @classmethod
    def build(
        cls, case: Case, cache: torch.Tensor, generator: torch.Generator, unused: int, **more: Any
    ) -> Self:
        """Make a batch with random queries, and give blocks of `cache` to requests at random.

        `unused` fills the rest of the block table. `more` are further fields of a subclass.
        """
        order = torch.randperm(len(cache), generator=generator).split([*case.pages, 2])
        size = len(case.pages), max(case.pages, default=0) + 1
        table = torch.full(size, unused, dtype=torch.int32)
        for row, blocks in zip(table, order, strict=False):
            row[: len(blocks)] = blocks
        query = torch.randn(sum(case.queries), case.num_heads, case.head_size, generator=generator)
        lengths = torch.tensor(case.lengths, dtype=torch.int32)
        starts = torch.tensor([0, *case.queries]).cumsum(0).to(torch.int32)
        options = {"scale": case.head_size**-0.5, **case.options}
        return cls(query.to(case.dtype), cache, table, lengths, starts, options, **more)

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The tensors that `paged_attention` reads, in its order."""
        return self.query, self.cache, self.block_table, self.seq_lens, self.query_start_loc

    @property
    def page_format(self) -> PageFormat:
        return PageFormat(self.query.shape[2], self.cache.shape[2], self.layout)


def assert_close(
    got: Outputs, wanted: Outputs, tolerance: Mapping[torch.dtype, float], atol: float, rtol: float
) -> str:
    """Assert that outputs and log-sum-exps are close, and return how far apart they are.

    `tolerance` bounds ||out - wanted|| / ||wanted|| of each row. `atol` and `rtol` bound errors of
    log-sum-exps. NaN must be in the same places; a row with a NaN has no defined log-sum-exp.
    """
    allowed = tolerance[got[0].dtype]
    out, lse = (x.cpu().float() for x in got)
    wanted_out, wanted_lse = (x.cpu().float() for x in wanted)
    assert torch.equal(out.isnan(), wanted_out.isnan()), "NaNs differ from the reference's"
    compared = ~wanted_out.isnan().any(-1) & (lse != wanted_lse)  # both may be -inf
    out, wanted_out = out.nan_to_num(0.0), wanted_out.nan_to_num(0.0)
    error = (out - wanted_out).norm(dim=-1) / wanted_out.norm(dim=-1).clamp_min(1e-20)
    size = wanted_lse.abs().nan_to_num(posinf=0.0)
    difference = torch.where(compared, (lse - wanted_lse).abs(), 0.0)
    numbers = (error, difference / (1 + size))
    found = "out {:.1e}, lse {:.1e}".format(*(x.max() if x.numel() else 0.0 for x in numbers))
    assert bool((error <= allowed).all()), f"{found}; out may have {allowed:.0e}"
    assert bool((difference <= atol + rtol * size).all()), f"{found}; lse may have less"
    return found
