# SPDX-License-Identifier: Apache-2.0
"""Batches of paged attention, the kernels' result and the reference's; on a GPU or interpreted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_hybrid_kv.kernels import k8v4, reference
from vllm_hybrid_kv.kernels.k8v4 import Layout, PageFormat
from vllm_hybrid_kv.kernels.triton import LaunchPlan, paged_attention, plan_attention

TOLERANCE = {
    # Queries and weights rounded to fp16's 11 bits, 2^-12 each: 4e-4 in the mean over rows, and
    # several times that in a row whose values cancel.
    torch.float32: 2e-3,
    torch.float16: 2e-3,  # the same, and outputs
    torch.bfloat16: 6e-3,  # outputs rounded to 8 bits: 2^-9, and room for cancellation
}
"""Largest ||out - reference|| / ||reference|| over the dims of one row."""

LSE_TOLERANCE = 2e-3
"""Largest |lse - reference| / (1 + |reference| / 2): queries rounded to fp16, scores of about 1."""

UNWRITTEN = 7.0
"""What outputs hold before a call."""

# Small, because the interpreter takes some milliseconds for a tile and one for each row that may
# have a partial result. Every tiling splits the first request.
MIXED: dict[str, Any] = {"lengths": (290, 1, 0, 20, 150), "queries": (1, 1, 0, 9, 5)}
DECODE: dict[str, Any] = {"lengths": (330, 1, 0, 37, 64), "queries": (1, 1, 1, 1, 1)}

Outputs = tuple[torch.Tensor, torch.Tensor]
"""Outputs [T, Hq, D] and log-sum-exps [T, Hq]."""


@dataclass(frozen=True)
class Case:
    """The shapes, lengths and options of one call.

    Attributes:
        options: Keyword arguments of `paged_attention` and `reference.paged_attention`.
        plan: Keyword arguments of `plan_attention`; None to let `paged_attention` plan.
        value_size: Factor of the values.
        query_size: Factor of the queries.
        unused: Byte of the cache that belongs to no token; 0xFF is part of a NaN.
    """

    head_size: int = 64
    num_heads: int = 4
    num_kv_heads: int = 1
    page_size: int = 32
    lengths: tuple[int, ...] = (150,)
    queries: tuple[int, ...] = (1,)
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] | None = None
    value_size: float = 1.0
    query_size: float = 1.0
    unused: int = 0xFF


@dataclass
class Batch:
    """The tensors of a call."""

    query: torch.Tensor
    cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    max_query_len: int
    options: dict[str, Any]

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The tensors that `paged_attention` reads, in its order."""
        return self.query, self.cache, self.block_table, self.seq_lens, self.query_start_loc

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device."""
        options = {k: v.to(device) if hasattr(v, "to") else v for k, v in self.options.items()}
        query, cache, block_table, seq_lens, starts = (one.to(device) for one in self.inputs)
        return Batch(query, cache, block_table, seq_lens, starts, self.max_query_len, options)

    def scales(self, request: int, head: int, plane: str = "scale") -> list[torch.Tensor]:
        """Return views of the fp16 scales, or zeros, in a request's pages, in order."""
        page_size = self.cache.shape[2]
        page_format = PageFormat(self.query.shape[2], page_size, Layout.LINEAR)
        start = page_format.scale_offset if plane == "scale" else page_format.zero_offset
        count = -(-int(self.seq_lens[request]) // page_size)
        return [
            self.cache[block, head].view(-1)[start : start + 2 * page_size].view(torch.float16)
            for block in self.block_table[request, :count].tolist()
        ]


def make(case: Case) -> Batch:
    """Return requests in shuffled pages, on the CPU."""
    generator = torch.Generator().manual_seed(case.seed)
    pages = [-(-length // case.page_size) for length in case.lengths]
    shape = (sum(pages) + 2, case.num_kv_heads, case.page_size, k8v4.slot_bytes(case.head_size))
    cache = torch.full(shape, case.unused, dtype=torch.uint8)
    order = torch.randperm(shape[0], generator=generator)
    table = torch.full((len(pages), max(pages, default=0) + 1), 10**8, dtype=torch.int32)
    for row, blocks, length in zip(table, order.split([*pages, 2]), case.lengths, strict=False):
        row[: len(blocks)] = blocks
        dims = (2, length, case.num_kv_heads, case.head_size)
        key, value = torch.randn(dims, generator=generator)
        value = (value + torch.randn(dims[1:3], generator=generator)[..., None]) * case.value_size
        position = torch.arange(length)
        slots = blocks[position // case.page_size] * case.page_size + position % case.page_size
        reference.store(reference.quantise(key, value), cache, slots, Layout.LINEAR)
    query = torch.randn(sum(case.queries), case.num_heads, case.head_size, generator=generator)
    return Batch(
        (query * case.query_size).to(case.dtype),
        cache,
        table,
        torch.tensor(case.lengths, dtype=torch.int32),
        torch.tensor([0, *case.queries]).cumsum(0).to(torch.int32),
        max(case.queries),
        {"scale": case.head_size**-0.5, **case.options},
    )


def planned(batch: Batch, **options: Any) -> LaunchPlan:
    """Plan a batch."""
    tokens, num_heads, head_size = batch.query.shape
    return plan_attention(
        batch.seq_lens, batch.query_start_loc, tokens, num_heads, batch.cache.shape[1], head_size,
        causal=batch.options.get("causal", True), window=batch.options.get("window"),
        max_query_len=batch.max_query_len, **options,
    )  # fmt: skip


def attend(batch: Batch, plan: LaunchPlan | None = None, into: Outputs | None = None) -> Outputs:
    """Run the kernels, and return their outputs."""
    if into is None:
        lse_shape = batch.query.shape[:2]
        lse = torch.full(lse_shape, UNWRITTEN, dtype=torch.float32, device=batch.query.device)
        into = torch.full_like(batch.query, UNWRITTEN), lse
    paged_attention(*batch.inputs, into[0], lse=into[1], plan=plan, **batch.options)
    return into


def expected(batch: Batch) -> Outputs:
    """Run the reference on the CPU."""
    batch = batch.to("cpu")
    return reference.paged_attention(*batch.inputs, Layout.LINEAR, **batch.options)


def assert_close(got: Outputs, wanted: Outputs) -> str:
    """Assert that outputs are within the tolerance of their dtype, and return how far they are.

    The log-sum-exp of a row with a NaN is undefined.
    """
    tolerance = TOLERANCE[got[0].dtype]
    out, lse = (x.cpu().float() for x in got)
    wanted_out, wanted_lse = (x.cpu().float() for x in wanted)
    assert torch.equal(out.isnan(), wanted_out.isnan()), "NaNs differ from the reference's"
    defined = ~wanted_out.isnan().any(-1)
    out, wanted_out = out.nan_to_num(0.0), wanted_out.nan_to_num(0.0)
    error = (out - wanted_out).norm(dim=-1) / wanted_out.norm(dim=-1).clamp_min(1e-20)
    compared = defined & (lse != wanted_lse)  # both may be -inf
    lse_error = (lse - wanted_lse).abs() / (1 + wanted_lse.abs() / 2)
    lse_error = torch.where(compared, lse_error, 0.0)
    largest, largest_lse = (float(x.max()) if x.numel() else 0.0 for x in (error, lse_error))
    found = f"out {largest:.1e}, lse {largest_lse:.1e}"
    assert largest <= tolerance, f"{found}; {tolerance:.0e} and {LSE_TOLERANCE:.0e} are allowed"
    assert largest_lse <= LSE_TOLERANCE, f"{found}; {LSE_TOLERANCE:.0e} is allowed for the lse"
    return found


def check(case: Case) -> None:
    """Assert that the kernels attend to a case as the reference does."""
    batch = make(case)
    plan = None if case.plan is None else planned(batch, **case.plan)
    assert_close(attend(batch, plan), expected(batch))
