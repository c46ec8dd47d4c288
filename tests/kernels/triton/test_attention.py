# SPDX-License-Identifier: Apache-2.0
"""Compare Triton's attention kernels, run by its interpreter, with the reference."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from testing.triton.attention import (
    DECODE,
    LSE_TOLERANCE,
    MIXED,
    TOLERANCE,
    UNWRITTEN,
    Case,
    assert_close,
    attend,
    check,
    expected,
    largest_score_change,
    make,
    parts_of,
    planned,
)
from testing.triton.processes import interpreted
from vllm_hybrid_kv.kernels import reference
from vllm_hybrid_kv.kernels.k8v4 import Layout
from vllm_hybrid_kv.kernels.triton import largest_scratch, plan_attention
from vllm_hybrid_kv.kernels.triton.attention import MERGED_AT_A_TIME
from vllm_hybrid_kv.kernels.triton.plan import ROW_TILE_COST

# `matrix` runs every option with every kind of batch: decode or mixed, split or whole. It takes
# values from the other lists with different strides, so each value meets each kind of batch, too.
OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 1},
    {"window": 50},
    {"window": 1000},
    {"causal": False},
    {"causal": False, "window": 6},  # hides the last keys from the first of several queries
    {"soft_cap": 2.0},
    {"sinks": torch.linspace(6, -3, 20)},
    {"sinks": torch.full((20,), -math.inf)},
    {"window": 40, "soft_cap": 30.0, "sinks": torch.linspace(6, -3, 20).bfloat16()},
]
BATCHES = [(DECODE, True), (DECODE, False), (MIXED, True), (MIXED, False)]
HEAD_SIZES = [64, 72, 80, 96, 112, 128, 160, 192, 256, 512]
GROUPS = [1, 2, 3, 5, 6, 7, 8, 12, 16, 20]
PAGE_SIZES = [16, 48, 64, 128, 528, 2768]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def matrix() -> Iterator[Any]:
    for (i, options), (k, (lengths, split)) in itertools.product(
        enumerate(OPTIONS), enumerate(BATCHES)
    ):
        group = GROUPS[(3 * i + k) % len(GROUPS)]
        kv_heads = 2 if group < 8 else 1
        heads = kv_heads * group
        if "sinks" in options:
            options = options | {"sinks": options["sinks"][:heads]}
        case = Case(
            head_size=HEAD_SIZES[(i + 2 * k) % len(HEAD_SIZES)],
            num_heads=heads,
            num_kv_heads=kv_heads,
            page_size=PAGE_SIZES[(i + k) % len(PAGE_SIZES)],
            dtype=DTYPES[(i + i // 3 + k) % len(DTYPES)],
            options=options,
            plan={"split": split, "processors": 1 if lengths is MIXED else 2},
            **lengths,
        )
        kind = f"{'decode' if lengths is DECODE else 'mixed'}-{'split' if split else 'whole'}"
        yield pytest.param(
            case,
            id=f"{'-'.join(options) or 'plain'}-{kind}-size{case.head_size}-group{group}"
            f"-page{case.page_size}-{str(case.dtype).removeprefix('torch.')}",
        )


@pytest.mark.parametrize("case", matrix())
@interpreted
def test_every_combination_equals_the_reference(case: Case) -> None:
    check(case)


EDGES: dict[str, Case] = {
    **{
        f"{queries} new tokens, window {window}": Case(
            lengths=(300, 33, 8), queries=(queries,) * 3, options={"window": window}
        )
        for queries, window in (
            (2, 70), (3, None), (4, 3), (5, 70), (6, None), (7, 3), (8, None)
        )
    },
    **{
        # With queries of 100, the weights of two splits differ by more than float32 can express.
        # With 64 processors, one row has more splits than are merged at a time.
        f"{processors} processors, queries of {size}": Case(
            lengths=(2400, 0, 5, 300, 1), queries=(1, 1, 1, 2, 1), num_heads=1,
            dtype=torch.float16, plan={"processors": processors}, query_size=size,
        )
        for processors, size in ((1, 1.0), (3, 100.0), (64, 1.0))
    },
    **{
        f"a prompt in chunks of {chunk}": Case(
            lengths=tuple(min(stop, 110) for stop in range(chunk, 110 + chunk, chunk)),
            queries=tuple(min(chunk, 110 - start) for start in range(0, 110, chunk)),
            num_heads=3, plan={"processors": 1},
        )
        for chunk in (17, 64, 110)
    },
    **{
        f"values of {size}": Case(value_size=size, dtype=torch.float32, **DECODE)
        for size in (1e-7, 1e-5, 1e-3, 100.0, 6e3)
    },
    **{
        f"queries of {size}": Case(
            lengths=(70, 40), queries=(3, 1), query_size=size, options={"scale": 0.125 / size}
        )
        for size in (1e-6, 1e-2, 1e3)
    },
    # If a kernel used the scales in unused memory, 61,280 (0x7B7B), the values would round to 0.
    "large numbers after the last token": Case(
        value_size=1e-5, unused=0x7B, dtype=torch.float32, **MIXED
    ),
    # The first new tokens are at positions 62, 63 and 64, around the end of the first tile.
    "new tokens around the end of a tile": Case(lengths=(65, 66, 67), queries=(3, 3, 3)),
    "rows that see nothing of their first tile": Case(
        lengths=(65, 66, 67), queries=(3, 3, 3), options={"window": 1}
    ),
    "a request without tokens": Case(lengths=(0, 20), queries=(2, 1)),
    "a request with a sink only": Case(
        lengths=(0, 20), queries=(2, 1), options={"sinks": torch.linspace(-1, 1, 4)}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", EDGES.values(), ids=EDGES)
@interpreted
def test_edge_cases_equal_the_reference(case: Case) -> None:
    check(case)


@interpreted
def test_splits_are_balanced_over_ragged_lengths() -> None:
    lengths = (64 * 1000, 64 * 10, 64 * 100, 64, 0)
    plan = plan_attention(
        torch.tensor(lengths, dtype=torch.int32), torch.arange(6, dtype=torch.int32), 5, 4, 1, 64,
        max_query_len=1, processors=32,
    )  # fmt: skip
    pieces = plan.pieces.tolist()
    # 32 processors with 4 programs each share 1111 tiles, one for the request that sees nothing,
    # and the cost of five row tiles.
    assert len(pieces) == 128
    positions = 1112 + 5 * ROW_TILE_COST.value
    assert [pieces[0][2], pieces[-1][3]] == [0, positions]
    assert all(one[3] == other[2] for one, other in itertools.pairwise(pieces))
    assert {end - start for _, _, start, end in pieces} == {positions // 128, positions // 128 + 1}


@interpreted
def test_partial_results_of_any_batch_fit_the_scratch_memory_without_overlap() -> None:
    generator = torch.Generator().manual_seed(0)
    most_splits = 0
    for kv_heads, head_size, group in ((1, 64, 4), (2, 128, 8), (8, 256, 1)):
        scratch = torch.empty(largest_scratch(kv_heads, head_size, torch.device("cpu")))
        for requests, longest, most in ((1, 9000, 1), (3, 3000, 40), (40, 400, 1), (60, 2000, 2)):
            queries = torch.randint(0, most + 1, (requests,), generator=generator)
            queries[-1] = most
            lengths = queries + torch.randint(0, longest, (requests,), generator=generator)
            lengths[-1] += 50 * longest  # a split request after many that are not split
            starts = torch.cat([torch.zeros(1), queries.cumsum(0)]).to(torch.int32)
            plan = plan_attention(
                lengths.to(torch.int32), starts, int(starts[-1]), kv_heads * group, kv_heads,
                head_size, max_query_len=most, scratch=scratch,
            )  # fmt: skip
            parts = [one.part_idx for one in parts_of(plan) if one.part_idx is not None]
            assert len(set(parts)) == len(parts)
            assert all(0 <= part < plan.partial_out.shape[0] for part in parts)
            row_tiles = [row for row in plan.row_tiles.tolist() if row[0] >= 0]
            most_splits = max(most_splits, *(last - first + 1 for *_, first, last in row_tiles))
    assert most_splits >= 8


@interpreted
def test_scales_far_apart_in_one_request_equal_the_reference() -> None:
    """The values' scales rise from smallest to largest in one request, and fall in the other."""
    batch = make(Case(lengths=(300, 300), queries=(1, 1), dtype=torch.float32, page_size=16))
    sizes = torch.logspace(-7, 3.9, 304).to(torch.float16)
    for request, order in enumerate((sizes, sizes.flip(0))):
        for page, scales in enumerate(batch.scales(request, 0, "value")):
            scales.copy_(order[16 * page : 16 * page + 16])
    assert_close(attend(batch), expected(batch))


@interpreted
def test_splits_merged_before_one_with_larger_weights_are_rescaled() -> None:
    batch = make(Case(lengths=(4000,), num_heads=1, dtype=torch.float32))
    for scales in batch.scales(0, 0, "key")[-8:]:
        scales *= 2
    plan = planned(batch, processors=64)
    # The last part has the largest scores, and it is not among those that are merged first.
    *_, first_program, last_program = plan.row_tiles[0].tolist()
    assert last_program - first_program >= MERGED_AT_A_TIME
    assert_close(attend(batch, plan), expected(batch))


@pytest.mark.parametrize("head_size", [64, 128, 192, 512])
@interpreted
def test_products_of_the_largest_codes_are_exact(head_size: int) -> None:
    """All codes are +-127, and each sequence has one token, so the lse is the score."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (6, head_size), generator=generator) * 2 - 1
    signs[1] = -signs[0]
    signs[2] = signs[0]
    case = Case(
        head_size=head_size, num_heads=1, lengths=(1,) * 6, queries=(1,) * 6, dtype=torch.float32
    )
    batch = make(case)
    # After the rotation all numbers of this row have one magnitude, so every code is +-127.
    batch.query[:, 0] = reference.rotation_sums(signs[:1].float().expand(6, -1))
    wanted = []
    for request, codes in enumerate(127 * signs):
        region = batch.cache[batch.block_table[request, 0], 0].view(-1)
        region[:head_size] = codes.to(torch.int8).view(torch.uint8)
        batch.scales(request, 0, "key")[0][0] = 2.0**-10
        product = int((127 * signs[0] * codes).sum())
        largest = float(reference.rotate(batch.query[request, 0]).abs().max())
        wanted.append(product * 2.0**-10 * largest / 127 * batch.options["scale"])
    assert min(wanted) == -max(wanted)
    lse = attend(batch)[1].flatten()
    # A score takes six roundings to float32.
    torch.testing.assert_close(lse, torch.tensor(wanted), rtol=6 * 2.0**-24, atol=1e-6)


@pytest.mark.parametrize(
    "case",
    [
        Case(head_size=64, query_size=3.0, **DECODE),
        Case(head_size=96, num_heads=6, num_kv_heads=2, dtype=torch.float32, **MIXED),
        Case(head_size=256, options={"window": 40, "soft_cap": 5.0}, dtype=torch.float32, **MIXED),
    ],
    ids=["64", "96", "256, window, soft cap"],
)
@interpreted
def test_the_distance_from_exact_queries_is_within_its_bound(case: Case) -> None:
    """If no score moves by more than e, the lse moves by at most e.

    Weights then change by a factor from exp(-2e) to exp(2e), which moves an output by at most
    exp(2e) - 1 times the longest value.
    """
    batch = make(case)
    out, lse = attend(batch)
    exact_out, exact_lse = expected(batch, integer_query=False)
    change = largest_score_change(batch)
    visible = exact_lse > -math.inf
    own_error = LSE_TOLERANCE * (1 + exact_lse.abs())
    assert ((lse - exact_lse).abs() <= change + own_error)[visible].all()
    assert torch.equal(lse[~visible], exact_lse[~visible])
    values = reference.dequantise(reference.load(batch.cache, case.head_size, Layout.LINEAR))[1]
    longest = float(values.norm(dim=-1).nan_to_num(0.0, 0.0).max())
    bound = torch.expm1(2 * change) * longest + TOLERANCE[case.dtype] * exact_out.norm(dim=-1)
    assert ((out.float() - exact_out).norm(dim=-1) <= bound).all()


@interpreted
def test_a_query_that_is_not_finite_makes_its_rows_nan_and_no_others() -> None:
    batch = make(Case(lengths=(70, 40), queries=(3, 1), num_heads=4, num_kv_heads=2))
    wanted_out, wanted_lse = expected(batch)
    broken = torch.zeros(4, 4, dtype=torch.bool)
    for token, head, number in ((0, 1, math.nan), (1, 3, math.inf), (3, 0, -math.inf)):
        batch.query[token, head, 17] = number
        broken[token, head] = True
    out, lse = attend(batch)
    assert torch.equal(out.isnan().all(-1), broken)
    assert torch.equal(expected(batch)[0].isnan().all(-1), broken)
    assert_close((out[~broken], lse[~broken]), (wanted_out[~broken], wanted_lse[~broken]))


@interpreted
def test_padding_tokens_are_not_written() -> None:
    batch = make(Case(lengths=(40, 20), queries=(2, 1)))
    out, lse = attend(batch)
    padded, padded_lse = attend(
        replace(batch, query=torch.cat([batch.query, batch.query[:2]]))
    )  # fmt: skip
    assert torch.equal(padded[:3], out)
    assert torch.equal(padded_lse[:3], lse)
    assert (padded[3:] == UNWRITTEN).all()
    assert (padded_lse[3:] == UNWRITTEN).all()


@interpreted
def test_padding_between_pages_and_strided_tensors_give_the_same_bits() -> None:
    case = Case(num_heads=4, num_kv_heads=2, lengths=(290, 1, 0, 20), queries=(1, 1, 0, 3))
    batch = make(case)
    out, lse = attend(batch)
    blocks, heads, page_size, slot = batch.cache.shape
    padded = torch.full((blocks, heads * page_size * slot + 4096), 255, dtype=torch.uint8)
    pages = padded[:, : heads * page_size * slot].view(batch.cache.shape)
    pages.copy_(batch.cache)
    tokens = batch.query.shape[0]
    query = torch.zeros(tokens, 12, 2, 64, dtype=batch.query.dtype)
    query[:, 8:, 1] = batch.query
    strided_out = torch.zeros(tokens, 4, 3, 64, dtype=batch.query.dtype)
    strided_lse = torch.zeros(4, tokens).t()
    table = torch.zeros(batch.block_table.shape[0], batch.block_table.shape[1] + 5).int()
    table[:, : batch.block_table.shape[1]] = batch.block_table
    strided = replace(batch, query=query[:, 8:, 1], cache=pages, block_table=table)
    attend(strided, into=(strided_out[:, :, 1], strided_lse))
    assert torch.equal(strided_out[:, :, 1], out)
    assert torch.equal(strided_lse, lse)
    assert not strided_out[:, :, ::2].any()


@interpreted
def test_blocks_beyond_two_gigabytes_are_read() -> None:
    batch = make(Case(lengths=(100,), page_size=64))
    out, _ = attend(batch)
    _, heads, page_size, slot = batch.cache.shape
    stride = 2**31 + 4096  # the gaps are never touched, so they take no memory
    memory = torch.empty(2 * stride + heads * page_size * slot, dtype=torch.uint8)
    far = memory.as_strided((3, heads, page_size, slot), (stride, page_size * slot, slot, 1))
    far[2] = batch.cache[int(batch.block_table[0, 0])]
    far[1] = batch.cache[int(batch.block_table[0, 1])]
    table = torch.tensor([[2, 1]], dtype=torch.int32)
    assert torch.equal(attend(replace(batch, cache=far, block_table=table))[0], out)


@interpreted
def test_a_plan_for_another_batch_is_rejected_with_both_shapes() -> None:
    batch = make(Case(queries=(2,)))
    made_for, called = "(1, 1, 4, 1, 64, True, None)", "(1, 2, 4, 1, 64, True, None)"
    message = f"size, causal, window) = {made_for}, the call has {called}"
    with pytest.raises(ValueError, match=re.escape(message)):
        attend(batch, planned(make(Case())))
