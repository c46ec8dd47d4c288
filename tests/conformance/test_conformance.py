# SPDX-License-Identifier: Apache-2.0
"""A part of vLLM's own tests passes with the plugin; `make conformance` runs and compares all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from tests.conformance import comparison, process, subset
from tests.conformance.comparison import Row
from tests.conformance.process import Report
from tests.conformance.releases import RELEASES, ConformanceError


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, str], Future[Report]]]:
    """Start the runs of the selected tests, as many at a time as there are CPUs."""
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


# `stock` makes vLLM's own coordinator; the runs with ours test all other patches as well.
STRATEGIES = [
    pytest.param(name, marks=[pytest.mark.long] if name == "stock" else [])
    for name in comparison.strategies()
]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("minor", RELEASES)
def test_vllms_own_tests_pass(
    minor: str, strategy: str, runs: dict[tuple[str, str], Future[Report]]
) -> None:
    report = runs[minor, strategy].result()
    assert len(report.outcomes) == subset.TESTS[minor]
    expected = comparison.expected_differences(strategy, minor)
    found = comparison.differences(report.outcomes, report, expected)
    why = {test: report.reasons.get(test) for test in found.unexpected}
    assert Row(report, found).agrees(), f"{found}\n{why}"


def report_of(outcomes: dict[str, str], **fields: Any) -> Report:
    defaults: dict[str, Any] = {
        "minor": "0.32",
        "strategy": "stock",
        "vllm": "0.32.0",
        "reasons": {},
        "seconds": {},
        "managers": 2,
        "managers_of_ours": 2,
        "coordinators": {},
        "available": ["stock"],
    }
    return Report(outcomes=outcomes, **{**defaults, **fields})


@pytest.mark.parametrize("outcome", ["failed", "error", "skipped", None])
def test_a_test_that_passes_only_without_the_plugin_is_a_difference(outcome: str | None) -> None:
    report = report_of({"a": "passed"} | ({} if outcome is None else {"b": outcome}))
    found = comparison.differences(["a", "b"], report, {})
    assert found.unexpected == {"b": outcome or "not run"}
    assert not Row(report, found).agrees()


def test_a_test_that_fails_without_the_plugin_may_fail_with_it() -> None:
    report = report_of({"a": "passed", "b": "failed"})
    assert Row(report, comparison.differences(["a"], report, {})).agrees()


def test_an_expected_difference_that_passes_is_reported() -> None:
    expected = {"a": "the reason"}
    failing, passing = report_of({"a": "failed"}), report_of({"a": "passed"})
    found = comparison.differences(["a"], failing, expected)
    assert found.expected == expected
    assert Row(failing, found).agrees()
    found = comparison.differences(["a"], passing, expected)
    assert found.outdated == ["a"]
    assert not Row(passing, found).agrees()


def test_a_strategy_that_is_not_checked_is_a_difference() -> None:
    report = report_of({}, available=["stock", "another"])
    found = comparison.differences([], report, {})
    assert found.not_listed == ["another"]
    assert not Row(report, found).agrees()


@pytest.mark.parametrize("managers", [(0, 0), (2, 0), (2, 1)])
def test_a_run_counts_only_if_the_strategy_made_every_coordinator(
    managers: tuple[int, int],
) -> None:
    made, ours = managers
    report = report_of({}, managers=made, managers_of_ours=ours)
    with pytest.raises(ConformanceError, match=f"made {made} .*, {ours} with"):
        process.check_plugin(report, active=True)


def test_a_run_counts_only_if_the_plugin_is_active_as_chosen() -> None:
    with pytest.raises(ConformanceError, match="was not active"):
        process.check_plugin(report_of({}), active=False)
    with pytest.raises(ConformanceError, match="was active"):
        process.check_plugin(report_of({}, strategy=None), active=True)
