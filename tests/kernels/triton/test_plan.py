# SPDX-License-Identifier: Apache-2.0
"""How a batch is divided among programs: all of it, equally, and never more than fit a GPU."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import pytest
import torch

from testing.triton.attention import Part, parts_of
from testing.triton.processes import interpreted
from vllm_hybrid_kv.kernels.triton import LaunchPlan, plan_attention
from vllm_hybrid_kv.kernels.triton.plan import ROW_TILE_COST


def planned(
    lengths: list[int], queries: list[int], group: int = 4, kv_heads: int = 1, **options: Any
) -> LaunchPlan:
    starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    return plan_attention(
        torch.tensor(lengths, dtype=torch.int32), starts, sum(queries), kv_heads * group, kv_heads,
        64, **{"max_query_len": max(queries)} | options,
    )  # fmt: skip


def key_tiles(plan: LaunchPlan, length: int, queries: int, first_row: int, group: int) -> int:
    """Return how many key tiles the rows of a row tile see, from the definition of a mask."""
    window = plan.made_for[6] or length + 1
    rows = range(first_row, min(first_row + plan.tiling.block_m, queries * group))
    seen = set()
    for row in rows:
        position = length - queries + row // group
        seen |= {
            key // plan.tiling.block_n for key in range(max(0, position - window + 1), position + 1)
        }
    return len(seen)


BATCHES = {
    "decode, equal": ([700] * 5, [1] * 5, {}),
    "decode, ragged": ([3000, 64, 65, 1, 900, 0, 127, 128], [1] * 8, {}),
    "decode, padded": ([500, 0, 0, 700, 0], [1, 0, 0, 1, 0], {}),
    "decode with a window": ([3000, 64, 130, 900], [1] * 4, {"window": 200}),
    "verification": ([800, 300, 40], [4, 2, 4], {}),
    "verification in several row tiles": ([800, 300, 40], [20, 18, 3], {"decodes": True}),
    "decodes and a chunk": ([2000, 5, 300, 70], [1, 1, 40, 1], {}),
    "a chunk with a window": ([600, 90], [100, 1], {"window": 70}),
    "requests that see nothing": ([0, 0, 9], [1, 1, 1], {}),
}


@pytest.mark.parametrize("processors", [1, 3, 40])
@pytest.mark.parametrize("name", BATCHES)
@interpreted
def test_every_key_tile_of_every_row_tile_belongs_to_one_program(
    name: str, processors: int
) -> None:
    lengths, queries, options = BATCHES[name]
    plan = planned(lengths, queries, processors=processors, split=True, **options)
    parts: dict[int, list[Part]] = defaultdict(list)
    for part in parts_of(plan):
        parts[part.row_tile].append(part)
    rows = set()
    for row_tile, fields in enumerate(plan.row_tiles.tolist()):
        request, first_row, _, first_program, last_program = fields
        if request < 0:
            assert row_tile not in parts
            continue
        rows |= {(request, row) for row in range(first_row, first_row + plan.tiling.block_m)}
        found = parts[row_tile]
        programs = list(range(first_program, last_program + 1))
        assert [part.program for part in found] == programs
        tiles = key_tiles(plan, lengths[request], queries[request], first_row, 4)
        assert found[0].first == 0
        assert found[-1].end >= max(tiles, 1)
        for part, following in itertools.pairwise(found):
            assert part.first < part.end == following.first < max(tiles, 1)
        # As `merge_kernel` finds them.
        indices = [2 * program + (program == first_program) for program in programs]
        assert [part.part_idx for part in found] == (indices if len(found) > 1 else [None])
    assert {(i, row) for i, count in enumerate(queries) for row in range(4 * count)} <= rows


@pytest.mark.parametrize("batch", [1, 2, 5, 16, 33, 64, 131, 256])
@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])
@interpreted
def test_decode_programs_of_any_batch_have_equal_work_and_fit_the_gpu(
    ragged: bool, batch: int
) -> None:
    lengths = [20_000 // (1 + 7 * i) + 1 if ragged else 4000 for i in range(batch)]
    for processors, kv_heads, group in ((132, 8, 4), (132, 2, 8), (108, 1, 6), (148, 3, 2)):
        plan = planned(lengths, [1] * batch, group, kv_heads, processors=processors)
        assert len(plan.pieces) * kv_heads <= plan.tiling.programs_per_processor * processors
        pieces = [piece for piece in plan.pieces.tolist() if piece[0] < piece[1]]
        sizes = [end - start for _, _, start, end in pieces]
        assert max(sizes) - min(sizes) <= 1
        tiles = [-(-length // plan.tiling.block_n) + ROW_TILE_COST.value for length in lengths]
        assert sum(sizes) == sum(tiles)
        # A batch that is large enough has all of the GPU.
        if sum(tiles) >= 6 * len(plan.pieces):
            assert len(pieces) == len(plan.pieces)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5, 6], [3, 0, 6, 1, 4, 2, 5]], ids=str)
@interpreted
def test_a_launch_of_a_mixed_batch_has_the_programs_of_its_requests_alone(order: list[int]) -> None:
    # GPU time is then that of both launches alone, and one more planning kernel for each step.
    lengths, queries = [130_000, 500, 900, 40, 700, 3000, 90], [1, 4, 2, 1, 40, 100, 3]
    options = {"group": 8, "kv_heads": 2, "processors": 132}
    for few in (True, False):
        bounds = {"min_query_len": 0, "max_query_len": 4} if few else {"min_query_len": 5}
        served = [i for i in order if (queries[i] <= 4) == few]
        sizes = []
        for requests in (order, served):
            plan = planned(
                [lengths[i] for i in requests],
                [queries[i] for i in requests],
                **options,
                **{"max_query_len": 127} | bounds,
                decodes=few,
                split=True,
            )
            found = {requests[i] for i in plan.row_tiles[:, 0].tolist() if i >= 0}
            assert found == set(served)
            pieces = plan.pieces.tolist()
            sizes.append([end - start for first, last, start, end in pieces if first < last])
        assert sizes[0] == sizes[1]
