# SPDX-License-Identifier: Apache-2.0
"""Run vLLM's own tests of its core without the plugin and with it, and compare.

    python -m tests.conformance [--minor 0.32] [--strategy fixed_point] [--out FILE]

Every test that passes without the plugin has to pass with each coordinator strategy, except those
in `expected_differences.json`. The exit status is 1 if a test does not or if one in that file
passes, and 2 if the tests could not be run.
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

from tests.conformance import comparison, process, subset
from tests.conformance.comparison import Row
from tests.conformance.process import Report
from tests.conformance.releases import CACHE, RELEASES, SUITE, ConformanceError


def run(arguments: argparse.Namespace) -> list[Row]:
    """Run everything, first without the plugin: tests that fail there are not run with it.

    Raises:
        ConformanceError: The tests could not be run.
    """

    def report(minor: str, strategy: str | None, left_out: frozenset[str]) -> Report:
        selection = (SUITE,)
        if arguments.subset:
            selection, left_out = subset.FILES, left_out | subset.left_out(minor)
        found = process.run(minor, strategy, selection, left_out)
        print(f"{found.name}: {found.count('passed')} passed")
        return found

    def stock(minor: str) -> Report:
        name = f"stock-{RELEASES[minor]}{'-subset' if arguments.subset else ''}.json"
        file = CACHE / "conformance" / name
        if arguments.keep_stock and file.is_file():
            return Report(**json.loads(file.read_text()))
        found = report(minor, None, frozenset())
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(found), indent=1))
        return found

    def failing(stock: Report) -> frozenset[str]:
        return stock.having("failed", "error")

    rows = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        without = list(pool.map(stock, arguments.minor))
        runs = [
            (
                one,
                [pool.submit(report, one.minor, name, failing(one)) for name in arguments.strategy],
            )
            for one in without
        ]
        for one, submitted in runs:
            rows.append(Row(one, None))
            for ours in (future.result() for future in submitted):
                rows.append(Row(ours, comparison.compare(one, ours)))
    return rows


def main() -> int:
    """Run the command and return its exit status."""
    arguments = _arguments()
    try:
        rows = run(arguments)
    except ConformanceError as error:
        print(error, file=sys.stderr)
        return 2
    comparison.print_table(Console(width=None if sys.stdout.isatty() else 160), rows)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(list(map(asdict, rows)), indent=1) + "\n")
    return 0 if all(row.agrees() for row in rows) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add, strategies = parser.add_argument, comparison.strategies()
    add("--minor", nargs="+", choices=RELEASES, default=list(RELEASES), help="minors of vLLM")
    add("--strategy", nargs="+", choices=strategies, default=strategies, help="coordinators")
    add("--subset", action="store_true", help="run what the test command runs")
    add("--keep-stock", action="store_true", help="reuse the last run without the plugin")
    add("--jobs", type=int, default=os.cpu_count(), help="processes at a time (all CPUs)")
    add("--out", type=Path, help="write the results as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
