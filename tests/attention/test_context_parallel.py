# SPDX-License-Identifier: Apache-2.0
"""With decode context parallelism, two ranks attend as one does.

The ranks are processes that communicate over gloo. vLLM's own collectives, slot mapping and
correction kernels run, the kernels in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from testing.triton.processes import Interpreter
from vllm_hybrid_kv.attention.unsupported import refuse_context_parallel, refuse_sharding

TOLERANCE = 2 * 2**-11
"""Bound on ||out - alone|| / ||alone|| of a token and head, in float32.

The kernels round weights to fp16 relative to the largest weight of a tile. Two ranks have other
tiles than one rank, so each of the two outputs has errors of its own, up to 2^-11 of a weight.
"""

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    process = Interpreter()
    yield lambda **case: process(_outputs, case)
    process.close()


def _outputs(case: dict[str, Any]) -> Any:
    from testing.attention.context_parallel import Case, outputs

    shared, alone, stored = outputs(Case(**case))
    return shared.numpy(), alone.numpy(), stored


@dataclass
class Found:
    shared: torch.Tensor
    alone: torch.Tensor
    stored: list[int]

    @property
    def error(self) -> float:
        errors = (self.shared - self.alone).norm(dim=-1) / self.alone.norm(dim=-1)
        return float(errors.max())


def found(run: Run, **case: Any) -> Found:
    shared, alone, stored = run(**case)
    return Found(torch.from_numpy(shared), torch.from_numpy(alone), stored)


DECODE = {"lengths": (40, 17, 1), "queries": (1, 1, 1)}
"""The second rank stores no token of the third request."""


@pytest.mark.parametrize(
    "case",
    [
        DECODE,
        {**DECODE, "combine": "a2a"},
        {**DECODE, "sinks": True, "padding": 1},
        {"lengths": (40, 17), "queries": (3, 2), "interleave": 4},
        # More new tokens than tokens before them, a whole prompt, and a decode.
        {"lengths": (30, 17, 9), "queries": (20, 17, 1), "sinks": True, "padding": 2},
    ],
    ids=["decode", "all to all", "sinks", "verification", "mixed"],
)
def test_two_ranks_attend_as_one_does(case: dict[str, Any], run: Run) -> None:
    both = found(run, **case)
    assert both.error < TOLERANCE
    # Each rank stores only its own tokens: the slots of the others are -1.
    assert sum(both.stored) == sum(case["lengths"])
    assert min(both.stored) > 0


def test_a_prompt_without_context_needs_no_other_rank(run: Run) -> None:
    both = found(run, lengths=(20, 17), queries=(20, 17))
    assert torch.equal(both.shared, both.alone)


@pytest.mark.parametrize("queries", [1, 2])
def test_a_nan_of_one_rank_reaches_its_request_and_no_other(queries: int, run: Run) -> None:
    both = found(run, lengths=(40, 17), queries=(queries, queries), nan=1)
    assert both.shared[queries:].isnan().all()
    assert not both.shared[:queries].isnan().any()


def test_windows_and_numbers_that_are_no_powers_of_two_are_refused() -> None:
    assert refuse_context_parallel(1, head_size=80, window=100) is None
    assert refuse_context_parallel(2, head_size=128, window=None) is None
    for options, words in (
        ((2, 128, 100), "sliding window, which is not supported with decode context parallelism"),
        ((2, 80, None), "need a head size that is a power of two, not 80"),
        ((3, 128, None), "need a number of ranks that is a power of two, not 3"),
    ):
        ranks, head_size, window = options
        refusal = refuse_context_parallel(ranks, head_size=head_size, window=window)
        assert refusal is not None
        assert words in refusal.reason
        assert "--decode-context-parallel-size 1" in refusal.advice


def test_pages_that_are_planned_for_another_number_of_ranks_are_refused() -> None:
    assert refuse_sharding(2, 2) is None
    refusal = refuse_sharding(1, 2)
    assert refusal is not None
    assert "attends to pages of 1 context parallel ranks, but its pages are planned for 2" in (
        refusal.reason
    )
