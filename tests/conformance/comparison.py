# SPDX-License-Identifier: Apache-2.0
"""Compares vLLM's tests without the plugin and with it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.conformance.process import Report

EXPECTED_DIFFERENCES = Path(__file__).resolve().parent / "expected_differences.json"

NOT_RUN = "not run"


def expected_differences(strategy: str, minor: str) -> dict[str, str]:
    """Return the tests that a strategy is expected to fail, each with the reason.

    Raises:
        KeyError: `expected_differences.json` does not list the strategy or the minor.
    """
    expected: dict[str, str] = json.loads(EXPECTED_DIFFERENCES.read_text())[strategy][minor]
    return expected


def strategies() -> list[str]:
    """Return the strategies in `expected_differences.json`."""
    return list(json.loads(EXPECTED_DIFFERENCES.read_text()))


@dataclass(frozen=True)
class Comparison:
    """How a strategy's run differs from the run without the plugin.

    Attributes:
        unexpected: Outcomes of tests that pass only without the plugin.
        expected: Reasons of such tests that are listed.
        outdated: Listed tests that pass.
        not_listed: Strategies of the plugin that are not listed.
    """

    unexpected: dict[str, str]
    expected: dict[str, str]
    outdated: list[str]
    not_listed: list[str]


@dataclass(frozen=True)
class Row:
    """A run and its comparison, which is None for a run without the plugin."""

    report: Report
    comparison: Comparison | None

    def agrees(self) -> bool:
        """Return whether there are only expected differences."""
        found = self.comparison
        return found is None or not (found.unexpected or found.outdated or found.not_listed)


def compare(stock: Report, report: Report) -> Comparison:
    """Compare a strategy's run with the run without the plugin."""
    assert report.strategy is not None
    expected = expected_differences(report.strategy, report.minor)
    return differences(stock.having("passed"), report, expected)


def differences(
    passing: Collection[str], report: Report, expected: Mapping[str, str]
) -> Comparison:
    """Compare a strategy's run with the tests that pass without the plugin.

    Args:
        passing: The tests that pass without the plugin.
        report: The strategy's run.
        expected: The tests that are expected to fail, with the reason.
    """
    differing = {
        test: outcome
        for test in sorted(passing)
        if (outcome := report.outcomes.get(test, NOT_RUN)) != "passed"
    }
    return Comparison(
        unexpected={test: outcome for test, outcome in differing.items() if test not in expected},
        expected={test: expected[test] for test in differing if test in expected},
        outdated=sorted(test for test in expected if report.outcomes.get(test) == "passed"),
        not_listed=sorted(set(report.available) - set(strategies())),
    )


def print_table(console: Console, rows: Sequence[Row]) -> None:
    """Print the runs, each minor's run without the plugin first, and every difference."""
    table = Table("vLLM", "coordinator")
    for column in ("passed", "failed", "errors", "skipped", NOT_RUN, "managers"):
        table.add_column(column, justify="right")
    table.add_column("compared with stock")
    collected: dict[str, int] = {}
    for row in rows:
        report = row.report
        # Tests that fail without the plugin are not run with it.
        tests = collected.setdefault(report.minor, len(report.outcomes))
        counts = [report.count(outcome) for outcome in ("passed", "failed", "error", "skipped")]
        numbers = (*counts, tests - len(report.outcomes), report.managers)
        strategy = report.strategy or "without the plugin"
        table.add_row(report.vllm, strategy, *map(str, numbers), _verdict(row))
    console.print(table)
    for row in rows:
        for line in _lines(row):
            # Node ids contain brackets, which rich would read as styles.
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _verdict(row: Row) -> str:
    if row.comparison is None:
        return ""
    if not row.agrees():
        return "DIFFERS"
    expected = len(row.comparison.expected)
    return f"as expected, {expected} differ" if expected else "the same"


def _lines(row: Row) -> Iterator[str]:
    found, report = row.comparison, row.report
    if found is None:
        return
    for test, outcome in found.unexpected.items():
        reason = report.reasons.get(test, "")
        yield f"{report.name}: {outcome}, but passes without the plugin: {test} {reason}"
    for test, reason in found.expected.items():
        yield f"{report.name}: differs as expected: {test} {reason}"
    for test in found.outdated:
        yield f"{report.name}: passes, but {EXPECTED_DIFFERENCES.name} lists it: {test}"
    for strategy in found.not_listed:
        yield f"{report.name}: {EXPECTED_DIFFERENCES.name} lacks the strategy {strategy}"
