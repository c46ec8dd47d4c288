# SPDX-License-Identifier: Apache-2.0
"""Say what a release of vLLM moved under the plugin, and which adapter needs what.

    python -m tests.drift VLLM [--against 0.32] [--json FILE]

VLLM is a version, which pip downloads, a wheel, or the folder of an unpacked one. Ends with 0 if
an adapter fits as it is and its tests pass, with 1 if something moved, and with 2 if the release
could not be had or imported.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tests.adapter_suites import ENGINES, SUITES
from tests.drift import adapter_tests, comparison, report
from tests.drift.adapters import adapters
from tests.drift.release import DriftError, get
from tests.drift.uses import uses
from vllm_hybrid_kv.patches import ADAPTERS


def main(command_line: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = _arguments(command_line)
    console = Console(width=None if sys.stdout.isatty() else 100)
    try:
        return _run(arguments, console)
    except DriftError as error:
        print(error, file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace, console: Console) -> int:
    release = get(arguments.vllm, shlex.split(arguments.pip_args))
    against = None if arguments.against is None else tuple(map(int, arguments.against.split(".")))
    chosen, all_of_them = comparison.compare(adapters(), release, uses(), against)
    if arguments.adapter is not None:
        arguments.adapter.write_text(chosen.proposed())
    outcome = None
    if not arguments.no_tests:
        ours = not chosen.moved and ADAPTERS.get(release.minor) == chosen.adapter.module
        proposed = None if ours else chosen.proposed()
        suites = (*SUITES, ENGINES) if release.runs_on_cpu else SUITES
        outcome = adapter_tests.run(release, proposed, suites, jobs=arguments.jobs)
    report.print_report(console, chosen, all_of_them, outcome)
    if arguments.json is not None:
        found = report.as_json(chosen, all_of_them, outcome)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if report.fits(chosen, outcome) else 1


def _arguments(command_line: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.drift", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("vllm", metavar="VLLM", help="a version, a wheel or a folder")
    parser.add_argument(
        "--against",
        choices=[".".join(map(str, minor)) for minor in ADAPTERS],
        help="the adapter to tell of in full (the closest one)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything, for machines")
    parser.add_argument("--adapter", type=Path, metavar="FILE", help="where a new adapter goes")
    parser.add_argument("--no-tests", action="store_true", help="compare alone")
    parser.add_argument("--jobs", type=int, default=2, help="runs of tests at a time (2)")
    parser.add_argument("--pip-args", default="", metavar="ARGS", help="for pip, in one string")
    return parser.parse_args(command_line)


if __name__ == "__main__":
    sys.exit(main())
