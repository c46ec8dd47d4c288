# SPDX-License-Identifier: Apache-2.0
"""Run real engines of vLLM 0.33 on a CPU, by adding the CPU extension of 0.32 to its wheel."""

from __future__ import annotations

import re

import pytest

from tests.adapter_suites import ENGINES, run_suites
from tests.conformance.releases import unpacked_wheel


@pytest.mark.engine
def test_engines_of_0_33_answer_like_those_of_0_32() -> None:
    folder = unpacked_wheel("0.33")
    assert folder is not None
    if not (folder / "vllm" / "_C.abi3.so").is_file():
        pytest.fail(f"{folder} has no CPU extension: run `make {folder}/.cpu`", pytrace=False)
    done = run_suites([ENGINES], folder, "0.33")
    # Check the number, because a `-k` that selects fewer tests would pass too.
    assert re.search(r"\b18 passed\b(?!.*skipped)", done.stdout), done.stdout[-8000:]
    assert done.returncode == 0
