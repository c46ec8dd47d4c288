# SPDX-License-Identifier: Apache-2.0
"""Invalid arguments of attention are rejected with a message, and plans have bounded sizes."""

from __future__ import annotations

import pytest
import torch

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.cpu import paged_attention, plan_attention
from vllm_hybrid_kv.kernels.inputs import check_attention


def int32(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def cache(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def tensors() -> dict[str, torch.Tensor]:
    query = torch.zeros(3, 4, 64)
    return {
        "query": query,
        "cache": torch.zeros(2, 2, 16, k8v4.slot_bytes(64), dtype=torch.uint8),
        "block_table": torch.zeros(2, 2, dtype=torch.int32),
        "seq_lens": int32(5, 20),
        "query_start_loc": int32(0, 1, 3),
        "out": torch.zeros_like(query),
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("query", torch.zeros(3, 4, 64).double(), r"query must be bf16, fp16 or fp32 \[tokens, "),
        ("query", torch.zeros(3, 5, 64), r"multiple of the cache's 2, got torch.float32 \[3, 5, 6"),
        ("query", torch.zeros(3, 4, 128)[..., ::2], "query must be contiguous in its last dim"),
        ("cache", torch.zeros(2, 2, 16, 100), "cache must be uint8 .*, got torch.float32"),
        ("cache", cache(2, 2, 16, 99), r"slots of 100 bytes for head size 64, got .*, 16, 99\]"),
        ("cache", cache(2, 16, 2, 100).transpose(1, 2), "cache must be contiguous within a block"),
        ("out", torch.zeros(3, 4, 64).bfloat16(), r"query's dtype and shape, torch.float32 \[3, 4"),
        (
            "seq_lens",
            torch.tensor([5, 20]),
            "seq_lens must be contiguous int32 .*, got torch.int64",
        ),
        (
            "query_start_loc",
            int32(0, 3),
            r"query_start_loc must be .* for 2 requests, got .* \[2\]",
        ),
        (
            "block_table",
            torch.zeros(1, 2).int(),
            r"block_table must be .* least 2, got .* \[1, 2\]",
        ),
        (
            "sinks",
            torch.zeros(3),
            r"sinks must be one number for each of 4 query heads, got .* \[3",
        ),
        ("lse", torch.zeros(3, 4).double(), r"lse must be float32 \[3, 4\], got torch.float64"),
        (
            "out",
            torch.zeros(3, 4, 64, device="meta"),
            "out must be on query's device, cpu, got .*meta",
        ),
    ],
)
def test_an_unsuitable_tensor_is_rejected_with_the_requirement(
    name: str, value: torch.Tensor, message: str
) -> None:
    arguments = {**tensors(), name: value}
    if name == "query" and value.dtype == torch.float32:
        arguments["out"] = torch.zeros(value.shape)
    with pytest.raises(ValueError, match=message):
        check_attention(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "block_table",
            torch.full((2, 2), 2, dtype=torch.int32),
            "must name blocks of the cache, 0 to 1, got",
        ),
        (
            "block_table",
            torch.full((2, 2), -1, dtype=torch.int32),
            "must name blocks of the cache, 0 to 1, got",
        ),
        ("seq_lens", int32(5, 33), "table's 2 pages of 16 tokens hold, got 33 tokens of request 1"),
        ("query_start_loc", int32(0, 1, 4), "at most 3 query tokens"),
        ("query_start_loc", int32(0, 2, 1), "must rise"),
    ],
)
def test_debug_rejects_indices_outside_the_tensors(
    name: str, value: torch.Tensor, message: str
) -> None:
    arguments = {**tensors(), name: value}
    check_attention(**arguments)
    with pytest.raises(ValueError, match=message):
        check_attention(**arguments, debug=True)


def test_a_plan_of_another_batch_is_rejected() -> None:
    arguments = tensors()
    plan = plan_attention(arguments["seq_lens"], arguments["query_start_loc"], 8, 2, 64, 16)
    with pytest.raises(ValueError, match=r"the plan was made for .* 8, 2, 64"):
        paged_attention(**arguments, scale=1.0, plan=plan)  # type: ignore[arg-type]


def test_the_batch_and_the_threads_bound_the_partial_sums_not_the_lengths() -> None:
    starts = torch.arange(9, dtype=torch.int32)
    for length in (4096, 1 << 20):
        lengths = torch.full((8,), length, dtype=torch.int32)
        plan = plan_attention(lengths, starts, 8, 2, 128, 128, num_threads=4)
        assert plan.partial_rows == 8 * 8 * 4  # requests, parts, rows
        assert plan.items.shape[0] == 8 * 8
    alone = plan_attention(lengths[:1], starts[:2], 8, 2, 128, 128, num_threads=1)
    assert alone.partial_rows == 0


@pytest.mark.parametrize(("threads", "rows"), [(2, 128), (64, 128), (65, 64), (96, 64)])
def test_a_prompt_has_larger_items_if_all_threads_still_have_work(threads: int, rows: int) -> None:
    lengths, starts = torch.tensor([9000]), torch.tensor([0, 1024])
    plan = plan_attention(lengths, starts, 32, 4, 128, 128, num_threads=threads)
    assert plan.partial_rows == 0
    assert plan.items.shape[0] == 1024 * (32 // 4) // rows
    assert sorted(plan.items["first_row"]) == list(range(0, 1024 * 8, rows))
    assert set(plan.items["rows"]) == {rows}
