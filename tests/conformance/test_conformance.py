# SPDX-License-Identifier: Apache-2.0
"""A part of vLLM's own tests passes with the plugin. `make conformance` runs and compares all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from tests.conformance import comparison, process, subset
from tests.conformance.process import Report
from tests.conformance.releases import RELEASES, ConformanceError


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, str], Future[Report]]]:
    """Start vLLM's tests for all selected minors and strategies, one at a time per CPU."""
    selected = [
        (item.callspec.params["minor"], item.callspec.params["strategy"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == "test_vllms_own_tests_pass"
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            (minor, strategy): pool.submit(
                process.run, minor, strategy, subset.FILES, subset.left_out(minor)
            )
            for minor, strategy in selected
        }
        pool.shutdown(cancel_futures=True)


# With `stock`, vLLM makes its own coordinator, so only our patches are tested. The runs of other
# strategies test the patches, too, so `stock` runs only with the long tests.
STRATEGIES = [
    pytest.param(name, marks=[pytest.mark.long] if name == "stock" else [])
    for name in comparison.EXPECTED
]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("minor", RELEASES)
def test_vllms_own_tests_pass(
    minor: str, strategy: str, runs: dict[tuple[str, str], Future[Report]]
) -> None:
    report = runs[minor, strategy].result()
    assert len(report.outcomes) == subset.TESTS[minor]
    expected = comparison.EXPECTED[strategy][minor]
    assert not comparison.problems(report.outcomes, report, expected)


def report_of(outcomes: dict[str, str], **fields: Any) -> Report:
    report = Report("0.32", "stock", "0.32.0", True, ["stock"], 2, 2, outcomes, {})
    return replace(report, **fields)


@pytest.mark.parametrize(
    ("outcomes", "expected", "problem"),
    [
        *(({"b": outcome}, {}, f"{outcome}, but") for outcome in ("failed", "error", "skipped")),
        ({}, {}, "not run, but passes without the plugin: b"),
        ({"b": "failed"}, {"b": "the reason"}, None),
        ({"b": "passed"}, {"b": "the reason"}, "passes, but expected_differences.json lists it: b"),
        # Test c fails without the plugin too, so it is no difference.
        ({"b": "passed", "c": "failed"}, {}, None),
    ],
)
def test_a_test_that_passes_only_without_the_plugin_is_a_difference(
    outcomes: dict[str, str], expected: dict[str, str], problem: str | None
) -> None:
    found = comparison.problems(["a", "b"], report_of({"a": "passed", **outcomes}), expected)
    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]


def test_a_strategy_that_is_not_checked_is_a_difference() -> None:
    report = report_of({}, available=["stock", "another"])
    (line,) = comparison.problems([], report, {})
    assert "lacks the strategy another" in line


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"managers": 0, "managers_of_ours": 0}, "made 0 .*, 0 with"),
        ({"managers_of_ours": 1}, "made 2 .*, 1 with"),
        ({"plugin_active": False}, "was not active"),
        ({"strategy": None}, "was active"),
    ],
)
def test_a_run_counts_only_if_the_strategy_made_every_coordinator(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConformanceError, match=message):
        report_of({}, **fields).check_plugin()
