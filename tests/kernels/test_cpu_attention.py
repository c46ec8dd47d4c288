# SPDX-License-Identifier: Apache-2.0
"""Paged attention on CPUs against the float32 definition, on every path that this CPU has."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from testing.kernels.batches import MIXED, PATHS, Case, assert_close, attend, check, expected, make
from vllm_hybrid_kv.kernels.cpu import paged_attention, plan_attention


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("head_size", [64, 72, 80, 96, 112, 128, 160, 192, 256, 512])
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
@pytest.mark.parametrize("options", [{}, {"window": 60}])
@pytest.mark.parametrize(("length", "queries"), [(65, 2), (257, 2), (258, 4), (520, 16)])
def test_tokens_on_both_sides_of_a_chunks_end_see_up_to_themselves(
    length: int, queries: int, options: dict[str, Any], path: str
) -> None:
    check(Case(lengths=(length,), queries=(queries,), options=options), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("queries", [1, 2, 4])
def test_a_long_sequence_divided_among_threads_attends_as_defined(queries: int, path: str) -> None:
    batch = make(Case(lengths=(9000, 5), queries=(queries, 1), num_kv_heads=1, num_heads=5))
    assert_close(attend(batch, path), expected(batch))
    # Parts whose largest scores are further apart than float32 can express the ratio of.
    batch.query *= 100
    assert_close(attend(batch, path), expected(batch))


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
    for step in (37, 96, 256):
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
