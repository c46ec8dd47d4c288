# SPDX-License-Identifier: Apache-2.0
"""Attend with the kernels and with the reference; run where Triton interprets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from vllm_hybrid_kv.kernels import k8v4, reference
from vllm_hybrid_kv.kernels.k8v4 import Layout, PageFormat
from vllm_hybrid_kv.kernels.triton import largest_scratch, paged_attention, plan_attention
from vllm_hybrid_kv.kernels.triton.plan import Plan

# Largest ||out - reference|| / ||reference|| over the dims of one row.
TOLERANCE = {
    # Queries and weights rounded to fp16's 11 bits, 2^-12 each: 4e-4 in the mean over rows, and
    # several times that in a row whose values cancel.
    torch.float32: 2.5e-3,
    torch.float16: 2.5e-3,  # likewise, and outputs
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
    unused: int = 0xFF
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
    """Requests in shuffled pages; bytes that belong to no token are `unused`, 0xFF of a NaN."""
    generator = torch.Generator().manual_seed(case.seed)
    pages = [-(-length // case.page_size) for length in case.lengths]
    shape = (sum(pages) + 2, case.num_kv_heads, case.page_size, k8v4.slot_bytes(case.head_size))
    cache = torch.full(shape, case.unused, dtype=torch.uint8)
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


# Small, because the interpreter takes some milliseconds for a tile and one for each row that a
# program may have left a part of. The first request is long enough to be split in every tiling.
MIXED: dict[str, Any] = {"lengths": (290, 1, 0, 20, 150), "queries": (1, 1, 0, 9, 5)}
DECODE: dict[str, Any] = {"lengths": (330, 1, 0, 37, 64), "queries": (1, 1, 1, 1, 1)}


def tiles_of_programs(lengths: tuple[int, ...], processors: int) -> list[int]:
    """Tiles of keys that each program of a decode plan takes."""
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32)
    plan = plan_attention(
        seq_lens, starts, len(lengths), 4, 1, 64, max_query_len=1, processors=processors
    )
    counts = []
    for request, first_row, split, splits, _ in plan.items.tolist():
        if request >= 0:
            assert first_row == 0
            tiles = -(-lengths[request] // plan.tiling.block_n)
            counts.append(tiles * (split + 1) // splits - tiles * split // splits)
    return counts


def check_scratch() -> None:
    """Partial results of any batch fit what is reserved for all, each in a place of its own."""
    generator = torch.Generator().manual_seed(0)
    splits_seen = set()
    for kv_heads, head_size, group in ((1, 64, 4), (2, 128, 8), (8, 256, 1)):
        scratch = torch.empty(largest_scratch(kv_heads, head_size, torch.device("cpu")))
        for requests, longest, most in ((1, 9000, 1), (3, 3000, 40), (40, 400, 1), (60, 2000, 2)):
            queries = torch.randint(0, most + 1, (requests,), generator=generator)
            queries[-1] = most
            lengths = queries + torch.randint(0, longest, (requests,), generator=generator)
            lengths[-1] += 50 * longest  # split, behind many that are not
            starts = torch.cat([torch.zeros(1), queries.cumsum(0)]).to(torch.int32)
            plan = plan_attention(
                lengths.to(torch.int32), starts, int(starts[-1]), kv_heads * group, kv_heads,
                head_size, max_query_len=most, scratch=scratch,
            )  # fmt: skip
            parts = [
                part
                for request, _, _, splits, part in plan.items.tolist()
                if request >= 0 and splits > 1
            ]
            assert len(set(parts)) == len(parts)
            assert all(0 <= part < plan.partial_out.shape[0] for part in parts)
            splits_seen.update(splits for request, _, _, splits, _ in plan.items.tolist())
    assert max(splits_seen) >= 8


def check_replay() -> None:
    """The tensors of one plan serve other lengths, as in a captured graph."""
    for case, other in (
        (Case(**DECODE), Case(lengths=(3, 64, 0, 300, 1), queries=DECODE["queries"])),
        (Case(**MIXED), Case(lengths=(6, 180, 40, 0, 7), queries=(6, 1, 5, 0, 4))),
    ):
        first, second = make(case), make(other)
        options = {"processors": 1}
        if case.queries == MIXED["queries"]:
            options["max_query_len"] = 9
        plan = planned(first, **options)
        assert_close(attend(first, plan), expected(first))
        assert planned(second, into=plan, **options) is plan
        assert_close(attend(second, plan), expected(second))


def check_scales_far_apart() -> None:
    """Scales from fp16's smallest to its largest that values can have, met in either order."""
    batch = make(Case(lengths=(300, 300), queries=(1, 1), dtype=torch.float32, page_size=16))
    sizes = torch.logspace(-7, 3.9, 304).to(torch.float16)
    for request, order in enumerate((sizes, sizes.flip(0))):
        for page, scales in enumerate(batch.halves(request, 0, "scale")):
            scales.copy_(order[16 * page : 16 * page + 16])
        for zeros in batch.halves(request, 0, "zero"):
            zeros.zero_()
    assert_close(attend(batch), expected(batch))


HIDDEN_HALVES = (0x0000, 0x7E00, 0x7C00, 0xFC00, 0x7BFF)
"""Scales and zeros that no store writes: NaN, infinities, the largest number; and zero."""


def _fill_token(batch: Batch, request: int, token: int, half: int) -> None:
    """Give a token's scales and zeros the bits of a half, and its keys and values NaN bytes."""
    page_size = batch.cache.shape[2]
    page_format = PageFormat(batch.query.shape[2], page_size, Layout.LINEAR)
    t = token % page_size
    for region in batch.cache[batch.block_table[request, token // page_size]].flatten(1):
        region[t * page_format.head_size :][: page_format.head_size] = 0x7F
        value = page_format.value_offset + t * page_format.head_size // 2
        region[value : value + page_format.head_size // 2] = half >> 8
        bits = torch.tensor([half & 0xFF, half >> 8], dtype=torch.uint8)
        for offset in (page_format.scale_offset, page_format.zero_offset):
            region[offset + 2 * t : offset + 2 * t + 2] = bits


def check_hidden_bytes(queries: int, options: dict[str, Any], split: bool) -> None:
    """Whatever the bytes of tokens hold that no row sees, every bit of the output stays."""
    # The scales of such small values vanish next to a hidden one of 65504.
    case = Case(
        lengths=(150, 40), queries=(queries, 1), options=options, num_kv_heads=2,
        value_size=1e-5, dtype=torch.float32,
    )  # fmt: skip
    batch = make(case)
    plan = planned(batch, split=split, processors=4)
    wanted = expected(batch)
    hidden = [(0, token) for token in range(150, 160)] + [(1, token) for token in range(40, 64)]
    if (window := options.get("window")) is not None:
        hidden += [(0, token) for token in range(max(0, 150 - queries - window + 1))]
        hidden += [(1, token) for token in range(max(0, 40 - window))]
    got = []
    for half in HIDDEN_HALVES:
        for request, token in hidden:
            _fill_token(batch, request, token, half)
        got.append(attend(batch, plan))
        assert_close(got[-1], wanted)
    for out, lse in got[1:]:
        assert torch.equal(out, got[0][0])
        assert torch.equal(lse, got[0][1])


def check_token_hidden_from_some_rows(options: dict[str, Any], split: bool) -> None:
    """The last of several new tokens shows in its own row only, whatever its bytes hold."""
    case = Case(lengths=(150,), queries=(3,), options=options)
    batch = make(case)
    plan = planned(batch, split=split, processors=4)
    wanted = [part[:2] for part in expected(batch)]
    for half in HIDDEN_HALVES:
        _fill_token(batch, 0, 149, half)
        out, lse = attend(batch, plan)
        assert_close((out[:2], lse[:2]), (wanted[0], wanted[1]))
        assert out[2].isnan().all() == (half & 0x7C00 == 0x7C00)


def rows_with_nan(split: bool) -> list[int]:
    """Tokens whose output is NaN where token 177 is, of 14 new ones at positions 166 to 179."""
    case = Case(lengths=(180, 54), queries=(14, 14), num_heads=4, num_kv_heads=2)
    batch = make(case)
    batch.halves(0, 1, "scale")[177 // 32][177 % 32] = math.nan
    plan = planned(batch, split=split, processors=1)
    out, lse = attend(batch, plan)
    assert_close((out, lse), expected(batch))
    assert not out[:, :2].isnan().any()
    return out[:, 2:].isnan().all(-1).all(-1).nonzero().flatten().tolist()


def check_padding() -> None:
    batch = make(Case(lengths=(40, 20), queries=(2, 1)))
    out, lse = attend(batch)
    batch.query = torch.cat([batch.query, batch.query[:2]])
    padded, padded_lse = attend(batch)
    assert torch.equal(padded[:3], out)
    assert torch.equal(padded_lse[:3], lse)
    assert (padded[3:] == 7.0).all()
    assert (padded_lse[3:] == 7.0).all()


def check_strides() -> None:
    case = Case(num_heads=4, num_kv_heads=2, lengths=(290, 1, 0, 20), queries=(1, 1, 0, 3))
    batch = make(case)
    out, lse = attend(batch)
    blocks, heads, page_size, slot = batch.cache.shape
    apart = torch.full((blocks, heads * page_size * slot + 4096), 255, dtype=torch.uint8)
    pages = apart[:, : heads * page_size * slot].view(batch.cache.shape)
    pages.copy_(batch.cache)
    tokens = batch.query.shape[0]
    wide = torch.zeros(tokens, 12, 2, 64, dtype=batch.query.dtype)
    wide[:, 8:, 1] = batch.query
    out_wide = torch.zeros(tokens, 4, 3, 64, dtype=batch.query.dtype)
    lse_wide = torch.zeros(4, tokens).t()
    table = torch.zeros(batch.block_table.shape[0], batch.block_table.shape[1] + 5).int()
    table[:, : batch.block_table.shape[1]] = batch.block_table
    paged_attention(
        wide[:, 8:, 1],
        pages,
        table,
        batch.seq_lens,
        batch.query_start_loc,
        out_wide[:, :, 1],
        lse=lse_wide,
        **batch.options,
    )
    assert torch.equal(out_wide[:, :, 1], out)
    assert torch.equal(lse_wide, lse)
    assert not out_wide[:, :, ::2].any()


def check_far_blocks() -> None:
    batch = make(Case(lengths=(100,), page_size=64))
    out, _ = attend(batch)
    _, heads, page_size, slot = batch.cache.shape
    stride = 2**31 + 4096  # mostly never touched, hence never allocated
    memory = torch.empty(2 * stride + heads * page_size * slot, dtype=torch.uint8)
    far = memory.as_strided((3, heads, page_size, slot), (stride, page_size * slot, slot, 1))
    far[2] = batch.cache[int(batch.block_table[0, 0])]
    far[1] = batch.cache[int(batch.block_table[0, 1])]
    batch.cache, batch.block_table = far, torch.tensor([[2, 1]], dtype=torch.int32)
    assert torch.equal(attend(batch)[0], out)


def check_merging_halves() -> None:
    """Partial attention to the first and the other pages, as decode context parallelism does."""
    case = Case(lengths=(160,), queries=(3,), dtype=torch.float32, options={"causal": False})
    batch = make(case)
    whole, whole_lse = expected(batch)
    table = batch.block_table
    parts = []
    for pages, length in ((slice(0, 3), 96), (slice(3, 6), 64)):
        batch.block_table = table[:, pages].contiguous()
        batch.seq_lens = torch.tensor([length], dtype=torch.int32)
        parts.append(attend(batch))
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    out = sum(out * torch.exp(part - lse)[..., None] for out, part in parts)
    assert_close((out, lse), (whole, whole_lse))


def refusal_of_a_foreign_plan() -> str:
    plan = planned(make(Case()))
    try:
        attend(make(Case(queries=(2,))), plan)
    except ValueError as error:
        return str(error)
    return "not refused"
