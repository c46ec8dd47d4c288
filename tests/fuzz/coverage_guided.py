# SPDX-License-Identifier: Apache-2.0
"""Fuzz the property tests of the parsers, guided by code coverage: needs the extra `fuzz`.

    python -m tests.fuzz.coverage_guided [--seconds 60] [--only trace]

Each test runs in its own process. Atheris chooses the bytes from which Hypothesis builds the test's
arguments. The input of a finding is written to `.cache/fuzz`, and the command exits with 1.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOUND = ROOT / ".cache" / "fuzz"
TESTS = {
    "trace": ("test_traces", "test_any_lines_are_read_or_refused_with_file_and_line"),
    "config": ("test_model_configs", "test_any_file_describes_a_model_or_is_refused"),
    "settings": ("test_settings", "test_any_section_and_environment_give_settings_or_one_message"),
    "sizes": ("test_sizes", "test_any_text_is_a_size_or_is_refused"),
}
"""Module and property test of each parser."""


def fuzz(name: str, seconds: int) -> None:
    """Fuzz one parser in this process, and exit."""
    import atheris

    module, test = TESTS[name]
    if name == "config":
        # Imported before instrumentation, because the coverage of vLLM would hide ours.
        import vllm.model_executor.models  # noqa: F401
    with atheris.instrument_imports(include=["vllm_hybrid_kv", "json"]):
        property_test = getattr(importlib.import_module(f"tests.fuzz.{module}"), test)
    options = (
        f"-max_total_time={seconds} -print_final_stats=1 -timeout=60 -verbosity=1 -max_len=2048 "
        f"-artifact_prefix={FOUND}/{name}- {tempfile.mkdtemp()}"
    )
    atheris.Setup([sys.argv[0], *options.split()], property_test.hypothesis.fuzz_one_input)
    atheris.Fuzz()


def run(name: str, seconds: int) -> bool:
    """Fuzz one parser in its own process, print the result and return whether it has a finding.

    Raises:
        RuntimeError: The process ended without statistics.
    """
    command = [sys.executable, "-m", "tests.fuzz.coverage_guided", "--in-process", name]
    done = subprocess.run(
        [*command, "--seconds", str(seconds)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    executions = re.findall(r"stat::number_of_executed_units:\s*(\d+)", done.stdout)
    edges = re.findall(r"cov: (\d+)", done.stdout)
    finding = ""
    if done.returncode:
        raised = re.search(r"Uncaught Python exception: ===\n(.*)", done.stdout)
        finding = raised[1] if raised else done.stdout[-2000:]
    elif not executions:
        raise RuntimeError(f"{name}: {done.stdout[-2000:]}")
    print(
        f"{name}: {int((executions or [0])[-1]):,} inputs in {seconds} s, "
        f"{int((edges or [0])[-1]):,} edges, {finding or 'no findings'}",
        flush=True,
    )
    return bool(finding)


def main() -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.coverage_guided")
    parser.add_argument("--seconds", type=int, default=60, help="for each parser")
    parser.add_argument("--only", choices=TESTS, action="append", help="may be repeated")
    parser.add_argument("--in-process", choices=TESTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_process:
        fuzz(options.in_process, options.seconds)
    FOUND.mkdir(parents=True, exist_ok=True)
    findings = [run(name, options.seconds) for name in options.only or TESTS]
    return int(any(findings))


if __name__ == "__main__":
    sys.exit(main())
