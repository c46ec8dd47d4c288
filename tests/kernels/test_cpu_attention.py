# SPDX-License-Identifier: Apache-2.0
"""Paged attention equals the integer reference with every instruction set of this CPU."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from testing.kernels.batches import (
    MIXED,
    PATHS,
    Batch,
    Case,
    assert_close,
    assert_equal,
    attend,
    check,
    expected,
    make,
)
from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.cpu import isa, paged_attention

pytestmark = pytest.mark.parametrize("path", PATHS)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]

OPTIONS: list[dict[str, Any]] = [
    {"window": 1},
    {"window": 50},
    {"window": 1000},
    {"causal": False},
    {"causal": False, "window": 30},
    {"soft_cap": 2.0},
    {"sinks": torch.linspace(-3, 5, 8)},
    {"sinks": torch.full((8,), -math.inf)},
    {"window": 40, "soft_cap": 30.0, "sinks": torch.linspace(-3, 5, 8).bfloat16()},
    {"scale": -0.1},
    {"scale": -0.1, "soft_cap": 2.0, "window": 60},
    {"scale": 0.0},
]

CASES = [
    *(Case(head_size=n, **MIXED) for n in k8v4.HEAD_SIZES),
    *(Case(num_heads=2 * n, head_size=64, **MIXED) for n in (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 71)),
    *(Case(page_size=n, lengths=(2900, 200), queries=(3, 130)) for n in (16, 32, 128, 384, 2768)),
    *(Case(head_size=size, dtype=dtype, **MIXED) for size in (72, 128) for dtype in DTYPES),
    *(Case(options=options, **MIXED) for options in OPTIONS),
    # The window starts late in a chunk, so the first chunk has few tiles (sometimes an odd number).
    *(
        Case(lengths=(305, 570), queries=(queries, 1), options={"window": window})
        for queries in (1, 70)
        for window in (3, 20, 40, 300)
    ),
    # A request has several new tokens. Each must see only the tokens up to itself.
    *(Case(lengths=(900, 33), queries=(n, n), num_heads=6) for n in range(1, 9)),
    # Some new tokens lie before the end of a chunk and some after it.
    *(
        Case(lengths=(length,), queries=(queries,), options=options)
        for length, queries in ((65, 2), (257, 2), (258, 4), (520, 16))
        for options in ({}, {"window": 60})
    ),
    # The first prompt has 1100 cached tokens, the second has none.
    Case(lengths=(1500, 260), queries=(400, 260), num_heads=4),
]


def request_of(batch: Batch, request: int, first: int, last: int, length: int) -> Batch:
    """Cut one request out of a batch, with the rows `first` to `last - 1` of the query."""
    return replace(
        batch,
        query=batch.query[first:last],
        block_table=batch.block_table[request : request + 1],
        seq_lens=torch.tensor([length], dtype=torch.int32),
        query_start_loc=torch.tensor([0, last - first], dtype=torch.int32),
    )


@pytest.mark.parametrize("case", CASES)
def test_attention_equals_the_reference(case: Case, path: str) -> None:
    check(case, path)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_kv_heads = draw(st.integers(1, 3))
    num_heads = num_kv_heads * draw(st.integers(1, 9))
    requests = draw(st.lists(st.tuples(st.integers(0, 700), st.integers(0, 90)), max_size=4))
    options: dict[str, Any] = {"causal": draw(st.booleans())}
    options["window"] = draw(st.none() | st.integers(1, 300))
    options["soft_cap"] = draw(st.sampled_from([0.0, 5.0]))
    options["scale"] = draw(st.sampled_from([0.1, -0.07]))
    if draw(st.booleans()):
        options["sinks"] = torch.linspace(-2, 2, num_heads)
    requests = [*requests, (draw(st.integers(1, 700)), 1)]
    return Case(
        draw(st.sampled_from(k8v4.HEAD_SIZES)),
        num_heads,
        num_kv_heads,
        16 * draw(st.integers(1, 20)),
        tuple(length for length, _ in requests),
        tuple(min(length, queries) for length, queries in requests),
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(0, 1000)),
        options,
    )


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_attention_of_random_batches_equals_the_reference(path: str, case: Case) -> None:
    check(case, path)


@pytest.mark.parametrize("queries", [1, 2, 4])
def test_a_long_sequence_divided_among_threads_equals_the_reference(
    queries: int, path: str
) -> None:
    batch = make(Case(lengths=(9000, 5), queries=(queries, 1), num_kv_heads=1, num_heads=5))
    assert_close(attend(batch, path), expected(batch))
    # With scores this large, weights in two threads differ by more than float32 can express.
    batch.query *= 100
    assert_close(attend(batch, path), expected(batch))


def test_strides_do_not_change_the_bits(path: str) -> None:
    batch = make(Case(**MIXED))
    out, lse = attend(batch, path)
    blocks, heads, page_size, slot = batch.cache.shape
    padded = torch.full((blocks, heads * page_size * slot + 4096), 255, dtype=torch.uint8)
    pages = padded[:, : heads * page_size * slot].view(batch.cache.shape)
    pages.copy_(batch.cache)
    query = torch.zeros(batch.query.shape[0], 12, 2, 128, dtype=batch.query.dtype)
    query[:, 4:, 1] = batch.query
    out_wide = torch.zeros(batch.query.shape[0], 8, 3, 128, dtype=batch.query.dtype)
    table = torch.zeros(batch.block_table.shape[0], batch.block_table.shape[1] + 5).int()
    table[:, : batch.block_table.shape[1]] = batch.block_table
    lse_wide = torch.zeros(8, batch.query.shape[0]).t()
    wide = replace(batch, query=query[:, 4:, 1], cache=pages, block_table=table)
    paged_attention(*wide.inputs, out_wide[:, :, 1], lse=lse_wide, isa=path, **batch.options)
    assert_equal((out_wide[:, :, 1], lse_wide), (out, lse))
    assert not out_wide[:, :, ::2].any()


def test_blocks_more_than_two_gigabytes_into_the_cache_are_read(path: str) -> None:
    batch = make(Case(lengths=(100,), page_size=64))
    _, heads, page_size, slot = batch.cache.shape
    stride = 2**31 + 4096  # the gaps are never touched, so they take no memory
    memory = torch.empty(2 * stride + heads * page_size * slot, dtype=torch.uint8)
    far = memory.as_strided((3, heads, page_size, slot), (stride, page_size * slot, slot, 1))
    far[2] = batch.cache[int(batch.block_table[0, 0])]
    far[1] = batch.cache[int(batch.block_table[0, 1])]
    moved = replace(batch, cache=far, block_table=torch.tensor([[2, 1]], dtype=torch.int32))
    assert_equal(attend(moved, path), attend(batch, path))


def test_rows_after_the_last_request_stay_unchanged(path: str) -> None:
    batch = make(Case(lengths=(40, 20), queries=(2, 1)))
    padded = replace(batch, query=torch.cat([batch.query, batch.query[:2]]))
    out, lse = attend(padded, path)
    assert (out[3:] == 7.0).all()
    assert (lse[3:] == 7.0).all()
    assert_equal((out[:3], lse[:3]), attend(batch, path))


def test_a_query_of_a_request_without_tokens_gets_zero(path: str) -> None:
    batch = make(Case(lengths=(0, 20), queries=(2, 1)))
    out, lse = attend(batch, path)
    assert not out[:2].any()
    assert (lse[:2] == -math.inf).all()
    sinks = torch.linspace(-1, 1, 8)
    out, lse = attend(replace(batch, options={**batch.options, "sinks": sinks}), path)
    assert not out[:2].any()
    torch.testing.assert_close(lse[:2], sinks.expand(2, 8))


def test_a_request_gets_the_same_bits_alone_and_in_a_batch(path: str) -> None:
    case = Case(lengths=(700, 3000, 90, 1, 400), queries=(1, 4, 90, 1, 300))
    batch = make(case)
    out, lse = attend(batch, path)
    rows = itertools.pairwise(batch.query_start_loc.tolist())
    for request, (first, last) in enumerate(rows):
        alone = request_of(batch, request, first, last, case.lengths[request])
        assert_equal(attend(alone, path), (out[first:last], lse[first:last]))


@pytest.mark.parametrize("window", [None, 150])
def test_the_division_of_a_prefill_does_not_change_its_bits(window: int | None, path: str) -> None:
    batch = make(Case(lengths=(700,), queries=(700,), options={"window": window}))
    out, lse = attend(batch, path)
    for step in (37, 96, 256):
        for first in range(0, 700, step):
            last = min(700, first + step)
            part = request_of(batch, 0, first, last, last)
            assert_equal(attend(part, path), (out[first:last], lse[first:last]))


EQUAL_BITS = [
    *(Case(head_size=n, **MIXED) for n in (64, 72, 96, 128, 512)),
    # Decodes over several chunks, with 1 to 9 query heads that share a KV head.
    *(Case(lengths=(900,), num_heads=n, num_kv_heads=1) for n in range(1, 10)),
    *(Case(options=options, **MIXED) for options in OPTIONS),
    Case(lengths=(1500, 260), queries=(400, 260), dtype=torch.bfloat16),
]


@pytest.mark.parametrize("case", EQUAL_BITS)
def test_portable_and_avx512_vnni_give_equal_bits(case: Case, path: str) -> None:
    if path == isa.AMX:
        pytest.skip("its weights have another number of bits")
    batch = make(case)
    assert_equal(attend(batch, path), attend(batch, isa.PORTABLE))
