# SPDX-License-Identifier: Apache-2.0
"""The Triton attention kernels against the float32 definition, interpreted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from testing.triton import attending
from testing.triton.attending import DECODE, MIXED, Case
from testing.triton.processes import Interpreter

# The matrix. Every value of these lists meets every kind of batch: decode and mixed, with and
# without splits. The lists are turned against each other, so that they do not go in step; what is
# not turned are the options, which meet each kind alone and together.
OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 1},
    {"window": 50},
    {"window": 1000},
    {"causal": False},
    {"causal": False, "window": 6},  # shorter than what follows the first of several queries
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
def test_every_combination_attends_as_defined(case: Case, interpreter: Interpreter) -> None:
    interpreter(attending.check, case)


@pytest.mark.parametrize(
    ("queries", "window"), [(2, 70), (3, None), (4, 3), (5, 70), (6, None), (7, 3), (8, None)]
)
def test_several_tokens_of_one_request_see_up_to_themselves(
    queries: int, window: int | None, interpreter: Interpreter
) -> None:
    case = Case(lengths=(300, 33, 8), queries=(queries,) * 3, options={"window": window})
    interpreter(attending.check, case)


# With 100 the scores of splits are further apart than float32 can express the ratio of; with 64
# processors there are more splits of one row than are merged at a time.
@pytest.mark.parametrize(("processors", "query_size"), [(1, 1.0), (3, 100.0), (64, 1.0)])
def test_any_number_of_splits_gives_what_one_does(
    processors: int, query_size: float, interpreter: Interpreter
) -> None:
    case = Case(
        lengths=(2400, 0, 5, 300, 1), queries=(1, 1, 1, 2, 1), num_heads=1, dtype=torch.float16,
        plan={"processors": processors}, query_size=query_size,
    )  # fmt: skip
    interpreter(attending.check, case)


def test_splits_are_balanced_over_ragged_lengths(interpreter: Interpreter) -> None:
    lengths = (64 * 1000, 64 * 10, 64 * 100, 64, 0)
    tiles = interpreter(attending.tiles_of_programs, lengths, 32)
    assert sum(tiles) == 1111
    # 32 processors with 4 programs each share 1111 tiles.
    assert max(tiles) <= math.ceil(1111 / 128)
    assert len(tiles) <= 128 + len(lengths)


def test_partial_results_of_any_batch_fit_the_scratch_memory(interpreter: Interpreter) -> None:
    interpreter(attending.check_scratch)


def test_a_plan_written_again_follows_lengths_that_have_changed(interpreter: Interpreter) -> None:
    interpreter(attending.check_replay)


@pytest.mark.parametrize("chunk", [17, 64, 110])
def test_a_prompt_in_chunks_attends_as_defined(chunk: int, interpreter: Interpreter) -> None:
    lengths = tuple(min(stop, 110) for stop in range(chunk, 110 + chunk, chunk))
    queries = tuple(length - (length - 1) // chunk * chunk for length in lengths)
    plan = {"processors": 1}
    case = Case(lengths=lengths, queries=queries, num_heads=3, plan=plan)
    interpreter(attending.check, case)


@pytest.mark.parametrize("size", [1e-7, 1e-5, 1e-3, 100.0, 6e3])
def test_values_of_any_size_attend_as_defined(size: float, interpreter: Interpreter) -> None:
    case = Case(value_size=size, dtype=torch.float32, **DECODE)
    interpreter(attending.check, case)


def test_large_numbers_behind_the_last_token_have_no_influence(interpreter: Interpreter) -> None:
    # 0x7B7B is 61,280 in fp16; beside it the scales of the values would vanish.
    case = Case(value_size=1e-5, unused=0x7B, dtype=torch.float32, **MIXED)
    interpreter(attending.check, case)


def test_scales_far_apart_in_one_request_attend_as_defined(interpreter: Interpreter) -> None:
    interpreter(attending.check_scales_far_apart)


@pytest.mark.parametrize("size", [1e-6, 1e-2, 1e3])
def test_queries_of_any_size_attend_as_defined(size: float, interpreter: Interpreter) -> None:
    options = {"scale": 0.125 / size}
    case = Case(lengths=(70, 40), queries=(3, 1), query_size=size, options=options)
    interpreter(attending.check, case)


@pytest.mark.parametrize("split", [True, False])
def test_a_nan_shows_in_the_rows_that_see_it_and_in_no_others(
    split: bool, interpreter: Interpreter
) -> None:
    assert interpreter(attending.rows_with_nan, split) == [11, 12, 13]


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(("queries", "options"), [(1, {"window": 40}), (3, {}), (9, {"window": 3})])
def test_the_bytes_of_a_token_that_no_row_sees_have_no_influence(
    queries: int, options: dict[str, Any], split: bool, interpreter: Interpreter
) -> None:
    interpreter(attending.check_hidden_bytes, queries, options, split)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("options", [{}, {"window": 40}])
def test_a_token_hidden_from_some_rows_has_no_influence_on_them(
    options: dict[str, Any], split: bool, interpreter: Interpreter
) -> None:
    interpreter(attending.check_token_hidden_from_some_rows, options, split)


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
        "k8v4 attention: the plan was made for (requests, query tokens, heads, KV heads, "
        "head size, causal, window) = (1, 1, 4, 1, 64, True, None), the call has "
        "(1, 2, 4, 1, 64, True, None)"
    )
