# SPDX-License-Identifier: Apache-2.0
"""Invalid arguments of the CPU kernels are rejected with a message; plans have bounded sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.cpu import paged_attention, plan_attention, quantise_and_store
from vllm_hybrid_kv.kernels.inputs import check_attention

TOKENS, HEADS, HEAD_SIZE, PAGE_SIZE, BLOCKS = 5, 2, 64, 16, 3
SLOT = k8v4.slot_bytes(HEAD_SIZE)
ROWS = torch.ones(TOKENS, HEADS, HEAD_SIZE)
CONTIGUOUS = "cache must be contiguous within a block, with 1600 bytes between heads and 100"


def cache_of(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


def strided_cache(*stride: int) -> torch.Tensor:
    return cache_of(100_000).as_strided((BLOCKS, HEADS, PAGE_SIZE, SLOT), stride)


def store_arguments(**changed: Any) -> dict[str, Any]:
    return {
        "key": ROWS.bfloat16(),
        "value": ROWS.bfloat16(),
        "cache": cache_of(BLOCKS, HEADS, PAGE_SIZE, SLOT),
        "slot_mapping": torch.arange(TOKENS),
    } | changed


def int32(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def attention_arguments(**changed: Any) -> dict[str, Any]:
    query = changed.get("query", torch.zeros(3, 4, 64))
    return {
        "query": query,
        "cache": cache_of(2, 2, 16, SLOT),
        "block_table": torch.zeros(2, 2, dtype=torch.int32),
        "seq_lens": int32(5, 20),
        "query_start_loc": int32(0, 1, 3),
        "out": torch.zeros(query.shape),
    } | changed


REJECTED = [
    ("key", ROWS.double(), r"key must be bf16, fp16 or fp32 .*, got torch\.float64"),
    ("key", ROWS[:, 0].bfloat16(), r"key must be .* \[tokens, KV heads, head size\], got .* \[5"),
    ("key", ROWS.bfloat16().to("meta"), "key must be on cpu, got .* on meta"),
    ("value", ROWS.half(), r"value must be of key's dtype .*, torch\.bfloat16 .*, got torch\.fl"),
    ("value", ROWS[:, :1].bfloat16(), r"value must be .* \[5, 2, 64\], got .* \[5, 1, 64\]"),
    ("slot_mapping", torch.arange(5.0), r"slot_mapping must be int64 or int32, .* torch\.float32"),
    ("slot_mapping", torch.arange(6), r"one slot for each of at most 5 tokens, got .* \[6\]"),
    ("slot_mapping", torch.zeros(1, 5).long(), r"slot_mapping must be .*, got .* \[1, 5\]"),
    ("slot_mapping", torch.tensor([0, 48, -1]), "slot 48 of token 1 is past .* 3 blocks of 16 tok"),
    ("cache", cache_of(3, 2, 16, SLOT).to("meta"), "cache must be on cpu, got .* on meta"),
    ("cache", cache_of(3, 2, 16, SLOT).to(torch.int8), r"cache must be uint8 .*, got torch\.int8"),
    ("cache", cache_of(3, 3, 16, SLOT), r"blocks, 2 KV heads, .*, 100 bytes\] .*, got .* \[3, 3"),
    ("cache", cache_of(3, 2, 16, 196), r"100 bytes\] .*, got torch.uint8 \[3, 2, 16, 196\]"),
    ("cache", cache_of(3, 16, SLOT), r"100 bytes\] .*, got torch.uint8 \[3, 16, 100\]"),
    ("cache", cache_of(3, 2, 20, SLOT), r"page size that is a multiple of 16, got .* \[3, 2, 20"),
    ("cache", strided_cache(4000, 2000, 104, 1), rf"{CONTIGUOUS} .*, got .* \[4000, 2000, 104, 1"),
    ("cache", strided_cache(4000, 1616, 100, 1), rf"{CONTIGUOUS} .* \[4000, 1616, 100, 1\]"),
    ("cache", strided_cache(3200, 100, 200, 1), rf"{CONTIGUOUS} .* \[3200, 100, 200, 1\]"),
    ("cache", strided_cache(1600, 1600, 100, 1), rf"{CONTIGUOUS} .* \[1600, 1600, 100, 1\]"),
]


@pytest.mark.parametrize(("name", "tensor", "message"), REJECTED)
def test_store_rejects_a_tensor_with_the_requirement_and_the_value(
    name: str, tensor: torch.Tensor, message: str
) -> None:
    invalid = store_arguments(**{name: tensor})
    with pytest.raises(ValueError, match=message):
        quantise_and_store(**invalid)
    if invalid["cache"].is_cpu:
        assert invalid["cache"].count_nonzero() == 0


def test_an_unsupported_head_size_is_rejected() -> None:
    rows = torch.ones(TOKENS, HEADS, 68)
    with pytest.raises(ValueError, match="from 64 to 256 in multiples of 8, and 512, got 68"):
        quantise_and_store(**store_arguments(key=rows, value=rows))


def test_a_slot_past_the_end_is_rejected_with_several_threads_too() -> None:
    rows = torch.ones(600, HEADS, HEAD_SIZE)
    slots = torch.arange(600) % 48
    slots[599] = 48
    invalid = store_arguments(key=rows, value=rows, slot_mapping=slots)
    with pytest.raises(ValueError, match="slot 48 of token 599 is past the end of the cache"):
        quantise_and_store(**invalid)
    assert invalid["cache"].count_nonzero() == 0


def test_debug_rejects_a_slot_that_is_named_twice_unless_it_is_negative() -> None:
    twice = store_arguments(slot_mapping=torch.tensor([3, 7, -1, 7, -1]))
    with pytest.raises(ValueError, match="slot_mapping names slot 7 twice"):
        quantise_and_store(**twice, debug=True)
    assert twice["cache"].count_nonzero() == 0
    quantise_and_store(**store_arguments(slot_mapping=torch.tensor([3, 7, -1, 8, -1])), debug=True)


def test_strides_of_dims_of_one_are_ignored() -> None:
    rows = torch.ones(16, 1, HEAD_SIZE)
    cache = cache_of(1, 1, 16, SLOT).as_strided((1, 1, 16, SLOT), (7, 3, SLOT, 1))
    quantise_and_store(rows, rows, cache, torch.arange(16))
    assert cache.count_nonzero() > 0


@pytest.mark.parametrize(("name", "value", "message"), [
    ("query", torch.zeros(3, 4, 64).double(), r"query must be bf16, fp16 or fp32 \[tokens, "),
    ("query", torch.zeros(3, 5, 64),
        r"multiple of the cache's KV heads, 2, got torch.float32 \[3, 5, 6"),
    ("query", torch.zeros(3, 4, 128)[..., ::2], "query must be .*, contiguous in its last dim"),
    ("cache", torch.zeros(2, 2, 16, 100), "cache must be uint8 .*, got torch.float32"),
    ("cache", cache_of(2, 2, 16, 99), r"100 bytes\] for head size 64, got .*, 16, 99\]"),
    ("cache", cache_of(2, 16, 2, 100).transpose(1, 2), "cache must be contiguous within a blo"),
    ("out", torch.zeros(3, 4, 64).bfloat16(), r"query's dtype and shape, torch.float32 \[3, 4"),
    ("seq_lens", torch.tensor([5, 20]), "seq_lens must be contiguous int32 .* torch.int64"),
    ("query_start_loc", int32(0, 3), r"query_start_loc must be .* 2 requests, got .* \[2\]"),
    ("block_table", torch.zeros(1, 2).int(), r"block_table must be .* least 2, got .* \[1, 2"),
    ("sinks", torch.zeros(3), r"sinks must be one number for each of 4 query heads, .* \[3"),
    ("lse", torch.zeros(3, 4).double(), r"lse must be float32 \[3, 4\], got torch.float64"),
    ("out", torch.zeros(3, 4, 64).to("meta"), "out must be on query's device, cpu, got .*meta"),
])  # fmt: skip
def test_attention_rejects_a_tensor_with_the_requirement(
    name: str, value: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_attention(**attention_arguments(**{name: value}))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("block_table", int32(2, 2, 2, 2).view(2, 2), "name blocks of the cache, 0 to 1, got"),
        ("block_table", int32(-1, 0, 0, 0).view(2, 2), "name blocks of the cache, 0 to 1, got"),
        ("seq_lens", int32(5, 33), "table's 2 pages of 16 tokens hold, got 33 tokens of request 1"),
        ("query_start_loc", int32(0, 1, 4), "at most 3 query tokens"),
        ("query_start_loc", int32(0, 2, 1), "must rise"),
    ],
)
def test_debug_rejects_indices_outside_the_tensors(
    name: str, value: torch.Tensor, message: str
) -> None:
    arguments = attention_arguments(**{name: value})
    check_attention(**arguments)
    with pytest.raises(ValueError, match=message):
        check_attention(**arguments, debug=True)


def test_a_plan_of_another_batch_is_rejected() -> None:
    arguments = attention_arguments()
    plan = plan_attention(arguments["seq_lens"], arguments["query_start_loc"], 8, 2, 64, 16)
    with pytest.raises(ValueError, match=r"the plan was made for .* 8, 2, 64"):
        paged_attention(**arguments, scale=1.0, plan=plan)


def test_the_batch_and_the_threads_bound_the_partial_sums_not_the_lengths() -> None:
    starts = torch.arange(9, dtype=torch.int32)
    for length in (4096, 1 << 20):
        lengths = torch.full((8,), length, dtype=torch.int32)
        plan = plan_attention(lengths, starts, 8, 2, 128, 128, num_threads=4)
        assert plan.partial_rows == 8 * 8 * 4  # 8 requests in 8 parts of 4 rows
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
