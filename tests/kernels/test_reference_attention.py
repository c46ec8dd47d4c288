# SPDX-License-Identifier: Apache-2.0
"""The reference attention equals torch's attention in float64, and sums in plain Python."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from testing.kernels.batches import Case, assert_equal, expected, make
from vllm_hybrid_kv.kernels.k8v4 import Layout
from vllm_hybrid_kv.kernels.reference import (
    Quantised,
    attend,
    dequantise,
    load,
    paged_attention,
    round_query,
)

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
"""Allows for float32 rounding in sums of up to 300 products of numbers near 1."""


def inputs(
    queries: int, length: int, heads: int, kv_heads: int, head_size: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(queries, heads, head_size, generator=generator)
    k = torch.randn(length, kv_heads, head_size, generator=generator)
    v = torch.randn(length, kv_heads, head_size, generator=generator)
    return q, k, v


def torch_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> torch.Tensor:
    queries, length = q.shape[0], k.shape[0]
    q, k, v = (x.to(torch.float64).transpose(0, 1)[None] for x in (q, k, v))
    mask = torch.ones(queries, length, dtype=torch.bool)
    if causal:
        mask = mask.tril(length - queries)
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1).to(torch.float32)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("queries", "length", "heads", "kv_heads"),
    [(1, 1, 1, 1), (1, 123, 5, 1), (7, 7, 4, 4), (123, 300, 6, 2), (300, 300, 8, 2)],
)
def test_plain_attention_equals_torch(
    queries: int, length: int, heads: int, kv_heads: int, causal: bool
) -> None:
    q, k, v = inputs(queries, length, heads, kv_heads, 64)
    out, lse = attend(q, k, v, scale=0.125, causal=causal)
    torch.testing.assert_close(out, torch_attention(q, k, v, 0.125, causal), **TOLERANCE)
    assert lse.shape == (queries, heads)


def plain_sums(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    soft_cap: float,
    sinks: list[float] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    queries, heads, head_size = q.shape
    length, kv_heads, _ = k.shape
    out, lse = torch.zeros(queries, heads, head_size), torch.zeros(queries, heads)
    for i, h in itertools.product(range(queries), range(heads)):
        kv = h // (heads // kv_heads)
        position = length - queries + i
        logits = {}
        for j in range(length):
            if causal and j > position:
                continue
            if window is not None and abs(position - j) >= window:
                continue
            products = (float(q[i, h, d]) * float(k[j, kv, d]) for d in range(head_size))
            s = scale * math.fsum(products)
            logits[j] = soft_cap * math.tanh(s / soft_cap) if soft_cap else s
        total = math.fsum(math.exp(s) for s in logits.values())
        total += math.exp(sinks[h]) if sinks else 0.0
        lse[i, h] = math.log(total) if total else -math.inf
        for d in range(head_size):
            terms = (math.exp(s) / total * float(v[j, kv, d]) for j, s in logits.items())
            out[i, h, d] = math.fsum(terms)
    return out, lse


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 2, 4, 100])
@pytest.mark.parametrize("soft_cap", [0.0, 0.7])
@pytest.mark.parametrize("sinks", [None, [0.5, -1.0, 3.0, 0.0]])
def test_window_sinks_and_soft_cap_equal_plain_sums(
    causal: bool, window: int | None, soft_cap: float, sinks: list[float] | None
) -> None:
    q, k, v = inputs(4, 9, 4, 2, 3)
    out, lse = attend(
        q, k, v, scale=0.6, causal=causal, window=window, soft_cap=soft_cap,
        sinks=None if sinks is None else torch.tensor(sinks),
    )  # fmt: skip
    expected_out, expected_lse = plain_sums(q, k, v, 0.6, causal, window, soft_cap, sinks)
    torch.testing.assert_close(out, expected_out, **TOLERANCE)
    torch.testing.assert_close(lse, expected_lse, **TOLERANCE)


def test_a_query_that_sees_no_key_gets_zeros_and_a_log_sum_exp_of_minus_infinity() -> None:
    q, k, v = inputs(3, 2, 2, 1, 8)  # the first of 3 queries is before both keys
    out, lse = attend(q, k, v, scale=1.0)
    assert out[0].count_nonzero() == 0
    assert bool((lse[0] == -math.inf).all())
    assert bool(lse[1:].isfinite().all())


def test_scores_of_several_hundred_do_not_overflow() -> None:
    q, k, v = inputs(2, 40, 2, 1, 64)
    out, lse = attend(q * 30, k * 30, v, scale=1.0)
    torch.testing.assert_close(out, torch_attention(q * 30, k * 30, v, 1.0, True), **TOLERANCE)
    assert bool(lse.isfinite().all())


def test_a_nan_value_affects_only_the_queries_and_heads_that_see_it() -> None:
    q, k, v = inputs(4, 6, 4, 2, 8)  # queries at positions 2 to 5
    clean, _ = attend(q, k, v, scale=0.3, window=2)
    v[3, 1] = math.nan
    out, lse = attend(q, k, v, scale=0.3, window=2)
    hit = torch.zeros(4, 4, dtype=torch.bool)
    hit[1:3, 2:] = True  # positions 3 and 4, query heads of KV head 1
    assert torch.equal(out.isnan(), hit[..., None].expand_as(out))
    assert torch.equal(out[~hit], clean[~hit])
    assert bool(lse.isfinite().all())


def test_paged_attention_reads_each_requests_own_tokens_and_no_unused_slot() -> None:
    case = Case(64, 4, 2, 16, (37, 1, 80), (5, 1, 3), torch.float32)
    batch = make(case)
    clean = expected(batch)
    tokens = load(batch.cache, 64, Layout.CPU_TILED)
    used = torch.zeros(batch.cache.shape[0] * 16, dtype=torch.bool)
    for i, length in enumerate(case.lengths):
        places = [batch.place(i, token) for token in range(length)]
        slots = torch.tensor([16 * block + t for block, t in places])
        used[slots] = True
        rows = slice(int(batch.query_start_loc[i]), int(batch.query_start_loc[i + 1]))
        own = dequantise(Quantised(*(part[slots] for part in tokens)))
        out, lse = attend(round_query(batch.query[rows]), *own, scale=0.125)
        torch.testing.assert_close(clean[0][rows], out, **TOLERANCE)
        torch.testing.assert_close(clean[1][rows], lse, **TOLERANCE)
        exact, _ = attend(batch.query[rows], *own, scale=0.125)
        float32_query = paged_attention(
            *batch.inputs, Layout.CPU_TILED, integer_query=False, **batch.options
        )
        torch.testing.assert_close(float32_query[0][rows], exact, **TOLERANCE)
    batch.scales.movedim(-1, 1)[~used.view(-1, 16)] = math.nan
    assert_equal(expected(batch), clean)

    block, t = batch.place(0, 20)
    for plane in range(2):
        marked = replace(batch, cache=batch.cache.clone())
        marked.scales[block, 1, plane, t] = math.nan
        out, _ = expected(marked)
        hit = torch.zeros(9, 4, dtype=torch.bool)
        hit[:5, 2:] = True
        assert torch.equal(out.isnan(), hit[..., None].expand_as(out))
        assert torch.equal(out[~hit], clean[0][~hit])
