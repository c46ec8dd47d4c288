# SPDX-License-Identifier: Apache-2.0
"""The adapter for vLLM 0.33 against the real wheel, in a process that sees it instead of 0.32."""

from pathlib import Path

import pytest

from tests.adapter_suites import PROMISES, SUITES, arguments_of

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report(wheel_0_33, run_python):
    """What pytest says of the suites that depend on the minor, run against the wheel."""
    return run_python(
        *("-m", "pytest", "-rA", "-q", "-p", "no:cacheprovider", *arguments_of(SUITES)),
        timeout=1200,
        PYTHONPATH=str(wheel_0_33),
        # What it finds out about model classes would else replace what the installed one found.
        VLLM_CACHE_ROOT=str(REPOSITORY / ".cache" / "vllm-0.33-cache"),
        HYBRID_KV_TEST_VLLM_MINOR="0.33",
    )


def lines_of(report, file):
    return [line for line in report.stdout.splitlines() if f"{file}::" in line]


@pytest.mark.parametrize("file", [file for suite in SUITES for file in suite.files])
def test_the_suite_passes_against_the_0_33_wheel(file, report):
    lines = lines_of(report, file)
    # What is expected to fail are vLLM's own coordinators; it would be an error if they passed.
    failed = [line for line in lines if not line.startswith(("PASSED", "XFAIL"))]
    assert lines, f"{report.stdout[-4000:]}\n{report.stderr[-4000:]}"
    assert not failed, f"{failed}\n{report.stdout[-8000:]}"
    assert report.returncode == 0, report.stdout[-4000:]


def test_min_waste_keeps_its_promises_with_the_0_33_wheel(report):
    (file,) = PROMISES.files
    assert len(lines_of(report, file)) == 2


def test_the_gpu_backend_works_with_the_0_33_wheel(report):
    assert "second_model_runner" in report.stdout
