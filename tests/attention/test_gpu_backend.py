# SPDX-License-Identifier: Apache-2.0
"""Our backend has none of the faults of vLLM's TurboQuant backend ("stock") on GPUs.

Tests marked `both` also run stock's own code and expect it to fail, which proves that the test can
find the fault. Triton's interpreter runs the GPU kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from testing.attention.steps import Step, call
from testing.triton.processes import Interpreter

TOLERANCE = 0.4
"""Bound on ||out - exact|| / ||exact|| over tokens and heads. Quantisation alone usually adds 0.1.
Each fault under test causes an error above this bound, usually 1 or more."""

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    process = Interpreter()
    yield lambda *call_arguments: process(call, *call_arguments)
    process.close()


def wrong(reason: str) -> pytest.MarkDecorator:
    """Expect an assertion to fail, and no other error."""
    return pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason)


def both(reason: str) -> pytest.MarkDecorator:
    """Run a test on both backends, and expect stock to fail for this reason."""
    return pytest.mark.parametrize("backend", ["ours", pytest.param("stock", marks=wrong(reason))])


@both("vLLM #40831, #52475, #53180: stock uses upper bounds as lengths")
def test_draft_tokens_attend_with_the_accepted_lengths(backend: str, run: Run) -> None:
    assert run("step_error", backend, Step((9, 6), (2, 2), bound=3)) < TOLERANCE


@pytest.mark.parametrize("tokens", [1, 2, 4, 7, 8])
def test_a_graph_with_1_to_8_tokens_per_request_follows_changed_lengths(
    tokens: int, run: Run
) -> None:
    captured, replayed = Step((9, 9, 9), (tokens,) * 3), Step((40, tokens), (tokens,) * 2)
    assert run("replay_error", "ours", captured, replayed) < TOLERANCE


@pytest.mark.parametrize("tokens", [1, pytest.param(2, marks=wrong("its prefill is Python code"))])
def test_a_graph_of_stock_follows_changed_lengths_only_with_one_token_per_request(
    tokens: int, run: Run
) -> None:
    captured, replayed = Step((9, 9), (tokens,) * 2), Step((20, 6), (tokens,) * 2)
    assert run("replay_error", "stock", captured, replayed) < TOLERANCE


def test_a_decode_graph_follows_changed_numbers_of_tokens(run: Run) -> None:
    captured, replayed = Step((9, 9, 9), (4, 4, 4)), Step((40, 30, 3), (2, 4, 3))
    assert run("replay_error", "ours", captured, replayed) < TOLERANCE


def test_the_runs_before_a_capture_use_short_lengths(run: Run) -> None:
    assert run("captured_lengths") == [3, 3]


def test_a_drafts_next_token_attends_with_its_own_length(run: Run) -> None:
    assert run("draft_error", True) < TOLERANCE


def test_a_plan_for_the_previous_token_is_correct_for_decodes(run: Run) -> None:
    assert run("draft_error", False) < TOLERANCE


@both("vLLM #46460: one uncached prompt makes stock ignore cached context")
def test_cached_context_is_attended_to_next_to_an_uncached_prompt(backend: str, run: Run) -> None:
    assert run("step_error", backend, Step((20, 20), (20, 5))) < TOLERANCE


@both("stock converts keys through e4b15, whose maximum is 1.75")
def test_large_keys_are_not_clipped_on_gpus_without_a_conversion_to_fp8(
    backend: str, run: Run
) -> None:
    assert run("step_error", backend, Step((20, 9), (1, 1), key_size=3.0)) < TOLERANCE


@both("vLLM #40420: stock dequantises context into a buffer of max_model_len tokens")
def test_the_workspace_does_not_grow_with_max_model_len(backend: str, run: Run) -> None:
    assert run("workspace_bytes", backend, 1024) == run("workspace_bytes", backend, 65536)


@both("stock ignores the soft cap")
def test_a_soft_cap_bounds_the_scores(backend: str, run: Run) -> None:
    layer = {"logits_soft_cap": 0.2}
    assert run("step_error", backend, Step((20, 9), (1, 1), layer=layer)) < TOLERANCE


@both("stock refuses such layers")
@pytest.mark.parametrize("feature", ["has_sliding_window", "has_sink"])
def test_sliding_windows_and_sinks_are_served(feature: str, backend: str, run: Run) -> None:
    assert run("refused", backend, {feature: True}) == []


@pytest.mark.parametrize(
    "layer",
    [{"sliding_window": 6}, {"sinks": [3.0, -1.0, 0.0, 5.0]}],
    ids=lambda layer: next(iter(layer)),
)
def test_sliding_windows_and_sinks_reach_the_kernels(layer: dict[str, Any], run: Run) -> None:
    assert run("step_error", "ours", Step((20, 9), (1, 3), layer=layer)) < TOLERANCE


def test_decode_context_parallelism_is_served_and_prefill_context_parallelism_is_not(
    run: Run,
) -> None:
    assert run("refused", "ours", {"use_dcp": True}) == []
    assert run("refused", "ours", {"use_pcp": True}) == ["PCP not supported"]


def test_compute_capabilities_from_8_0_on_are_served(run: Run) -> None:
    for capability in ((8, 0), (9, 0), (12, 0)):
        assert run("refused", "ours", {"device_capability": capability}) == []
    for major, minor in ((7, 5), (7, 0), (6, 9)):
        (reason,) = run("refused", "ours", {"device_capability": (major, minor)})
        assert "of compute capability 8.0 and newer" in reason
        assert f"this one has {major}.{minor}: Triton cannot compile int8" in reason


def test_per_head_scales_of_a_checkpoint_are_accepted(run: Run) -> None:
    assert run("refused", "ours", {"use_per_head_quant_scales": True}) == []


def test_groups_of_equal_specs_share_a_plan(run: Run) -> None:
    assert run("shared_plans")


def test_the_engine_start_launches_every_kernel_of_a_step(run: Run) -> None:
    steps = [
        Step((20,), (1,)),
        Step((9, 9), (4, 4)),
        Step((40,), (40,)),
        Step((2,) * 150, (1,) * 150),
        # With so many work items the keys of a query are not split among programs.
        Step((40, *[2] * 20), (40, *[1] * 20)),
    ]
    assert run("not_warmed_up", steps) == set()


def test_the_second_model_runner_gets_exact_lengths(run: Run) -> None:
    assert run("second_runner_error", 3) < TOLERANCE


def test_pages_can_be_moved_as_bytes_of_the_planned_size(run: Run) -> None:
    assert run("moved_pages_are_equal")
