# SPDX-License-Identifier: Apache-2.0
"""Run vLLM's own tests of its core without the plugin and with it, and compare.

    python -m tests.conformance [--minor 0.32] [--strategy fixed_point] [--out FILE]

Every test that passes without the plugin has to pass with each coordinator strategy, but for those
in `expected_differences.json`. Ends with 1 if one does not or if one in that file passes, and with
2 if the tests could not be run.
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


class Command:
    """The command.

    Args:
        arguments: From the command line.
        console: Where progress is said.
    """

    def __init__(self, arguments: argparse.Namespace, console: Console) -> None:
        self._minors: list[str] = arguments.minor
        self._strategies: list[str] = arguments.strategy
        self._jobs: int = arguments.jobs
        self._subset: bool = arguments.subset
        self._keep_stock: bool = arguments.keep_stock
        self._console = console

    def run(self) -> list[Row]:
        """Run everything, without the plugin first, for what fails there need not be run again.

        Raises:
            ConformanceError: The tests could not be run.
        """
        with ThreadPoolExecutor(self._jobs) as pool:
            stock = dict(zip(self._minors, pool.map(self._stock, self._minors), strict=True))
            runs = {
                minor: [pool.submit(self._ours, report, strategy) for strategy in self._strategies]
                for minor, report in stock.items()
            }
            rows = []
            for minor, report in stock.items():
                rows.append(Row(report, None))
                ours = [run.result() for run in runs[minor]]
                rows += [Row(run, comparison.compare(report, run)) for run in ours]
            return rows

    def _stock(self, minor: str) -> Report:
        name = f"stock-{RELEASES[minor]}{'-subset' if self._subset else ''}.json"
        kept = CACHE / "conformance" / name
        if self._keep_stock and kept.is_file():
            return Report(**json.loads(kept.read_text()))
        report = self._report(minor, None, frozenset())
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(asdict(report), indent=1))
        return report

    def _ours(self, stock: Report, strategy: str) -> Report:
        return self._report(stock.minor, strategy, stock.having("failed", "error"))

    def _report(self, minor: str, strategy: str | None, leave_out: frozenset[str]) -> Report:
        if self._subset:
            report = process.run(minor, strategy, subset.FILES, leave_out | subset.left_out(minor))
        else:
            report = process.run(minor, strategy, (SUITE,), leave_out)
        self._console.print(f"{report.name}: {report.count('passed')} passed", markup=False)
        return report


def main() -> int:
    """Run the command and return its exit code."""
    arguments = _arguments()
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        rows = Command(arguments, console).run()
    except ConformanceError as error:
        print(error, file=sys.stderr)
        return 2
    comparison.print_table(console, rows)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(list(map(asdict, rows)), indent=1) + "\n")
    return 0 if all(row.agrees() for row in rows) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--minor", nargs="+", choices=RELEASES, default=list(RELEASES), help="vLLM's minors"
    )
    parser.add_argument(
        *("--strategy", "--strategies"),
        nargs="+",
        choices=comparison.strategies(),
        default=comparison.strategies(),
        help="coordinator strategies",
    )
    parser.add_argument("--subset", action="store_true", help="what the test command runs")
    parser.add_argument(
        "--keep-stock", action="store_true", help="take the last run without the plugin"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="processes at a time (all CPUs)"
    )
    parser.add_argument("--out", type=Path, help="where the results go, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
