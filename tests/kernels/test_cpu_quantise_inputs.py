# SPDX-License-Identifier: Apache-2.0
"""Invalid tensors are rejected with a message before any byte is written."""

from typing import Any

import pytest
import torch

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.cpu import quantise_and_store

TOKENS, HEADS, HEAD_SIZE, PAGE_SIZE, BLOCKS = 5, 2, 64, 16, 3
SLOT = k8v4.slot_bytes(HEAD_SIZE)


def arguments(**changed: Any) -> dict[str, Any]:
    rows = torch.ones(TOKENS, HEADS, HEAD_SIZE, dtype=torch.bfloat16)
    return {
        "key": rows,
        "value": rows,
        "cache": torch.zeros(BLOCKS, HEADS, PAGE_SIZE, SLOT, dtype=torch.uint8),
        "slot_mapping": torch.arange(TOKENS),
    } | changed


def cache_of(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.uint8)


def strided_cache(*stride: int) -> torch.Tensor:
    return torch.zeros(100_000, dtype=torch.uint8).as_strided(
        (BLOCKS, HEADS, PAGE_SIZE, SLOT), stride
    )


ROWS = torch.ones(TOKENS, HEADS, HEAD_SIZE)

REJECTED = {
    "key of integers": (
        {"key": ROWS.to(torch.int32)},
        r"key must be bfloat16, float16 or float32, got torch\.int32",
    ),
    "key in float64": ({"key": ROWS.double()}, r"key must be .*, got torch\.float64"),
    "value of another dtype": (
        {"value": ROWS.half()},
        r"value must be of key's dtype, torch\.bfloat16, got torch\.float16",
    ),
    "key without heads": (
        {"key": ROWS[:, 0].bfloat16()},
        r"key must be \[tokens, heads, head size\], got \[5, 64\]",
    ),
    "value of another shape": (
        {"value": ROWS[:, :1].bfloat16()},
        r"value must be of key's shape, \[5, 2, 64\], got \[5, 1, 64\]",
    ),
    "slots of another dtype": (
        {"slot_mapping": torch.arange(5.0)},
        r"slot_mapping must be int64 or int32, got torch\.float32",
    ),
    "more slots than tokens": (
        {"slot_mapping": torch.arange(6)},
        r"slot_mapping must be one slot for each of at most 5 tokens, got shape \[6\]",
    ),
    "slots in two dims": (
        {"slot_mapping": torch.zeros(1, 5, dtype=torch.int64)},
        r"slot_mapping must be one slot .*, got shape \[1, 5\]",
    ),
    "key on another device": (
        {"key": ROWS.bfloat16().to("meta")},
        r"key must be on cpu, got meta",
    ),
    "cache on another device": (
        {"cache": cache_of(BLOCKS, HEADS, PAGE_SIZE, SLOT).to("meta")},
        r"cache must be on cpu, got meta",
    ),
    "cache of another dtype": (
        {"cache": cache_of(BLOCKS, HEADS, PAGE_SIZE, SLOT).to(torch.int8)},
        r"cache must be uint8, got torch\.int8",
    ),
    "cache of another number of heads": (
        {"cache": cache_of(BLOCKS, 3, PAGE_SIZE, SLOT)},
        r"cache must be \[blocks, 2, page size, 100\] for 2 heads of 64, got \[3, 3, 16, 100\]",
    ),
    "cache of another head size": (
        {"cache": cache_of(BLOCKS, HEADS, PAGE_SIZE, 196)},
        r"cache must be .* for 2 heads of 64, got \[3, 2, 16, 196\]",
    ),
    "cache without heads": (
        {"cache": cache_of(BLOCKS, PAGE_SIZE, SLOT)},
        r"cache must be \[blocks, 2, page size, 100\] .*, got \[3, 16, 100\]",
    ),
    "cache whose slots are padded": (
        {"cache": strided_cache(4000, 2000, 104, 1)},
        r"cache must be contiguous within a block, strides \[any, 1600, 100, 1\], got \[4000",
    ),
    "cache whose heads are padded": (
        {"cache": strided_cache(4000, 1616, 100, 1)},
        r"cache must be contiguous within a block, .*, got \[4000, 1616, 100, 1\]",
    ),
    "cache with tokens before heads": (
        {"cache": strided_cache(3200, 100, 200, 1)},
        r"cache must be contiguous within a block, .*, got \[3200, 100, 200, 1\]",
    ),
    "cache whose blocks overlap": (
        {"cache": strided_cache(1600, 1600, 100, 1)},
        r"cache must be contiguous within a block, .*, got \[1600, 1600, 100, 1\]",
    ),
    "page of an odd number of tokens": (
        {"cache": cache_of(BLOCKS, HEADS, 20, SLOT)},
        r"cache must be of pages of a multiple of 16 tokens, got 20",
    ),
    "unsupported head size": (
        {"key": torch.ones(5, 2, 68), "value": torch.ones(5, 2, 68)},
        r"k8v4 stores head sizes from 64 to 256 in multiples of 8, and 512, got 68",
    ),
    "slot past the end": (
        {"slot_mapping": torch.tensor([0, 1, 48, -1, 50])},
        r"slot 48 of token 2 is past the end of the cache, 3 blocks of 16 tokens",
    ),
}


@pytest.mark.parametrize("case", REJECTED)
def test_an_invalid_tensor_is_rejected_with_the_requirement_and_the_value(case: str) -> None:
    changed, message = REJECTED[case]
    wrong = arguments(**changed)
    with pytest.raises(ValueError, match=message):
        quantise_and_store(**wrong)
    if wrong["cache"].is_cpu:
        assert wrong["cache"].count_nonzero() == 0


def test_a_slot_past_the_end_is_rejected_with_several_threads_too() -> None:
    rows = torch.ones(600, HEADS, HEAD_SIZE)
    slots = torch.arange(600) % 48
    slots[599] = 48
    wrong = arguments(key=rows, value=rows, slot_mapping=slots)
    with pytest.raises(ValueError, match="slot 48 of token 599 is past the end of the cache"):
        quantise_and_store(**wrong)
    assert wrong["cache"].count_nonzero() == 0


def test_debug_rejects_a_slot_that_is_named_twice_unless_it_is_negative() -> None:
    twice = arguments(slot_mapping=torch.tensor([3, 7, -1, 7, -1]))
    with pytest.raises(ValueError, match="slot_mapping must be without a slot twice, got slot 7"):
        quantise_and_store(**twice, debug=True)
    assert twice["cache"].count_nonzero() == 0
    quantise_and_store(**arguments(slot_mapping=torch.tensor([3, 7, -1, 8, -1])), debug=True)


def test_strides_of_dims_of_one_are_ignored() -> None:
    rows = torch.ones(16, 1, HEAD_SIZE)
    cache = cache_of(1, 1, 16, SLOT).as_strided((1, 1, 16, SLOT), (7, 3, SLOT, 1))
    quantise_and_store(rows, rows, cache, torch.arange(16))
    assert cache.count_nonzero() > 0
