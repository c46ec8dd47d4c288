# SPDX-License-Identifier: Apache-2.0
"""The adapter for vLLM 0.33 against the real wheel, in a process that sees it instead of 0.32."""

from pathlib import Path

import pytest

from tests.adapter_suites import GPU_BACKEND, PLUGIN, PROMISES

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run_pytest(wheel_0_33, run_python):
    """Runs pytest in a process that sees the wheel."""

    def run(*arguments):
        return run_python(
            *("-m", "pytest", "-rA", "-q", "-p", "no:cacheprovider", *arguments),
            timeout=300,
            PYTHONPATH=str(wheel_0_33),
            # What it finds out about model classes would else replace what the installed one found.
            VLLM_CACHE_ROOT=str(REPOSITORY / ".cache" / "vllm-0.33-cache"),
            HYBRID_KV_TEST_VLLM_MINOR="0.33",
        )

    return run


@pytest.fixture(scope="module")
def report(run_pytest):
    """What pytest says of the suites that depend on the minor, run against the wheel."""
    return run_pytest(*PLUGIN.arguments())


@pytest.mark.parametrize("suite", PLUGIN.files)
def test_the_suite_passes_against_the_0_33_wheel(suite, report):
    lines = [line for line in report.stdout.splitlines() if f"{suite}::" in line]
    failed = [line for line in lines if not line.startswith("PASSED")]
    assert lines, f"{report.stdout[-4000:]}\n{report.stderr[-4000:]}"
    assert not failed, f"{failed}\n{report.stdout[-8000:]}"
    assert report.returncode == 0, report.stdout[-4000:]


def test_min_waste_keeps_its_promises_with_the_0_33_wheel(run_pytest):
    done = run_pytest(*PROMISES.arguments())
    assert done.returncode == 0, done.stdout[-8000:]
    assert "2 passed" in done.stdout


def test_the_gpu_backend_works_with_the_0_33_wheel(run_pytest):
    done = run_pytest(*GPU_BACKEND.arguments())
    assert done.returncode == 0, done.stdout[-8000:]
    assert "second_model_runner" in done.stdout
