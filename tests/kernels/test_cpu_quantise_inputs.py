# SPDX-License-Identifier: Apache-2.0
"""Invalid arguments of quantise-and-store are rejected before any byte is written."""

from typing import Any

import pytest
import torch

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.cpu import quantise_and_store

TOKENS, HEADS, HEAD_SIZE, PAGE_SIZE, BLOCKS = 5, 2, 64, 16, 3
SLOT = k8v4.slot_bytes(HEAD_SIZE)
ROWS = torch.ones(TOKENS, HEADS, HEAD_SIZE)


def cache_of(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


def strided_cache(*stride: int) -> torch.Tensor:
    return cache_of(100_000).as_strided((BLOCKS, HEADS, PAGE_SIZE, SLOT), stride)


def arguments(**changed: Any) -> dict[str, Any]:
    return {
        "key": ROWS.bfloat16(),
        "value": ROWS.bfloat16(),
        "cache": cache_of(BLOCKS, HEADS, PAGE_SIZE, SLOT),
        "slot_mapping": torch.arange(TOKENS),
    } | changed


CONTIGUOUS = "cache must be contiguous within a block, with 1600 bytes between heads and 100"

REJECTED = [
    ("key", ROWS.int(), r"key must be bf16, fp16 or fp32 .*, got torch\.int32"),
    ("key", ROWS.double(), r"key must be .*, got torch\.float64"),
    (
        "key",
        ROWS[:, 0].bfloat16(),
        r"key must be .* \[tokens, KV heads, head size\], got .* \[5, 64\]",
    ),
    ("key", ROWS.bfloat16().to("meta"), "key must be on cpu, got .* on meta"),
    (
        "value",
        ROWS.half(),
        r"value must be of key's dtype .*, torch\.bfloat16 .*, got torch\.float16",
    ),
    ("value", ROWS[:, :1].bfloat16(), r"value must be .* \[5, 2, 64\], got .* \[5, 1, 64\]"),
    ("slot_mapping", torch.arange(5.0), r"slot_mapping must be int64 or int32, .* torch\.float32"),
    ("slot_mapping", torch.arange(6), r"one slot for each of at most 5 tokens, got .* \[6\]"),
    ("slot_mapping", torch.zeros(1, 5).long(), r"slot_mapping must be .*, got .* \[1, 5\]"),
    (
        "slot_mapping",
        torch.tensor([0, 1, 48, -1, 50]),
        "slot 48 of token 2 is past the end of the cache, 3 blocks of 16 tokens",
    ),
    ("cache", cache_of(3, 2, 16, SLOT).to("meta"), "cache must be on cpu, got .* on meta"),
    (
        "cache",
        cache_of(3, 2, 16, SLOT, dtype=torch.int8),
        r"cache must be uint8 .*, got torch\.int8",
    ),
    (
        "cache",
        cache_of(3, 3, 16, SLOT),
        r"blocks, 2 KV heads, page size, 100 bytes\], got .* \[3, 3",
    ),
    ("cache", cache_of(3, 2, 16, 196), r"100 bytes\], got torch.uint8 \[3, 2, 16, 196\]"),
    ("cache", cache_of(3, 16, SLOT), r"100 bytes\], got torch.uint8 \[3, 16, 100\]"),
    (
        "cache",
        cache_of(3, 2, 20, SLOT),
        r"pages of a multiple of 16 tokens, got .* \[3, 2, 20, 100\]",
    ),
    # Padding after each slot.
    (
        "cache",
        strided_cache(4000, 2000, 104, 1),
        rf"{CONTIGUOUS} .*, got .* \[4000, 2000, 104, 1\]",
    ),
    ("cache", strided_cache(4000, 1616, 100, 1), rf"{CONTIGUOUS} .* \[4000, 1616, 100, 1\]"),
    ("cache", strided_cache(3200, 100, 200, 1), rf"{CONTIGUOUS} .* \[3200, 100, 200, 1\]"),
    ("cache", strided_cache(1600, 1600, 100, 1), rf"{CONTIGUOUS} .* \[1600, 1600, 100, 1\]"),
]


@pytest.mark.parametrize(("name", "tensor", "message"), REJECTED)
def test_an_invalid_tensor_is_rejected_with_the_requirement_and_the_value(
    name: str, tensor: torch.Tensor, message: str
) -> None:
    invalid = arguments(**{name: tensor})
    with pytest.raises(ValueError, match=message):
        quantise_and_store(**invalid)
    if invalid["cache"].is_cpu:
        assert invalid["cache"].count_nonzero() == 0


def test_an_unsupported_head_size_is_rejected() -> None:
    rows = torch.ones(TOKENS, HEADS, 68)
    with pytest.raises(ValueError, match="from 64 to 256 in multiples of 8, and 512, got 68"):
        quantise_and_store(**arguments(key=rows, value=rows))


def test_a_slot_past_the_end_is_rejected_with_several_threads_too() -> None:
    rows = torch.ones(600, HEADS, HEAD_SIZE)
    slots = torch.arange(600) % 48
    slots[599] = 48
    invalid = arguments(key=rows, value=rows, slot_mapping=slots)
    with pytest.raises(ValueError, match="slot 48 of token 599 is past the end of the cache"):
        quantise_and_store(**invalid)
    assert invalid["cache"].count_nonzero() == 0


def test_debug_rejects_a_slot_that_is_named_twice_unless_it_is_negative() -> None:
    twice = arguments(slot_mapping=torch.tensor([3, 7, -1, 7, -1]))
    with pytest.raises(ValueError, match="slot_mapping names slot 7 twice"):
        quantise_and_store(**twice, debug=True)
    assert twice["cache"].count_nonzero() == 0
    quantise_and_store(**arguments(slot_mapping=torch.tensor([3, 7, -1, 8, -1])), debug=True)


def test_strides_of_dims_of_one_are_ignored() -> None:
    rows = torch.ones(16, 1, HEAD_SIZE)
    cache = cache_of(1, 1, 16, SLOT).as_strided((1, 1, 16, SLOT), (7, 3, SLOT, 1))
    quantise_and_store(rows, rows, cache, torch.arange(16))
    assert cache.count_nonzero() > 0
