# SPDX-License-Identifier: Apache-2.0
"""How attention on CPUs treats NaN, extreme numbers and uninitialised memory."""

from __future__ import annotations

import math

import pytest
import torch

from testing.kernels.batches import (
    LSE_TOLERANCE,
    PATHS,
    Batch,
    Case,
    assert_close,
    assert_equal,
    attend,
    expected,
    make,
)
from vllm_hybrid_kv.kernels import reference
from vllm_hybrid_kv.kernels.cpu import attention

pytestmark = pytest.mark.parametrize("path", PATHS)

HIDDEN_SCALES = (0x7E00, 0x7C00, 0xFC00 - 0x10000, 0x7BFF)
"""Bits of fp16 scales for tokens that no query attends to: NaN, both infinities, the maximum."""

PLANES = [[0], [1], [0, 1]]
"""Which scales to overwrite: those of keys, those of values, or both."""


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


def fill_token(batch: Batch, request: int, token: int, bits: int, planes: list[int]) -> None:
    """Set a token's key codes to 127, and its scales in these planes to the fp16 number `bits`."""
    block, t = batch.place(request, token)
    batch.set_keys(block, t, [127] * batch.page_format.head_size)
    batch.scales.view(torch.int16)[block, :, planes, t] = bits


@pytest.mark.parametrize("head_size", [72, 128])
@pytest.mark.parametrize("planes", PLANES)
def test_memory_that_no_row_sees_has_no_effect(
    planes: list[int], head_size: int, path: str
) -> None:
    case = Case(head_size, options={"window": 100}, lengths=(300, 129), queries=(1, 30))
    batch = make(case)
    clean = attend(batch, path)
    used = {int(b) for b in batch.block_table[0, :3]} | {int(b) for b in batch.block_table[1, :2]}
    for bits in HIDDEN_SCALES:
        for block in set(range(batch.cache.shape[0])) - used:
            batch.cache[block].view(torch.int16).fill_(bits)
        # Fill slots after the last token and tokens before the window, in every head.
        for request, tokens in ((0, (*range(300, 384), *range(200))), (1, (129, 200, 255))):
            for token in tokens:
                fill_token(batch, request, token, bits, planes)
        again = attend(batch, path)
        assert_equal(again, clean)
        assert_close(again, expected(batch))


@pytest.mark.parametrize("queries", [3, 12, 70])
@pytest.mark.parametrize("planes", PLANES)
def test_a_token_has_no_effect_on_rows_that_do_not_see_it(
    planes: list[int], queries: int, path: str
) -> None:
    batch = make(Case(lengths=(300,), queries=(queries,)))
    out, lse = attend(batch, path)
    for bits in HIDDEN_SCALES:
        fill_token(batch, 0, 299, bits, planes)
        again, lse_again = attend(batch, path)
        assert_equal((again[:-1], lse_again[:-1]), (out[:-1], lse[:-1]))


@pytest.mark.parametrize("queries", [(20, 1, 1), (200, 8, 1)])
@pytest.mark.parametrize("planes", PLANES)
def test_a_nan_scale_shows_in_the_later_rows_of_its_request_and_head_only(
    planes: list[int], queries: tuple[int, ...], path: str
) -> None:
    batch = make(Case(lengths=(250, 300, 40), queries=queries))
    clean, clean_lse = attend(batch, path)
    for request, token, head in ((0, 240, 1), (2, 39, 0)):
        block, t = batch.place(request, token)
        batch.scales[block, head, planes, t] = math.nan
    out, lse = attend(batch, path)
    assert_close((out, lse), expected(batch))
    nan = out.isnan().any(-1)
    wanted = torch.zeros_like(nan)
    wanted[240 - (250 - queries[0]) : queries[0], 4:] = True
    wanted[-1, :4] = True
    assert torch.equal(nan, wanted)
    assert_equal((out[~nan], lse[~nan]), (clean[~nan], clean_lse[~nan]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_nan_or_infinite_query_makes_its_own_row_nan_and_no_other(
    number: float, dtype: torch.dtype, path: str
) -> None:
    batch = make(Case(head_size=72, lengths=(250, 300), queries=(20, 1), dtype=dtype))
    clean, _ = attend(batch, path)
    batch.query[7, 3, 5] = number
    out, _ = attend(batch, path)
    affected = torch.zeros(out.shape[:2], dtype=torch.bool)
    affected[7, 3] = True
    assert out[7, 3].isnan().all()
    assert torch.equal(out[~affected], clean[~affected])


@pytest.mark.parametrize("head_size", [64, 72, 96, 128, 256, 512])
@pytest.mark.parametrize("queries", [1, 3, 21])
def test_the_largest_codes_of_queries_and_keys_do_not_saturate(
    queries: int, head_size: int, path: str
) -> None:
    length = 40
    batch = make(Case(head_size, lengths=(length,), queries=(queries,)))
    signs = torch.randint(0, 2, (head_size,), generator=torch.Generator().manual_seed(1)) * 2 - 1
    batch.query[:] = reference.rotate(signs.float())
    batch.scales[:, :, 0] = 2.0**-10
    for token in range(length):
        block, t = batch.place(0, token)
        # All products with the query are positive for token 0 and negative for token 1. For later
        # tokens, the first `token` products are negative.
        own = signs.clone()
        own[:token] *= -1
        codes = 127 * (-signs if token == 1 else own)
        batch.set_keys(block, t, codes.tolist())
    got, wanted = attend(batch, path), expected(batch)
    assert_close(got, wanted)
    # Attend to token 0 alone. Its score is known, because only the query's rotation is rounded.
    batch.seq_lens[:], batch.query_start_loc[1] = 1, 1
    _, lse = attend(batch, path)
    score = head_size * 127 * 2.0**-10 * head_size**-0.5
    torch.testing.assert_close(lse[:1], torch.full((1, 8), score), atol=0.0, rtol=1e-6)


def test_small_weights_are_not_lost(path: str) -> None:
    # All scores are far below zero.
    batch = make(Case(lengths=(200,), queries=(3,)))
    batch.query[:] = reference.rotate(torch.ones(128)) * 30
    for token in range(200):
        block, t = batch.place(0, token)
        batch.set_keys(block, t, [-100 - token % 7] * 128)
    assert_close(attend(batch, path), expected(batch))
    assert (expected(batch)[1] < -100).all()


@pytest.mark.parametrize("bits", [0, 1, 0x3FF])
@pytest.mark.parametrize("planes", PLANES)
def test_zero_and_subnormal_scales_equal_the_reference(
    planes: list[int], bits: int, path: str
) -> None:
    batch = make(Case(lengths=(200,), queries=(3,)))
    batch.query[:] *= 1e4
    batch.scales.view(torch.int16)[:, :, planes] = bits
    assert_close(attend(batch, path), expected(batch))


def test_the_largest_keys_scales_and_queries_stay_finite_and_exact(path: str) -> None:
    batch = make(Case(lengths=(200,), queries=(3,)))
    batch.query *= 100
    for token, scale in ((5, 8733.0), (60, 6e-8), (150, 65504.0)):
        block, t = batch.place(0, token)
        batch.set_keys(block, t, [127, -127] * 64)
        batch.scales[block, 0, 0, t] = scale
    assert_close(attend(batch, path), expected(batch))


@pytest.mark.parametrize("queries", [1, 3, 40])
def test_many_small_weights_after_one_large_one_are_not_lost(queries: int, path: str) -> None:
    # Every later token weighs 1/20,000 of the first one, so all 6000 together weigh 0.3 of it.
    batch = make(Case(lengths=(6000,), queries=(queries,)))
    page_format = batch.page_format
    regions = batch.cache.flatten(2)
    regions[..., : page_format.value_offset] = 128
    regions[..., page_format.value_offset : page_format.key_scale_offset] = 0xFF
    batch.scales[:, :, 0], batch.scales[:, :, 1] = 0.624, 1 / 7.5
    # After the rotation, all even dims are the square root of 2 and all odd dims are 0.
    batch.query[:] = 1.0
    block, t = batch.place(0, 0)
    batch.set_keys(block, t, [127])  # a score of 9.9
    batch.set_values(block, t, [0] * 128)  # values of -1; all other tokens have values of 1
    wanted = expected(batch)
    mean = reference.rotate(wanted[0]).mean()
    torch.testing.assert_close(mean, torch.tensor(-0.54), atol=0.01, rtol=0)
    # The first token's chunk has up to 256 weights of 1.6 steps, each rounded by up to half a step.
    rounding = 256 * 0.5 / 32766 / 1.3
    out, lse = attend(batch, path)
    torch.testing.assert_close(out, wanted[0], atol=2**0.5 * rounding, rtol=1e-4)
    torch.testing.assert_close(lse, wanted[1], **LSE_TOLERANCE)
