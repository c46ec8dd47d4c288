# SPDX-License-Identifier: Apache-2.0
"""Fuzz the parsers by their property tests, guided by code coverage. This needs the extra `fuzz`.

    python -m tests.fuzz.coverage_guided [--seconds 60] [--only trace]

Each test runs in its own process. Atheris chooses the bytes from which Hypothesis builds the test's
arguments. If a test fails, its input is written to `.cache/fuzz`, and the command exits with 1.
"""

from __future__ import annotations

import argparse
import importlib
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
"""For each parser, the module and the name of its property test."""


def fuzz(name: str, seconds: int) -> None:
    """Fuzz one parser in this process. Atheris ends the process."""
    import atheris

    module, test = TESTS[name]
    if name == "config":
        # Import vLLM before instrumentation starts, so that its coverage does not hide ours.
        import vllm.model_executor.models  # noqa: F401
    with atheris.instrument_imports(include=["vllm_hybrid_kv", "json"]):
        property_test = getattr(importlib.import_module(f"tests.fuzz.{module}"), test)
    options = (
        f"-max_total_time={seconds} -print_final_stats=1 -timeout=60 -max_len=2048 "
        f"-artifact_prefix={FOUND}/{name}- {tempfile.mkdtemp()}"
    )
    atheris.Setup([sys.argv[0], *options.split()], property_test.hypothesis.fuzz_one_input)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.coverage_guided")
    parser.add_argument("--seconds", type=int, default=60, help="seconds for each parser")
    parser.add_argument("--only", choices=TESTS, action="append", help="may be repeated")
    parser.add_argument("--in-process", choices=TESTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_process:
        fuzz(options.in_process, options.seconds)
    FOUND.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.fuzz.coverage_guided", "--seconds"]
    failed = [
        name
        for name in options.only or TESTS
        if subprocess.call([*command, str(options.seconds), "--in-process", name], cwd=ROOT)
    ]
    print(f"findings: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
