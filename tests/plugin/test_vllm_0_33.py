# SPDX-License-Identifier: Apache-2.0
"""Test the plugin with the real wheel of vLLM 0.33, in a process that imports that wheel."""

import pytest

from tests.adapter_suites import PROMISES, SUITES, run_suites
from tests.conformance.releases import unpacked_wheel


@pytest.fixture(scope="module")
def report():
    """Run the suites that depend on vLLM's version. Returns the finished process."""
    return run_suites(SUITES, unpacked_wheel("0.33"), "0.33")


def lines_of(report, file):
    return [line for line in report.stdout.splitlines() if f"{file}::" in line]


@pytest.mark.parametrize("file", [file for suite in SUITES for file in suite.files])
def test_the_suite_passes_with_the_0_33_wheel(file, report):
    lines = lines_of(report, file)
    # Tests of vLLM's own coordinators are expected to fail. If they pass, pytest reports an error.
    failed = [line for line in lines if not line.startswith(("PASSED", "XFAIL"))]
    assert lines, f"{report.stdout[-4000:]}\n{report.stderr[-4000:]}"
    assert not failed, f"{failed}\n{report.stdout[-8000:]}"
    assert report.returncode == 0, report.stdout[-4000:]


def test_min_waste_keeps_its_promises_with_the_0_33_wheel(report):
    (file,) = PROMISES.files
    assert len(lines_of(report, file)) == 2


def test_the_gpu_backend_works_with_the_0_33_wheel(report):
    assert "second_model_runner" in report.stdout
