# SPDX-License-Identifier: Apache-2.0
"""The Triton attention kernels against the float32 definition, interpreted."""

from __future__ import annotations

import math
from typing import Any

import attending
import pytest
import torch
from attending import DECODE, MIXED, Case
from interpreter import Interpreter


@pytest.mark.parametrize("lengths", [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize("head_size", [64, 72, 80, 96, 112, 128, 160, 192, 256])
def test_every_head_size_attends_as_defined(
    head_size: int, lengths: dict[str, Any], interpreter: Interpreter
) -> None:
    interpreter(attending.check, Case(head_size=head_size, **lengths))


@pytest.mark.parametrize("lengths", [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize("group", [1, 2, 3, 5, 6, 7, 8, 12, 16, 20])
def test_every_ratio_of_query_to_kv_heads_attends_as_defined(
    group: int, lengths: dict[str, Any], interpreter: Interpreter
) -> None:
    kv_heads = 2 if group < 8 else 1
    case = Case(num_heads=kv_heads * group, num_kv_heads=kv_heads, **lengths)
    interpreter(attending.check, case)


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("page_size", [16, 48, 64, 128, 528, 2768])
def test_every_page_size_attends_as_defined(
    page_size: int, queries: int, interpreter: Interpreter
) -> None:
    case = Case(page_size=page_size, lengths=(700, 200), queries=(1, queries))
    interpreter(attending.check, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("lengths", [DECODE, MIXED], ids=["decode", "mixed"])
def test_every_dtype_attends_as_defined(
    lengths: dict[str, Any], dtype: torch.dtype, interpreter: Interpreter
) -> None:
    interpreter(attending.check, Case(dtype=dtype, head_size=128, **lengths))


OPTIONS: list[dict[str, Any]] = [
    {"window": 1},
    {"window": 50},
    {"window": 1000},
    {"causal": False},
    {"causal": False, "window": 30},
    {"soft_cap": 2.0},
    {"sinks": torch.linspace(-3, 5, 4)},
    {"sinks": torch.full((4,), -math.inf)},
    {"window": 40, "soft_cap": 30.0, "sinks": torch.linspace(-3, 5, 4).bfloat16()},
]


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("lengths", [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_masks_caps_and_sinks_act_as_defined(
    options: dict[str, Any], lengths: dict[str, Any], split: bool, interpreter: Interpreter
) -> None:
    case = Case(options=options, plan={"split": split, "processors": 8}, **lengths)
    interpreter(attending.check, case)


@pytest.mark.parametrize("window", [None, 3, 70])
@pytest.mark.parametrize("queries", [2, 3, 4, 5, 6, 7, 8])
def test_several_tokens_of_one_request_see_up_to_themselves(
    queries: int, window: int | None, interpreter: Interpreter
) -> None:
    case = Case(lengths=(300, 33, 8), queries=(queries,) * 3, options={"window": window})
    interpreter(attending.check, case)


@pytest.mark.parametrize("processors", [1, 3, 16, 200])
def test_any_number_of_splits_gives_what_one_does(
    processors: int, interpreter: Interpreter
) -> None:
    # The scores of the splits are further apart than float32 can express the ratio of.
    for size in (1.0, 100.0):
        case = Case(
            lengths=(3000, 0, 5, 900, 1), queries=(1, 1, 1, 2, 1), dtype=torch.float16,
            plan={"processors": processors}, query_size=size,
        )  # fmt: skip
        interpreter(attending.check, case)


def test_splits_are_balanced_over_ragged_lengths(interpreter: Interpreter) -> None:
    lengths = (64 * 1000, 64 * 10, 64 * 100, 64, 0)
    tiles = interpreter(attending.tiles_of_programs, lengths, 32)
    assert sum(tiles) == 1111
    # 32 processors with 4 programs each share 1111 tiles.
    assert max(tiles) <= math.ceil(1111 / 128)
    assert len(tiles) <= 128 + len(lengths)


def test_a_plan_written_again_follows_lengths_that_have_changed(interpreter: Interpreter) -> None:
    interpreter(attending.check_replay)


@pytest.mark.parametrize("chunk", [17, 64, 150])
def test_a_prompt_in_chunks_attends_as_defined(chunk: int, interpreter: Interpreter) -> None:
    lengths = tuple(min(stop, 150) for stop in range(chunk, 150 + chunk, chunk))
    for length in lengths:
        queries = length - (length - 1) // chunk * chunk
        interpreter(attending.check, Case(lengths=(length,), queries=(queries,), num_heads=3))


@pytest.mark.parametrize("size", [1e-7, 1e-5, 1e-3, 100.0, 6e3])
def test_values_of_any_size_attend_as_defined(size: float, interpreter: Interpreter) -> None:
    case = Case(value_size=size, dtype=torch.float32, **DECODE)
    interpreter(attending.check, case)


def test_scales_far_apart_in_one_request_attend_as_defined(interpreter: Interpreter) -> None:
    interpreter(attending.check_scales_far_apart)


@pytest.mark.parametrize("size", [1e-6, 1e-2, 1e3])
def test_queries_of_any_size_attend_as_defined(size: float, interpreter: Interpreter) -> None:
    case = Case(query_size=size, options={"scale": 0.125 / size}, **MIXED)
    interpreter(attending.check, case)


@pytest.mark.parametrize("split", [True, False])
def test_a_nan_shows_in_the_rows_that_see_it_and_in_no_others(
    split: bool, interpreter: Interpreter
) -> None:
    assert interpreter(attending.rows_with_nan, split) == [11, 12, 13]


def test_rows_behind_the_last_request_are_left_alone(interpreter: Interpreter) -> None:
    interpreter(attending.check_padding)


def test_a_request_without_tokens_gives_zeros_or_its_sink(interpreter: Interpreter) -> None:
    for options in ({}, {"sinks": torch.linspace(-1, 1, 4)}):
        case = Case(lengths=(0, 20), queries=(2, 1), options=options)
        interpreter(attending.check, case)


def test_pages_apart_and_tensors_with_strides_give_the_same_bits(interpreter: Interpreter) -> None:
    interpreter(attending.check_strides)


def test_blocks_beyond_two_gigabytes_are_found(interpreter: Interpreter) -> None:
    interpreter(attending.check_far_blocks)


def test_two_halves_of_the_keys_merge_by_their_log_sum_exp(interpreter: Interpreter) -> None:
    interpreter(attending.check_merging_halves)


def test_a_plan_for_another_batch_is_refused_in_words(interpreter: Interpreter) -> None:
    message = interpreter(attending.refusal_of_a_foreign_plan)
    assert message == (
        "k8v4 attention on GPU: the plan was made for (requests, query tokens, heads, KV heads, "
        "head size, causal, window) = (1, 1, 4, 1, 64, True, None), the call has "
        "(1, 2, 4, 1, 64, True, None)"
    )
