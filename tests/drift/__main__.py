# SPDX-License-Identifier: Apache-2.0
"""Show what a release of vLLM changed in the functions that the plugin patches.

    python -m tests.drift VLLM [--against 0.32] [--write] [--tests] [--json FILE]

VLLM is a version, which pip downloads, a wheel, or the folder of an unpacked wheel. The exit status
is 0 if the supported hashes are those of the release, 1 if something changed or a test failed, and
2 if the release cannot be downloaded or imported.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tests.adapter_suites import SUITES, run_suites
from tests.drift import comparison
from tests.drift.comparison import Comparison
from tests.drift.release import DriftError, Release, get, of_minor
from vllm_hybrid_kv.patches import targets

DIFF_LINES = 40
"""Lines of a diff that are printed; `--json` has all of them."""


def main(command_line: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = _arguments(command_line)
    try:
        return _run(arguments)
    except DriftError as error:
        print(error, file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    release = get(arguments.vllm, shlex.split(arguments.pip_args))
    if arguments.against is not None:
        minor = arguments.against
    else:
        minor = release.minor if release.minor in targets.MINORS else targets.MINORS[-1]
    found = comparison.compare(minor, of_minor(minor), release)
    print(report(found, release))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(asdict(found), indent=1) + "\n")
    if arguments.write:
        file = Path(targets.__file__)
        file.write_text(comparison.source_with(found, release.minor))
        subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", str(file)], check=True)
        print(f"wrote the column {release.minor} of {file}")
    passed = True
    if arguments.tests:
        passed = run_suites(SUITES, release.folder, release.minor).returncode == 0
    return 0 if found.fits and passed else 1


def report(found: Comparison, release: Release) -> str:
    """Return the comparison in words."""
    unchanged = len(found.changes) - len(found.changed)
    lines = [
        f"vLLM {found.release} in {release.folder}",
        f"requires Python {', '.join(release.metadata.get('Requires-Python', ['any']))}, "
        f"torch {release.requirement('torch') or 'any'}",
        f"compared with {found.minor}: {unchanged} of {len(found.changes)} functions are unchanged",
    ]
    for change in found.changed:
        lines += ["", f"{change.target} ({change.table}): {change.details}"]
        lines += change.diff[:DIFF_LINES]
        if len(change.diff) > DIFF_LINES:
            lines.append(f"... {len(change.diff) - DIFF_LINES} more lines with --json")
    for head, listed in (
        ("Modules that import a patched function by name", found.importers),
        ("Names that the plugin imports and this vLLM does not have", found.broken_imports),
    ):
        if listed:
            lines += ["", head, *(f"* {line}" for line in listed)]
    if found.changed and found.release.startswith(found.minor):
        lines += ["", f"{found.minor} has two releases with different functions: support one."]
    elif found.changed:
        lines += ["", "`--write` adds the hashes of this release to patches/targets.py."]
    return "\n".join(lines)


def _arguments(command_line: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.drift", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("vllm", metavar="VLLM", help="a version, a wheel or a folder")
    parser.add_argument("--against", choices=targets.MINORS, help="the minor to compare with")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument("--write", action="store_true", help="write the column to the table")
    parser.add_argument("--tests", action="store_true", help="run the plugin's tests with it")
    parser.add_argument("--pip-args", default="", metavar="ARGS", help="for pip, in one string")
    return parser.parse_args(command_line)


if __name__ == "__main__":
    sys.exit(main())
