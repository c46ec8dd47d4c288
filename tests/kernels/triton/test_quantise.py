# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel stores the bits that the reference does and no others, interpreted."""

from __future__ import annotations

import math

import pytest
import torch

from testing.triton import storing
from testing.triton.processes import Interpreter
from testing.triton.storing import random_rows

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [64, 72, 80, 96, 112, 128, 160, 192, 248, 256, 512])
def test_every_head_size_and_dtype_is_stored_like_the_reference(
    head_size: int, dtype: torch.dtype, interpreter: Interpreter
) -> None:
    key, value = random_rows(37, 3, head_size, dtype)
    slots = torch.randperm(64)[:37]
    assert interpreter(storing.differing_bytes, key, value, slots) == 0


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("head_size", [64, 256])
def test_every_16_bit_number_is_stored_like_the_reference(
    head_size: int, dtype: torch.dtype, interpreter: Interpreter
) -> None:
    assert interpreter(storing.all_sixteen_bit_numbers, dtype, head_size) == 0


def test_keys_at_every_rounding_boundary_are_stored_like_the_reference(
    interpreter: Interpreter,
) -> None:
    assert interpreter(storing.around_every_key_code) == 0


@pytest.mark.parametrize("page_size", [16, 48, 528, 2768])
def test_every_page_size_and_distance_of_blocks_is_stored_like_the_reference(
    page_size: int, interpreter: Interpreter
) -> None:
    key, value = random_rows(50, 2, 80, torch.bfloat16)
    slots = torch.randperm(3 * page_size)[:50]
    for padding in (0, 16, 34):
        assert interpreter(storing.differing_bytes, key, value, slots, page_size, padding) == 0


@pytest.mark.parametrize("heads", [1, 2, 5, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 70])
def test_any_number_of_tokens_and_heads_is_stored_in_one_launch(
    count: int, heads: int, interpreter: Interpreter
) -> None:
    key, value = random_rows(count, heads, 64, torch.bfloat16)
    assert interpreter(storing.differing_bytes, key, value, torch.arange(count)) == 0


def test_constant_rows_store_a_scale_of_zero(interpreter: Interpreter) -> None:
    numbers = torch.tensor([0.0, -0.0, 1.0, -3.5, 1e-9, -1e-9, 65504.0, 1e9, 0.1])
    rows = numbers[:, None, None].expand(9, 2, 64)
    mixed_zeros = torch.zeros(9, 2, 64)
    mixed_zeros[..., ::2] = -0.0
    slots = torch.arange(9)
    assert interpreter(storing.differing_bytes, rows, rows, slots) == 0
    assert interpreter(storing.differing_bytes, mixed_zeros, mixed_zeros, slots) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_or_an_infinity_is_stored_like_the_reference(
    dtype: torch.dtype, interpreter: Interpreter
) -> None:
    key, value = random_rows(12, 2, 72, dtype)
    key[1, 0, 5], key[2, 1, 71] = math.nan, -math.nan
    value[3, 0, 0], value[4, 1, 71] = math.nan, math.nan
    key[5, 0, 3], key[6, 0, 3], value[7, 0, 3], value[8, 1, 9] = (
        math.inf, -math.inf, math.inf, -math.inf,
    )  # fmt: skip
    assert interpreter(storing.differing_bytes, key, value, torch.arange(12)) == 0


def test_negative_slots_and_tokens_behind_the_slot_mapping_are_not_written(
    interpreter: Interpreter,
) -> None:
    key, value = random_rows(40, 2, 64, torch.bfloat16)
    slots = torch.arange(19)
    slots[::4] = -1
    assert interpreter(storing.differing_bytes, key, value, slots) == 0
    nowhere = torch.full((6,), -1)
    assert interpreter(storing.differing_bytes, key, value, nowhere) == 0
    assert interpreter(storing.differing_bytes, key, value, slots[:0]) == 0


def test_a_slot_past_the_end_writes_nothing_and_is_refused_in_debug(
    interpreter: Interpreter,
) -> None:
    past = torch.tensor([48, 10**12, -1])
    assert interpreter(storing.refusal, {"slot_mapping": past, "debug": True}) == (
        f"quantise_and_store: slot_mapping must be below the cache's 48 slots, got slot {10**12}"
    )
    assert interpreter(storing.refusal, {"slot_mapping": past[:2]}) == "not refused"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [80, 128])
def test_rows_with_any_strides_are_stored_like_the_reference(
    head_size: int, dtype: torch.dtype, interpreter: Interpreter
) -> None:
    assert interpreter(storing.strided, dtype, head_size) == [0, 0, 0, 0]


def test_offsets_past_2_to_the_31_bytes_are_reached(interpreter: Interpreter) -> None:
    assert interpreter(storing.past_two_gigabytes)


ROWS = torch.ones(5, 2, 64)
REFUSED = {
    "key of integers": (
        {"key": ROWS.to(torch.int32)},
        "key must be bfloat16, float16 or float32, got torch.int32",
    ),
    "value of another dtype": (
        {"value": ROWS.half()},
        "value must be of key's dtype, torch.bfloat16, got torch.float16",
    ),
    "value of another shape": (
        {"value": ROWS[:, :1].bfloat16()},
        "value must be of key's shape, [5, 2, 64], got [5, 1, 64]",
    ),
    "slots of another dtype": (
        {"slot_mapping": torch.arange(5.0)},
        "slot_mapping must be int64 or int32, got torch.float32",
    ),
    "more slots than tokens": (
        {"slot_mapping": torch.arange(6)},
        "slot_mapping must be one slot for each of at most 5 tokens, got shape [6]",
    ),
    "cache of another head size": (
        {"cache": torch.zeros(3, 2, 16, 196, dtype=torch.uint8)},
        "cache must be [blocks, 2, page size, 100] for 2 heads of 64, got [3, 2, 16, 196]",
    ),
    "cache with tokens before heads": (
        {"cache": torch.zeros(3, 16, 2, 100, dtype=torch.uint8).transpose(1, 2)},
        "cache must be contiguous within a block, strides [any, 1600, 100, 1], "
        "got [3200, 100, 200, 1]",
    ),
    "slot named twice": (
        {"slot_mapping": torch.tensor([3, 7, -1, 7, -1]), "debug": True},
        "slot_mapping must be without a slot twice, got slot 7 again",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_tensor_is_refused_with_what_was_expected_and_what_came(
    case: str, interpreter: Interpreter
) -> None:
    changed, message = REFUSED[case]
    assert interpreter(storing.refusal, changed) == f"quantise_and_store: {message}"
