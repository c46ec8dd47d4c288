# SPDX-License-Identifier: Apache-2.0
"""Build batches of paged attention, and compare the kernels' results with the reference's."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from testing.kernels import paged_batch
from testing.kernels.paged_batch import Outputs
from vllm_hybrid_kv.kernels import k8v4, reference
from vllm_hybrid_kv.kernels.k8v4 import Layout
from vllm_hybrid_kv.kernels.triton import LaunchPlan, paged_attention, plan_attention

TOLERANCE = {
    # Rounding weights to fp16 adds 2^-12, and several times that if the values cancel.
    torch.float32: 1e-3,
    torch.float16: 1.5e-3,  # rounding outputs to fp16 adds another 2^-12
    torch.bfloat16: 5e-3,  # rounding outputs to bf16 adds 2^-9; the rest is for cancellation
}
"""Largest ||out - reference|| / ||reference|| over the dims of one row."""

LSE_TOLERANCE = 1e-5
"""Largest |lse - reference| / (1 + |reference|). The kernels' products of codes are exact, but the
reference sums float32 products and exponentials are approximate, to about 2^-20."""

UNWRITTEN = 7.0
"""The value that fills the outputs before a call."""

# These batches are small, because the interpreter takes milliseconds for each tile and for each row
# that may have a partial result. The first request is long enough to be split by every tiling.
MIXED: dict[str, Any] = {"lengths": (290, 1, 0, 20, 150), "queries": (1, 1, 0, 9, 5)}
DECODE: dict[str, Any] = {"lengths": (330, 1, 0, 37, 64), "queries": (1, 1, 1, 1, 1)}


@dataclass(frozen=True)
class Case(paged_batch.Case):
    """The shapes, lengths and options of one call.

    Attributes:
        plan: Keyword arguments of `plan_attention`; None to let `paged_attention` plan.
        value_size: The values are multiplied by this.
        query_size: The queries are multiplied by this.
        unused: Fills the bytes of the cache that belong to no token; 0xFF is part of a NaN.
    """

    head_size: int = 64
    num_heads: int = 4
    num_kv_heads: int = 1
    page_size: int = 32
    lengths: tuple[int, ...] = (150,)
    dtype: torch.dtype = torch.bfloat16
    plan: dict[str, Any] | None = None
    value_size: float = 1.0
    query_size: float = 1.0
    unused: int = 0xFF


@dataclass
class Batch(paged_batch.Batch):
    """The tensors of a call, with pages of `Layout.LINEAR`."""

    layout = Layout.LINEAR
    max_query_len: int = 1

    def to(self, device: torch.device | str) -> Batch:
        """Copy the batch to another device."""
        options = {k: v.to(device) if hasattr(v, "to") else v for k, v in self.options.items()}
        query, cache, block_table, seq_lens, starts = (one.to(device) for one in self.inputs)
        return Batch(query, cache, block_table, seq_lens, starts, options, self.max_query_len)

    def scales(self, request: int, head: int, plane: str) -> list[torch.Tensor]:
        """Return the fp16 scales of a request's keys or values, as one writable view per page."""
        page_format = self.page_format
        page_size = page_format.page_size
        start = {"key": page_format.key_scale_offset, "value": page_format.value_scale_offset}[
            plane
        ]
        count = -(-int(self.seq_lens[request]) // page_size)
        return [
            self.cache[block, head].view(-1)[start : start + 2 * page_size].view(torch.float16)
            for block in self.block_table[request, :count].tolist()
        ]


def make(case: Case) -> Batch:
    """Build a case's batch on the CPU, with its requests in shuffled pages."""
    generator = torch.Generator().manual_seed(case.seed)
    heads = case.num_kv_heads, case.page_size, k8v4.slot_bytes(case.head_size)
    cache = torch.full((sum(case.pages) + 2, *heads), case.unused, dtype=torch.uint8)
    most = max(case.queries)
    batch = Batch.build(case, cache, generator, unused=10**8, max_query_len=most)
    batch.query *= case.query_size
    for blocks, length in zip(batch.block_table.long(), case.lengths, strict=True):
        dims = (2, length, case.num_kv_heads, case.head_size)
        key, value = torch.randn(dims, generator=generator)
        value = (value + torch.randn(dims[1:3], generator=generator)[..., None]) * case.value_size
        position = torch.arange(length)
        slots = blocks[position // case.page_size] * case.page_size + position % case.page_size
        reference.store(reference.quantise(key, value), cache, slots, Layout.LINEAR)
    return batch


HIDDEN_HALVES = (0x0000, 0x7E00, 0x7C00, 0xFC00, 0x7BFF)
"""fp16 bits, used as scales of hidden tokens: zero, NaN, infinities and the largest number."""


def fill_token(batch: Batch, request: int, token: int, half: int) -> None:
    """Set both scales of a token to these fp16 bits, and its codes to the largest magnitudes."""
    page_format = batch.page_format
    t = token % page_format.page_size
    page = batch.block_table[request, token // page_format.page_size]
    for region in batch.cache[page].flatten(1):
        region[t * page_format.head_size :][: page_format.head_size] = 0x7F
        value = page_format.value_offset + t * page_format.head_size // 2
        region[value : value + page_format.head_size // 2] = 0xFF
        bits = torch.tensor([half & 0xFF, half >> 8], dtype=torch.uint8)
        for offset in (page_format.key_scale_offset, page_format.value_scale_offset):
            region[offset + 2 * t : offset + 2 * t + 2] = bits


def planned(batch: Batch, **options: Any) -> LaunchPlan:
    tokens, num_heads, head_size = batch.query.shape
    return plan_attention(
        batch.seq_lens, batch.query_start_loc, tokens, num_heads, batch.cache.shape[1], head_size,
        causal=batch.options.get("causal", True), window=batch.options.get("window"),
        max_query_len=batch.max_query_len, **options,
    )  # fmt: skip


class Part(NamedTuple):
    """The key tiles of a row tile that one program attends to.

    Attributes:
        first, end: The first key tile and 1 + the last, counted from the row tile's first.
        part_idx: Index of the partial result; None if the program writes the output.
    """

    program: int
    row_tile: int
    first: int
    end: int
    part_idx: int | None


def parts_of(plan: LaunchPlan) -> Iterator[Part]:
    """Yield what programs do, as `attend_kernel` reads the tables of a plan."""
    row_tiles = plan.row_tiles.tolist()
    for program, (first_tile, end_tile, start, end) in enumerate(plan.pieces.tolist()):
        for row_tile in range(first_tile, end_tile):
            _, _, position, first_program, last_program = row_tiles[row_tile]
            part_idx = 2 * program + (program == first_program)
            yield Part(
                program, row_tile, max(start - position, 0), end - position,
                None if first_program == last_program else part_idx,
            )  # fmt: skip


def attend(batch: Batch, plan: LaunchPlan | None = None, into: Outputs | None = None) -> Outputs:
    """Run the kernels. They write to `into`, or to new tensors that are full of `UNWRITTEN`."""
    if into is None:
        lse_shape = batch.query.shape[:2]
        lse = torch.full(lse_shape, UNWRITTEN, dtype=torch.float32, device=batch.query.device)
        into = torch.full_like(batch.query, UNWRITTEN), lse
    paged_attention(*batch.inputs, into[0], lse=into[1], plan=plan, **batch.options)
    return into


def expected(batch: Batch, *, integer_query: bool = True) -> Outputs:
    """Run the reference on the CPU, with the query rounded to codes or in float32."""
    batch = batch.to("cpu")
    return reference.paged_attention(
        *batch.inputs, Layout.LINEAR, integer_query=integer_query, **batch.options
    )


def largest_score_change(batch: Batch) -> torch.Tensor:
    """Return float32 [T, Hq]: how far rounding a query to codes can move any of its scores.

    Rounding moves a rotated number by at most half a step, 1/254 of the row's largest. So a score
    moves at most by that times the sum of magnitudes of the rotated key; less with a soft cap.
    """
    largest = reference.rotate(batch.query.float()).abs().amax(-1)
    change = torch.zeros_like(largest)
    group = batch.query.shape[1] // batch.cache.shape[1]
    page_size = batch.page_format.page_size
    starts = batch.query_start_loc.tolist()
    for request, (first, last) in enumerate(itertools.pairwise(starts)):
        length = int(batch.seq_lens[request])
        if length == 0 or first == last:
            continue
        blocks = batch.block_table[request, : -(-length // page_size)].long()
        stored = reference.load(batch.cache[blocks], batch.query.shape[2], Layout.LINEAR)
        codes, scale = stored.key_codes[:length].float(), stored.key_scale[:length].float()
        sizes = (codes.abs().sum(-1) * scale).amax(0)  # of each KV head
        change[first:last] = largest[first:last] / 254 * sizes.repeat_interleave(group)
    return change * batch.options["scale"]


def assert_close(got: Outputs, wanted: Outputs) -> str:
    """Assert that outputs are within the tolerance of their dtype; return the error as text."""
    return paged_batch.assert_close(got, wanted, TOLERANCE, LSE_TOLERANCE, LSE_TOLERANCE)


def check(case: Case) -> None:
    """Assert that for a case the kernels' outputs are close to the reference's."""
    batch = make(case)
    plan = None if case.plan is None else planned(batch, **case.plan)
    assert_close(attend(batch, plan), expected(batch))
