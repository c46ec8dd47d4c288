# SPDX-License-Identifier: Apache-2.0
"""NaN, extreme numbers and uninitialised memory in attention on CPUs."""

from __future__ import annotations

import math

import pytest
import torch

from testing.kernels.batches import (
    PATHS,
    Batch,
    Case,
    assert_close,
    assert_equal,
    attend,
    expected,
    make,
)
from vllm_hybrid_kv.kernels.cpu import attention

pytestmark = pytest.mark.parametrize("path", PATHS)

HIDDEN_HALVES = (0x7F7F, 0x7C00, 0xFC00 - 0x10000, 0x7BFF)
"""Scales and zeros that no store writes: NaN, both infinities, the largest number."""


@pytest.mark.parametrize("lengths", [(40,), (305, 4000)])
@pytest.mark.parametrize("queries", [1, 12, 40])
def test_leftovers_in_the_workspace_have_no_effect(
    queries: int, lengths: tuple[int, ...], path: str
) -> None:
    batch = make(Case(lengths=lengths, queries=(queries, *[1] * (len(lengths) - 1))))
    clean = attend(batch, path)
    attention._workspace.scratch.fill(0xFF)  # NaN as bf16 and as float32
    attention._workspace.partials.fill_(math.nan)
    assert_equal(attend(batch, path), clean)


def fill_token(batch: Batch, request: int, token: int, half: int) -> None:
    """Set a token's scales and zeros to the bits of a half, and its keys to NaN."""
    block, t = batch.place(request, token)
    batch.set_keys(block, t, [0x7F] * batch.page_format.head_size)
    batch.halves.view(torch.int16)[block, :, :, t] = half


@pytest.mark.parametrize("head_size", [72, 128])
def test_memory_that_no_row_sees_has_no_effect(head_size: int, path: str) -> None:
    case = Case(head_size, options={"window": 100}, lengths=(300, 129), queries=(1, 30))
    batch = make(case)
    clean = attend(batch, path)
    used = {int(b) for b in batch.block_table[0, :3]} | {int(b) for b in batch.block_table[1, :2]}
    for half in HIDDEN_HALVES:
        for block in set(range(batch.cache.shape[0])) - used:
            batch.cache[block].view(torch.int16).fill_(half)
        # After the last token, before the window, and in every head.
        for request, tokens in ((0, (*range(300, 384), *range(200))), (1, (129, 200, 255))):
            for token in tokens:
                fill_token(batch, request, token, half)
        again = attend(batch, path)
        assert_equal(again, clean)
        assert_close(again, expected(batch))


@pytest.mark.parametrize("queries", [3, 12, 70])
def test_a_token_has_no_effect_on_rows_that_do_not_see_it(queries: int, path: str) -> None:
    batch = make(Case(lengths=(300,), queries=(queries,)))
    out, lse = attend(batch, path)
    for half in HIDDEN_HALVES:
        fill_token(batch, 0, 299, half)
        again, lse_again = attend(batch, path)
        assert_equal((again[:-1], lse_again[:-1]), (out[:-1], lse[:-1]))


@pytest.mark.parametrize("queries", [(20, 1, 1), (200, 8, 1)])
def test_a_nan_token_shows_in_the_later_rows_of_its_request_and_head_only(
    queries: tuple[int, ...], path: str
) -> None:
    batch = make(Case(lengths=(250, 300, 40), queries=queries))
    clean, clean_lse = attend(batch, path)
    for request, token, head in ((0, 240, 1), (2, 39, 0)):
        block, t = batch.place(request, token)
        batch.halves[block, head, 0, t] = math.nan
    out, lse = attend(batch, path)
    assert_close((out, lse), expected(batch))
    nan = out.isnan().any(-1)
    wanted = torch.zeros_like(nan)
    wanted[240 - (250 - queries[0]) : queries[0], 4:] = True
    wanted[-1, :4] = True
    assert torch.equal(nan, wanted)
    assert_equal((out[~nan], lse), (clean[~nan], clean_lse))


def test_a_nan_query_affects_its_own_row_only(path: str) -> None:
    batch = make(Case(lengths=(250, 300), queries=(20, 1)))
    clean, _ = attend(batch, path)
    batch.query[7, 3, 5] = math.nan
    out, _ = attend(batch, path)
    affected = torch.zeros(out.shape[:2], dtype=torch.bool)
    affected[7, 3] = True
    assert out[7, 3].isnan().all()
    assert torch.equal(out[~affected], clean[~affected])


@pytest.mark.parametrize(
    ("factor", "codes"),
    [(-30.0, (0x50, 0x51)), (30.0, (0, 8))],
    ids=["scores far below zero", "denormal keys"],
)
def test_small_weights_and_keys_are_not_lost(
    factor: float, codes: tuple[int, int], path: str
) -> None:
    batch = make(Case(lengths=(200,), queries=(3,)))
    keys = batch.cache.flatten(2)[..., : batch.page_format.value_offset]
    keys.random_(*codes, generator=torch.Generator().manual_seed(0))
    batch.query[:] = batch.query.abs() * factor
    assert_close(attend(batch, path), expected(batch))


def test_the_largest_keys_scales_and_queries_stay_finite_and_exact(path: str) -> None:
    batch = make(Case(lengths=(200,), queries=(3,)))
    batch.query *= 100
    for token, scale in ((5, 8733.0), (60, 6e-8), (150, 65504.0)):
        block, t = batch.place(0, token)
        batch.set_keys(block, t, [0x7E, 0xFE] * 64)
        batch.halves[block, 0, 0, t] = scale
    assert_close(attend(batch, path), expected(batch))


@pytest.mark.parametrize("queries", [1, 3, 40])
def test_many_small_weights_after_one_large_one_are_not_lost(queries: int, path: str) -> None:
    # Each of 6000 tokens weighs 1/20,000 of the first one: together 0.3 of it.
    batch = make(Case(lengths=(6000,), queries=(queries,)))
    page_format = batch.page_format
    regions = batch.cache.flatten(2)
    regions[..., : page_format.value_offset] = 0
    regions[..., page_format.value_offset : page_format.scale_offset] = 0xFF
    batch.halves[:, :, 0], batch.halves[:, :, 1] = 1 / 15, 0.0
    batch.query[:] = 1.0
    block, t = batch.place(0, 0)
    batch.set_keys(block, t, [0x6E])  # 112, hence a score of 9.9
    for byte, shift in (page_format.value_byte(t, dim) for dim in range(128)):
        regions[block, :, byte] &= 0xF0 >> shift
    wanted = expected(batch)
    torch.testing.assert_close(wanted[0].mean(), torch.tensor(0.23), atol=0.01, rtol=0)
    assert_close(attend(batch, path), wanted)
