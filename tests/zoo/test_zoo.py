# SPDX-License-Identifier: Apache-2.0
"""Check every architecture's configuration; plan and run a few. `make zoo` plans and runs all."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from testing.output_comparison import errors_of
from tests.zoo.architectures import architectures
from tests.zoo.bounds import verdict
from tests.zoo.language_models import LANGUAGE_MODELS, SAME_AS
from tests.zoo.models import SIZES
from tests.zoo.patterns import Pattern
from tests.zoo.refusals import unfit
from tests.zoo.report import MARKS, PAGE, README, render, status_of, summary
from tests.zoo.results import RESULTS
from tests.zoo.workers import Worker

K8V4 = "turboquant_k8v4"


@pytest.fixture(scope="module")
def tables() -> dict[str, dict]:
    return json.loads(RESULTS.read_text())


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    log = tmp_path_factory.mktemp("zoo") / "planner.log"
    with contextlib.closing(Worker("tests.zoo.planner", log, 240.0)) as running:
        yield running


def test_the_model_tables_name_only_architectures_of_the_registries():
    named = {*SIZES, *SAME_AS, *SAME_AS.values(), *LANGUAGE_MODELS, *LANGUAGE_MODELS.values()}
    assert not named - architectures().keys()


def test_every_architecture_has_a_row(tables: dict[str, dict]):
    missing = [
        name for name in architectures() if LANGUAGE_MODELS.get(name, name) not in tables["plans"]
    ]
    assert not missing


def test_the_committed_page_and_the_readme_show_the_committed_results(tables: dict[str, dict]):
    assert PAGE.read_text() == render(tables)
    assert "".join([MARKS[0], summary(tables), "\n", MARKS[1]]) in README.read_text()


def test_no_refusal_has_words_of_python_or_of_another_device(tables: dict[str, dict]):
    bad = {
        (name, dtype): unfit(plan["refused"])
        for name, row in tables["plans"].items()
        for dtype, plan in row["plans"].items()
        if "refused" in plan and unfit(plan["refused"])
    }
    assert not bad


@pytest.mark.parametrize(
    "text",
    [
        "AttributeError: 'NoneType' object has no attribute 'x'",
        "Sparse Attention is not supported on CPU.",
        "Tensor.item() cannot be called on meta tensors",
        "min() iterable argument is an empty sequence",
        "",
    ],
)
def test_words_of_python_or_of_another_device_are_reported(text: str):
    assert unfit(text)


PLANNED = {
    "LlamaForCausalLM": Pattern(("full",), (), (), False, False),
    "Gemma3nForCausalLM": Pattern(("full",), (), ("sliding window",), True, False),
    "Qwen3NextForCausalLM": Pattern(("full",), ("Gated DeltaNet",), (), False, True),
    "GptOssForCausalLM": Pattern(("full with sinks",), (), ("sliding window",), False, True),
}


@pytest.mark.parametrize("name", PLANNED)
def test_an_architecture_has_its_pattern_and_more_tokens_when_quantised(planner: Worker, name: str):
    row = planner.ask(name)
    assert Pattern.from_json(row["pattern"]) == PLANNED[name]
    plans = row["plans"]
    assert plans["auto"]["tokens"] < plans["fp8"]["tokens"]
    assert plans["auto"]["tokens"] < plans[K8V4]["tokens"]
    assert any("k8v4" in kind for kind in plans[K8V4]["layers"])


@pytest.mark.engine
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma3ForCausalLM"])
def test_a_small_engine_with_k8v4_agrees_with_auto(runner: Worker, name: str):
    row = runner.ask(name)
    assert "errors" in row, row
    assert not verdict(row, states=False)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    log: Path = tmp_path_factory.mktemp("zoo") / "runner.log"
    with contextlib.closing(Worker("tests.zoo.runner", log, 300.0)) as running:
        yield running


def row_of(apart: float, cached: list[int], error: float = 0.0) -> dict:
    """Make a row. Cache hits move log-probabilities by `apart`, k8v4 moves them by `error`."""
    auto = [-3.0 + 0.01 * i for i in range(400)]
    return {
        "auto": {},
        "errors": errors_of(auto, [value + error for value in auto], 64, spread=1.0),
        "lengths": [300, 10],
        K8V4: {"apart": apart, "cached": cached, "smallest_hit": 17},
    }


@pytest.mark.parametrize(
    ("row", "word"),
    [
        (row_of(0.1, [288, 0], error=0.05), None),
        (row_of(0.1, [288, 0], error=5.0), "mean"),
        (row_of(0.1, [288, 0], error=float("nan")), "mean"),
        (row_of(0.3, [288, 0]), "apart"),
        (row_of(float("nan"), [288, 0]), "apart"),
        (row_of(0.1, [0, 0]), "did not hit"),
    ],
)
def test_outputs_that_differ_are_reported(row: dict, word: str | None):
    reported = verdict(row, states=False)
    assert any(word in text for text in reported) if word else reported == []


@pytest.mark.parametrize(
    ("error", "status"),
    [(0.0, "served and compared"), (5.0, "planned only; LlamaForCausalLM: differs")],
)
def test_only_an_architecture_whose_engine_agrees_counts_as_served(error: float, status: str):
    plans = {"auto": {"tokens": 1}, "fp8": {"tokens": 2}, K8V4: {"tokens": 2}}
    pattern = PLANNED["LlamaForCausalLM"]
    planned = {
        "minor": "0.32", "planned_as": "LlamaForCausalLM", "plans": plans, "pattern": pattern
    }  # fmt: skip
    rows = {"plans": planned, "engines": row_of(0.1, [288, 0], error)}
    tables = {table: {"LlamaForCausalLM": row} for table, row in rows.items()}
    assert status_of("LlamaForCausalLM", tables).startswith(status)
