# SPDX-License-Identifier: Apache-2.0
"""Run vLLM's own tests of its core without the plugin and with it, and compare.

    python -m tests.conformance [--minor 0.32] [--strategy fixed_point] [--out FILE]

A test that passes without the plugin must pass with each coordinator strategy, unless
`expected_differences.json` lists it. The exit status is 1 if an unlisted test fails or a listed
test passes, and 2 if the tests could not be run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.conformance import process, subset
from tests.conformance.comparison import EXPECTED, problems
from tests.conformance.process import Report
from tests.conformance.releases import RELEASES, SUITE, ConformanceError

OUTCOMES = ("passed", "failed", "error", "skipped")


def run(arguments: argparse.Namespace) -> list[Report]:
    """Run the tests without the plugin, and then the passing ones again with each strategy.

    Raises:
        ConformanceError: The tests could not be run.
    """

    def report(minor: str, strategy: str | None, left_out: frozenset[str] = frozenset()) -> Report:
        selection = subset.FILES if arguments.subset else (SUITE,)
        more = subset.left_out(minor) if arguments.subset else frozenset()
        found = process.run(minor, strategy, selection, left_out | more)
        print(f"{found.name}: {len(found.having('passed'))} passed")
        return found

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        alone = list(pool.map(lambda minor: report(minor, None), arguments.minor))
        runs = [
            pool.submit(report, one.minor, strategy, one.having("failed", "error"))
            for one in alone
            for strategy in arguments.strategy
        ]
        return [*alone, *(one.result() for one in runs)]


def compared(reports: list[Report]) -> tuple[Table, list[str]]:
    """Return a table of all runs, and a line for each unexpected difference."""
    alone = {report.minor: report for report in reports if report.strategy is None}
    table = Table("vLLM", "coordinator")
    for column in (*OUTCOMES, "not run", "managers"):
        table.add_column(column, justify="right")
    table.add_column("compared with stock")
    lines = []
    for report in reports:
        passing, verdict = alone[report.minor].having("passed"), ""
        if report.strategy is not None:
            found = problems(passing, report, EXPECTED[report.strategy][report.minor])
            differing = len(passing - report.having("passed"))
            verdict = f"as expected, {differing} differ" if differing else "the same"
            verdict = "DIFFERS" if found else verdict
            lines += found
        # Tests that fail without the plugin are not run with a strategy.
        numbers = [len(report.having(outcome)) for outcome in OUTCOMES]
        numbers += [len(alone[report.minor].outcomes) - len(report.outcomes), report.managers]
        strategy = report.strategy or "without the plugin"
        table.add_row(report.vllm, strategy, *map(str, numbers), verdict)
    return table, lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add, strategies = parser.add_argument, list(EXPECTED)
    add("--minor", nargs="+", choices=RELEASES, default=list(RELEASES), help="minors of vLLM")
    add("--strategy", nargs="+", choices=strategies, default=strategies, help="coordinators")
    add("--subset", action="store_true", help="run what the test command runs")
    add("--out", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    try:
        reports = run(arguments)
    except ConformanceError as error:
        print(error, file=sys.stderr)
        return 2
    table, lines = compared(reports)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    print("\n".join(lines))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"problems": lines, "runs": list(map(asdict, reports))}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
