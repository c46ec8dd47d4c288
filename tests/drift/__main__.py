# SPDX-License-Identifier: Apache-2.0
"""Show what a release of vLLM changed in the functions that the plugin patches or relies on.

    python -m tests.drift VLLM [--write] [--tests]

VLLM is a version or a wheel, which pip installs into `.cache/`, or the folder of an unpacked wheel.
The release is compared with its own minor if that is supported, otherwise with the newest supported
minor. The status is 1 if a function differs or a test failed, and 2 if the release is unreadable.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.adapter_suites import SUITES, run_suites
from tests.drift.comparison import compare, source_with
from tests.drift.release import DriftError, get, of_minor
from vllm_hybrid_kv.patches import targets


def main(command_line: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.drift", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("vllm", metavar="VLLM", help="a version, a wheel or a folder")
    parser.add_argument("--write", action="store_true", help="add its hashes to the table")
    parser.add_argument("--tests", action="store_true", help="run the plugin's tests with it")
    parser.add_argument("--pip-args", default="", metavar="ARGS", help="for pip, in one string")
    arguments = parser.parse_args(command_line)
    try:
        release = get(arguments.vllm, shlex.split(arguments.pip_args))
        version, minor = release.version, release.minor
    except DriftError as error:
        print(error, file=sys.stderr)
        return 2
    known = minor if minor in targets.MINORS else targets.MINORS[-1]
    found = compare(known, of_minor(known), release)
    changed = [one for one in found if one.kinds]
    print(f"vLLM {version} in {release.folder}, compared with {known}:")
    print(f"{len(found) - len(changed)} of {len(found)} functions are unchanged")
    for one in changed:
        print(f"\n{one.report()}")
    if arguments.write:
        file = Path(targets.__file__)
        file.write_text(source_with(found, minor))
        subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", str(file)], check=True)
        print(f"\nwrote the column {minor} of {file}")
    passed = True
    if arguments.tests:
        passed = run_suites(SUITES, release.folder, minor).returncode == 0
    return 0 if passed and not changed else 1


if __name__ == "__main__":
    sys.exit(main())
