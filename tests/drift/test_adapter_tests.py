# SPDX-License-Identifier: Apache-2.0
"""How the adapters' tests ended is read from what pytest writes, and nothing counts as passed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.adapter_suites import SUITES, Suite
from tests.drift import adapter_tests, synthetic
from tests.drift.adapter_tests import Outcome
from tests.drift.release import Release

TESTS = """
import pytest
from vllm_hybrid_kv import patches

def test_passes(): pass

@pytest.mark.skip
def test_is_skipped(): pass

def test_fails(): assert 1 == 2, "one is not two"

def test_has_the_lent_adapter():
    import v0_90
    assert patches.ADAPTERS[0, 90] == "v0_90"
    assert v0_90.TARGETS == "as proposed"

def test_a_process_that_a_test_starts_has_the_lent_adapter_too():
    import subprocess, sys
    code = "from vllm_hybrid_kv import patches; print(patches.ADAPTERS[0, 90])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "v0_90\\n"
"""


@pytest.fixture
def new(tmp_path: Path) -> Release:
    return synthetic.write(tmp_path / "release")


def suite(folder: Path, code: str) -> Suite:
    folder.mkdir()
    (folder / "test_it.py").write_text(code)
    return Suite(str(folder), ("test_it.py",))


def test_tests_run_with_the_release_and_a_lent_adapter(new, tmp_path):
    code = f"{TESTS}\ndef test_release():\n    import vllm; assert vllm.__version__ == '0.90.0'\n"
    outcome = adapter_tests.run(new, "TARGETS = 'as proposed'\n", [suite(tmp_path / "suite", code)])
    assert (outcome.passed, outcome.skipped) == (4, 1)
    assert outcome.failed == {"test_it::test_fails": "AssertionError: one is not two"}
    assert not outcome.fits


def test_tests_that_cannot_be_collected_do_not_fit(new, tmp_path):
    outcome = adapter_tests.run(new, None, [suite(tmp_path / "suite", "import no_such_module\n")])
    assert not outcome.fits
    assert list(outcome.failed) == ["test_it"]


def test_no_tests_do_not_fit(new, tmp_path):
    outcome = adapter_tests.run(new, None, [suite(tmp_path / "suite", "")])
    assert not outcome.fits
    assert list(outcome.failed.values()) == ["no test was run"]
    assert not Outcome(0, 3, {}).fits


def test_a_run_that_ends_before_it_reports_does_not_fit(new, tmp_path):
    code = f"import os; os._exit({os.EX_SOFTWARE})\n"
    outcome = adapter_tests.run(new, None, [suite(tmp_path / "suite", code)])
    assert not outcome.fits
    assert len(outcome.failed) == 1


def test_every_file_of_the_suites_is_there():
    files = [Path(argument) for one in SUITES for argument in one.arguments()]
    assert all(file.is_file() for file in files if file.suffix == ".py")
