# SPDX-License-Identifier: Apache-2.0
"""vLLM's tests without the plugin and with it, side by side."""

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
    """Return the tests that a strategy is meant to fail, each with the reason.

    Raises:
        KeyError: Nobody has said what to expect of the strategy.
    """
    expected: dict[str, str] = json.loads(EXPECTED_DIFFERENCES.read_text())[strategy][minor]
    return expected


def strategies() -> list[str]:
    """Return the strategies that somebody has said what to expect of."""
    return list(json.loads(EXPECTED_DIFFERENCES.read_text()))


@dataclass(frozen=True)
class Comparison:
    """How a strategy's run differs from that without the plugin.

    Attributes:
        unexpected: Tests that pass without the plugin but not with it, and how they end.
        expected: Those of them that are meant to, with the reason.
        outdated: Tests that are meant to fail and pass.
        not_listed: Strategies that the plugin has and that nobody has said what to expect of.
    """

    unexpected: dict[str, str]
    expected: dict[str, str]
    outdated: list[str]
    not_listed: list[str]


@dataclass(frozen=True)
class Row:
    """A run, and how it compares; None for a run without the plugin."""

    report: Report
    comparison: Comparison | None

    def agrees(self) -> bool:
        """Return whether there is nothing that was not expected."""
        found = self.comparison
        return found is None or not (found.unexpected or found.outdated or found.not_listed)


def compare(stock: Report, report: Report) -> Comparison:
    """Compare a strategy's run with one without the plugin.

    Args:
        stock: The run without the plugin.
        report: The strategy's run.
    """
    assert report.strategy is not None
    return differences(
        stock.having("passed"), report, expected_differences(report.strategy, report.minor)
    )


def differences(
    passing: Collection[str], report: Report, expected: Mapping[str, str]
) -> Comparison:
    """Compare a strategy's run with what passes without the plugin.

    Args:
        passing: The tests that pass without the plugin.
        report: The strategy's run.
        expected: The tests that are meant to fail with it, with the reason.
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
    """Print the runs, each minor's without the plugin first, and every difference by name."""
    columns = ("passed", "failed", "errors", "skipped", "not run", "managers")
    table = Table()
    table.add_column("vLLM")
    table.add_column("coordinator")
    for column in columns:
        table.add_column(column, justify="right")
    table.add_column("beside stock")
    collected: dict[str, int] = {}
    for row in rows:
        report = row.report
        # What fails without the plugin is not run with it.
        tests = collected.setdefault(report.minor, len(report.outcomes))
        counts = [report.count(outcome) for outcome in ("passed", "failed", "error", "skipped")]
        numbers = (*counts, tests - len(report.outcomes), report.managers)
        who = report.strategy or "without the plugin"
        table.add_row(report.vllm, who, *map(str, numbers), _verdict(row))
    console.print(table)
    for row in rows:
        for line in _lines(row):
            # Node ids hold brackets, which rich would read as styles.
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
        yield f"{report.name}: passes, but {EXPECTED_DIFFERENCES.name} has it: {test}"
    for strategy in found.not_listed:
        yield f"{report.name}: {EXPECTED_DIFFERENCES.name} lacks the strategy {strategy}"
