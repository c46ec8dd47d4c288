# SPDX-License-Identifier: Apache-2.0
"""Compare the results of vLLM's tests with and without the plugin."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from tests.conformance.process import Report

EXPECTED_DIFFERENCES = Path(__file__).resolve().parent / "expected_differences.json"

EXPECTED: dict[str, dict[str, dict[str, str]]] = json.loads(EXPECTED_DIFFERENCES.read_text())
"""For each strategy and minor, the tests that are expected to fail, and why."""


def problems(passing: Collection[str], report: Report, expected: Mapping[str, str]) -> list[str]:
    """Return one line for each test of a strategy's run that differs from what is expected.

    Args:
        passing: The tests that pass without the plugin.
        report: The strategy's run.
        expected: The tests that are expected to fail, with the reason.
    """
    unexpected = sorted(set(passing) - report.having("passed") - expected.keys())
    listed = EXPECTED_DIFFERENCES.name
    return [
        *(
            f"{report.name}: {report.outcomes.get(test, 'not run')}, but passes without the "
            f"plugin: {test} {report.reasons.get(test, '')}"
            for test in unexpected
        ),
        *(
            f"{report.name}: passes, but {listed} lists it: {test}"
            for test in sorted(report.having("passed") & expected.keys())
        ),
        *(
            f"{report.name}: {listed} lacks the strategy {strategy}"
            for strategy in sorted(set(report.available) - EXPECTED.keys())
        ),
    ]
