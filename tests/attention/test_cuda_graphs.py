# SPDX-License-Identifier: Apache-2.0
"""vLLM's model runners can capture the GPU backend in CUDA graphs and replay them.

Real engines run vLLM's own capture, dispatch and replay; see `testing/attention/cuda_graphs.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from testing.models import build_model, llama_config
from testing.triton.processes import Interpreter

PROMPTS = [[5, 6, 7] * 2, [9] * 18, [11, 12]]
"""Three prompts of different lengths, so the graph for four requests has a request of padding."""

TOKENS = 3

PLAN, ATTEND, STORE = "plan_kernel", "attend_kernel", "quantise_and_store_kernel"


class Rehearser:
    """Runs one engine at a time in a process with Triton's interpreter."""

    def __init__(self, model: str) -> None:
        self._process = Interpreter()
        self._model = model
        self._started = False

    def start(self, runner: int, drafts: int = 0, **arguments: Any) -> Any:
        """Start an engine instead of the last one, and return its answers without graphs."""
        self.stop()
        if drafts:
            # The draft model is the model itself, so all drafts are right.
            arguments["speculative_config"] = {
                "method": "draft_model", "model": self._model, "num_speculative_tokens": drafts,
            }  # fmt: skip
        self._process(_start, runner, self._model, arguments)
        self._started = True
        return self._process(_call, "generate", PROMPTS, TOKENS + drafts)

    def rehearse(self, tokens: int) -> Any:
        return self._process(_rehearse, PROMPTS, tokens)

    def rehearse_fault(self, fault: str) -> Any:
        """Replay a graph once, for short prompts, with a planted fault."""
        return self._process(_rehearse, [[5, 6], [9], [11, 12]], 2, fault)

    def stop(self) -> None:
        if self._started:
            self._process(_call, "close")
        self._started = False

    def close(self) -> None:
        self.stop()
        self._process.close()


_answers: Any = None


def _start(runner: int, model: str, arguments: dict[str, Any]) -> None:
    from testing.attention.cuda_graphs import Engine

    global _engine
    _engine = Engine(runner, model, **arguments)


def _call(method: str, *arguments: Any) -> Any:
    return getattr(_engine, method)(*arguments)


def _rehearse(*arguments: Any) -> SimpleNamespace:
    # An instance of `Rehearsal` would import its module here, which sets environment variables.
    return SimpleNamespace(**vars(_call("rehearse", *arguments)))


@pytest.fixture(scope="module")
def rehearser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rehearser]:
    model = build_model(llama_config(layers=2), tmp_path_factory.mktemp("model"))
    made = Rehearser(str(model))
    yield made
    made.close()


@pytest.fixture(scope="module")
def first_runner(rehearser: Rehearser) -> tuple[Rehearser, Any]:
    """An engine with vLLM's first model runner, and its answers without graphs."""
    return rehearser, rehearser.start(1)


def require_faithful(found: Any, answers: Any, replays: list[tuple[int, int]]) -> None:
    assert found.error is None
    # Replays repeat the kernels of a run without the graph, on the same memory, so their output
    # is equal bit by bit.
    assert found.wrong == []
    assert found.differences == []
    assert found.answers == answers
    assert found.replays == replays
    # A graph must contain the planning, or it would keep the plan of the capture.
    assert all({PLAN, ATTEND, STORE} <= kernels for kernels in found.kernels)


def test_decode_graphs_of_the_first_runner_follow_each_step(
    first_runner: tuple[Rehearser, Any],
) -> None:
    rehearser, answers = first_runner
    found = rehearser.rehearse(TOKENS)
    require_faithful(found, answers, [(4, 4)] * (TOKENS - 1))
    assert found.graphs == [(4, 4), (1, 1)]


# The following tests prove that the rehearsal finds faults.
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("reads on the host", "aten.item.default reads on the host during a capture"),
        ("reads a list on the host", "Tensor.tolist reads on the host during a capture"),
        ("tensor of another graph", "uses a tensor that another capture allocated"),
    ],
)
def test_a_capture_fails_at_an_operation_that_cuda_rejects_or_that_breaks_replays(
    fault: str, error: str, first_runner: tuple[Rehearser, Any]
) -> None:
    found = first_runner[0].rehearse_fault(fault)
    assert error in found.error


def test_metadata_in_a_new_buffer_is_found(first_runner: tuple[Rehearser, Any]) -> None:
    found = first_runner[0].rehearse_fault("metadata in a new buffer")
    assert found.wrong
    assert all("has argument" in difference for difference in found.differences)


def test_a_grid_that_depends_on_the_batch_is_found(first_runner: tuple[Rehearser, Any]) -> None:
    found = first_runner[0].rehearse_fault("grid of this batch")
    assert any("has grid" in difference for difference in found.differences)


def test_a_plan_of_an_earlier_step_is_found(first_runner: tuple[Rehearser, Any]) -> None:
    found = first_runner[0].rehearse_fault("plan of an earlier step")
    assert not any(PLAN in kernels for kernels in found.kernels)


@pytest.fixture
def answers(rehearser: Rehearser, request: pytest.FixtureRequest) -> Any:
    """The answers without graphs of an engine that is started with the test's parameters."""
    return rehearser.start(**request.param)


VERIFICATION = {"drafts": 2, "sizes": (3, 12)}


@pytest.mark.parametrize(
    "answers",
    [
        {"runner": 2, **VERIFICATION},
        pytest.param({"runner": 1, **VERIFICATION}, marks=pytest.mark.long),
    ],
    indirect=True,
    ids=lambda parameters: f"runner {parameters['runner']}",
)
def test_graphs_that_verify_drafts_follow_each_step(answers: Any, rehearser: Rehearser) -> None:
    found = rehearser.rehearse(TOKENS + 2)
    # All drafts are accepted, or there would be more steps.
    require_faithful(found, answers, [(12, 4)] * 2)


@pytest.mark.long
@pytest.mark.parametrize("answers", [{"runner": 2}], indirect=True, ids=["runner 2"])
def test_decode_graphs_of_the_second_runner_follow_each_step(
    answers: Any, rehearser: Rehearser
) -> None:
    require_faithful(rehearser.rehearse(TOKENS), answers, [(4, 4)] * (TOKENS - 1))
