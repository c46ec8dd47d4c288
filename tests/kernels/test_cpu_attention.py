# SPDX-License-Identifier: Apache-2.0
"""Paged attention on CPUs against the float32 definition, on every path that this CPU has."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_hybrid_kv.kernels import k8v4, reference
from vllm_hybrid_kv.kernels.cpu import attention, isa, paged_attention, plan_attention
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


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("head_size", [64, 72, 80, 96, 112, 128, 160, 192, 256])
def test_every_head_size_attends_as_defined(head_size: int, path: str) -> None:
    check(Case(head_size=head_size, **MIXED), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 71])
def test_every_ratio_of_query_to_kv_heads_attends_as_defined(group: int, path: str) -> None:
    check(Case(num_heads=2 * group, head_size=64, **MIXED), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("page_size", [16, 32, 128, 384, 2768])
def test_every_page_size_attends_as_defined(page_size: int, path: str) -> None:
    check(Case(page_size=page_size, lengths=(2900, 200), queries=(3, 130)), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_size", [72, 128])
def test_every_query_dtype_attends_as_defined(
    head_size: int, dtype: torch.dtype, path: str
) -> None:
    check(Case(head_size=head_size, dtype=dtype, **MIXED), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 50},
        {"window": 1000},
        {"causal": False},
        {"causal": False, "window": 30},
        {"soft_cap": 2.0},
        {"sinks": torch.linspace(-3, 5, 8)},
        {"sinks": torch.full((8,), -math.inf)},
        {"window": 40, "soft_cap": 30.0, "sinks": torch.linspace(-3, 5, 8).bfloat16()},
    ],
    ids=lambda options: "-".join(options),
)
def test_masks_caps_and_sinks_act_as_defined(options: dict[str, Any], path: str) -> None:
    check(Case(options=options, **MIXED), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("window", [3, 20, 40, 300])
@pytest.mark.parametrize("queries", [1, 70])
def test_a_window_that_starts_late_in_a_chunk_attends_as_defined(
    queries: int, window: int, path: str
) -> None:
    # The first chunk then has few tiles, an odd number among them, and the next one more.
    check(Case(lengths=(305, 570), queries=(queries, 1), options={"window": window}), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("queries", [1, 2, 3, 4, 5, 6, 7, 8])
def test_several_tokens_of_one_request_see_up_to_themselves(queries: int, path: str) -> None:
    check(Case(lengths=(900, 33), queries=(queries, queries), num_heads=6), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("queries", [1, 2, 4])
def test_a_long_sequence_divided_among_threads_attends_as_defined(queries: int, path: str) -> None:
    batch = make(Case(lengths=(9000, 5), queries=(queries, 1), num_kv_heads=1, num_heads=5))
    assert_close(attend(batch, path), expected(batch))
    # Parts whose largest scores are further apart than float32 can express the ratio of.
    batch.query *= 100
    assert_close(attend(batch, path), expected(batch))


@pytest.mark.parametrize("path", PATHS)
def test_scores_far_below_zero_are_scores(path: str) -> None:
    batch = make(Case(lengths=(200,), queries=(3,)))
    batch.cache.flatten(2)[..., : 128 * 128] = 0x50  # every key is 8
    batch.query[:] = -30.0
    assert_close(attend(batch, path), expected(batch))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("lengths", [(40,), (305, 4000)])
@pytest.mark.parametrize("queries", [1, 12, 40])
def test_leftovers_in_the_kernels_own_memory_never_show(
    queries: int, lengths: tuple[int, ...], path: str
) -> None:
    batch = make(Case(lengths=lengths, queries=(queries, *[1] * (len(lengths) - 1))))
    out, lse = attend(batch, path)
    attention._workspace.scratch.fill(0xFF)  # NaN as bf16 and as float32
    attention._workspace.partials.fill(math.nan)
    attention._workspace.counters.fill(-1)
    again, lse_again = attend(batch, path)
    assert torch.equal(again, out)
    assert torch.equal(lse_again, lse)


@pytest.mark.parametrize("path", PATHS)
def test_a_prompt_attends_over_cached_context_as_defined(path: str) -> None:
    check(Case(lengths=(1500, 260), queries=(400, 260), num_heads=4), path)


@pytest.mark.parametrize("path", PATHS)
def test_pages_apart_and_tensors_with_strides_give_the_same_bits(path: str) -> None:
    batch = make(Case(**MIXED))
    out, lse = attend(batch, path)
    blocks, heads, page_size, slot = batch.cache.shape
    apart = torch.full((blocks, heads * page_size * slot + 4096), 255, dtype=torch.uint8)
    pages = apart[:, : heads * page_size * slot].view(batch.cache.shape)
    pages.copy_(batch.cache)
    wide = torch.zeros(batch.query.shape[0], 12, 2, 128, dtype=batch.query.dtype)
    wide[:, 4:, 1] = batch.query
    out_wide = torch.zeros(batch.query.shape[0], 8, 3, 128, dtype=batch.query.dtype)
    table = torch.zeros(batch.block_table.shape[0], batch.block_table.shape[1] + 5).int()
    table[:, : batch.block_table.shape[1]] = batch.block_table
    lse_wide = torch.zeros(8, batch.query.shape[0]).t()
    paged_attention(
        wide[:, 4:, 1],
        pages,
        table,
        batch.seq_lens,
        batch.query_start_loc,
        out_wide[:, :, 1],
        lse=lse_wide,
        isa=path,
        **batch.options,
    )
    assert torch.equal(out_wide[:, :, 1], out)
    assert torch.equal(lse_wide, lse)
    assert not out_wide[:, :, 0].any()
    assert not out_wide[:, :, 2].any()


@pytest.mark.parametrize("path", PATHS)
def test_blocks_beyond_two_gigabytes_are_found(path: str) -> None:
    batch = make(Case(lengths=(100,), page_size=64))
    out, _ = attend(batch, path)
    _, heads, page_size, slot = batch.cache.shape
    stride = 2**31 + 4096  # mostly never touched, hence never allocated
    memory = torch.empty(2 * stride + heads * page_size * slot, dtype=torch.uint8)
    far = memory.as_strided((3, heads, page_size, slot), (stride, page_size * slot, slot, 1))
    far[2] = batch.cache[int(batch.block_table[0, 0])]
    far[1] = batch.cache[int(batch.block_table[0, 1])]
    moved = replace(batch, cache=far, block_table=torch.tensor([[2, 1]], dtype=torch.int32))
    assert torch.equal(attend(moved, path)[0], out)


@pytest.mark.parametrize("path", PATHS)
def test_memory_that_no_row_sees_never_shows(path: str) -> None:
    batch = make(Case(options={"window": 100}, lengths=(300, 129), queries=(1, 30)))
    out, lse = attend(batch, path)
    used = {int(b) for b in batch.block_table[0, :3]} | {int(b) for b in batch.block_table[1, :2]}
    for block in set(range(batch.cache.shape[0])) - used:
        batch.cache[block] = 0x7F  # NaN keys, and 0x7F7F is a NaN as fp16
    page_format = batch.page_format
    # Behind the last token, in front of the window, and in every head.
    for request, tokens in ((0, (*range(300, 384), *range(200))), (1, (129, 200, 255))):
        for token in tokens:
            for head in range(2):
                block = int(batch.block_table[request, token // 128])
                region = batch.cache[block, head].view(-1)
                for dim in range(128):
                    region[page_format.key_byte(token % 128, dim)] = 0x7F
                batch.half(request, token, head, page_format.scale_offset)[:] = 0x7F
                batch.half(request, token, head, page_format.zero_offset)[:] = 0x7F
    again, lse_again = attend(batch, path)
    assert torch.equal(again, out)
    assert torch.equal(lse_again, lse)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("queries", [(20, 1, 1), (200, 8, 1)])
def test_a_nan_token_shows_in_later_rows_of_its_own_request_and_head(
    queries: tuple[int, ...], path: str
) -> None:
    batch = make(Case(lengths=(250, 300, 40), queries=queries))
    clean, clean_lse = attend(batch, path)
    batch.set_scale(0, 240, 1, math.nan)
    batch.set_scale(2, 39, 0, math.nan)
    out, lse = attend(batch, path)
    assert_close((out, lse), expected(batch))
    nan = out.isnan().any(-1)
    wanted = torch.zeros_like(nan)
    wanted[240 - (250 - queries[0]) : queries[0], 4:] = True
    wanted[-1, :4] = True
    assert torch.equal(nan, wanted)
    assert torch.equal(out[~nan], clean[~nan])
    assert torch.equal(lse, clean_lse)


@pytest.mark.parametrize("path", PATHS)
def test_a_nan_query_spoils_its_own_row_only(path: str) -> None:
    batch = make(Case(lengths=(250, 300), queries=(20, 1)))
    clean, _ = attend(batch, path)
    batch.query[7, 3, 5] = math.nan
    out, _ = attend(batch, path)
    spoilt = torch.zeros(out.shape[:2], dtype=torch.bool)
    spoilt[7, 3] = True
    assert out[7, 3].isnan().all()
    assert torch.equal(out[~spoilt], clean[~spoilt])


@pytest.mark.parametrize("path", PATHS)
def test_the_largest_keys_scales_and_queries_stay_finite_and_right(path: str) -> None:
    batch = make(Case(lengths=(200,), queries=(3,)))
    batch.query *= 100
    page_format = batch.page_format
    for token, scale in ((5, 8733.0), (60, 6e-8), (150, 65504.0)):
        for dim in range(128):
            block = int(batch.block_table[0, token // 128])
            region = batch.cache[block, 0].view(-1)
            region[page_format.key_byte(token % 128, dim)] = 0x7E | (0x80 * (dim % 2))
        batch.set_scale(0, token, 0, scale)
    assert_close(attend(batch, path), expected(batch))


@pytest.mark.parametrize("path", PATHS)
def test_small_keys_count(path: str) -> None:
    # Denormal e4m3 keys only: each is below 2^-6.
    batch = make(Case(lengths=(200,), queries=(3,)))
    codes = torch.randint(0, 8, (*batch.cache.shape[:2], 128 * 128), dtype=torch.uint8)
    batch.cache.flatten(2)[..., : 128 * 128] = codes
    batch.query *= 30
    assert_close(attend(batch, path), expected(batch))


@pytest.mark.parametrize("path", PATHS)
def test_rows_behind_the_last_request_are_left_alone(path: str) -> None:
    batch = make(Case(lengths=(40, 20), queries=(2, 1)))
    padded = replace(batch, query=torch.cat([batch.query, batch.query[:2]]))
    out, lse = attend(padded, path)
    assert (out[3:] == 7.0).all()
    assert (lse[3:] == 7.0).all()
    assert torch.equal(out[:3], attend(batch, path)[0])


@pytest.mark.parametrize("path", PATHS)
def test_a_query_of_a_request_without_tokens_gets_zero(path: str) -> None:
    batch = make(Case(lengths=(0, 20), queries=(2, 1)))
    out, lse = attend(batch, path)
    assert not out[:2].any()
    assert (lse[:2] == -math.inf).all()
    sinks = torch.linspace(-1, 1, 8)
    out, lse = attend(replace(batch, options={**batch.options, "sinks": sinks}), path)
    assert not out[:2].any()
    torch.testing.assert_close(lse[:2], sinks.expand(2, 8))


@pytest.mark.parametrize("path", PATHS)
def test_a_request_gives_the_same_bits_alone_and_in_a_batch(path: str) -> None:
    case = Case(lengths=(700, 3000, 90, 1, 400), queries=(1, 4, 90, 1, 300))
    batch = make(case)
    out, lse = attend(batch, path)
    start = 0
    for request, queries in enumerate(case.queries):
        alone = replace(
            batch,
            query=batch.query[start : start + queries],
            block_table=batch.block_table[request : request + 1],
            seq_lens=batch.seq_lens[request : request + 1],
            query_start_loc=torch.tensor([0, queries], dtype=torch.int32),
        )
        got, got_lse = attend(alone, path)
        assert torch.equal(got, out[start : start + queries])
        assert torch.equal(got_lse, lse[start : start + queries])
        start += queries


@pytest.mark.parametrize("path", PATHS)
def test_a_plan_made_once_gives_what_a_call_without_one_gives(path: str) -> None:
    batch = make(Case(options={"window": 200}, **MIXED))
    plan = plan_attention(
        batch.seq_lens, batch.query_start_loc, 8, 2, 128, 128, causal=True, window=200
    )
    without = attend(batch, path)
    for _ in range(2):
        out, lse = attend(batch, path, plan=plan)
        assert torch.equal(out, without[0])
        assert torch.equal(lse, without[1])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("window", [None, 150])
def test_a_prompt_gives_the_same_bits_however_its_prefill_is_divided(
    window: int | None, path: str
) -> None:
    batch = make(Case(lengths=(700,), queries=(700,), options={"window": window}))
    out, lse = attend(batch, path)
    for step in (96, 256):
        for start in range(0, 700, step):
            stop = min(700, start + step)
            part = replace(
                batch,
                query=batch.query[start:stop],
                seq_lens=torch.tensor([stop], dtype=torch.int32),
                query_start_loc=torch.tensor([0, stop - start], dtype=torch.int32),
            )
            got, got_lse = attend(part, path)
            assert torch.equal(got, out[start:stop])
            assert torch.equal(got_lse, lse[start:stop])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_kv_heads = draw(st.integers(1, 3))
    num_heads = num_kv_heads * draw(st.integers(1, 9))
    requests = draw(st.lists(st.tuples(st.integers(0, 700), st.integers(0, 90)), max_size=4))
    options: dict[str, Any] = {"causal": draw(st.booleans())}
    options["window"] = draw(st.none() | st.integers(1, 300))
    options["soft_cap"] = draw(st.sampled_from([0.0, 5.0]))
    if draw(st.booleans()):
        options["sinks"] = torch.linspace(-2, 2, num_heads)
    requests = [*requests, (draw(st.integers(1, 700)), 1)]
    return Case(
        draw(st.sampled_from(range(64, 257, 8))),
        num_heads,
        num_kv_heads,
        16 * draw(st.integers(1, 20)),
        tuple(length for length, _ in requests),
        tuple(min(length, queries) for length, queries in requests),
        draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32])),
        draw(st.integers(0, 1000)),
        options,
    )


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_any_batch_attends_as_defined(path: str, case: Case) -> None:
    check(case, path)
