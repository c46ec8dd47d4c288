# SPDX-License-Identifier: Apache-2.0
"""Compares vLLM's tests without the plugin and with it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from tests.conformance.process import Report

EXPECTED_DIFFERENCES = Path(__file__).resolve().parent / "expected_differences.json"

EXPECTED: dict[str, dict[str, dict[str, str]]] = json.loads(EXPECTED_DIFFERENCES.read_text())
"""The tests that a strategy is expected to fail, with the reason, by strategy and minor."""


def problems(passing: Collection[str], report: Report, expected: Mapping[str, str]) -> list[str]:
    """Return how a strategy's run differs from the expected result, a line for each difference.

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
