# SPDX-License-Identifier: Apache-2.0
"""What the doctor says, and what its exit status is."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass


class Severity(enum.Enum):
    """How much a finding matters, the worst first."""

    PROBLEM = "problem"
    """The plugin cannot be active, or vLLM cannot start."""
    WARNING = "warning"
    """It works, and something probably is not as meant."""
    NOTE = "note"
    """Worth knowing. Says nothing against the installation."""


EXIT_STATUS = {Severity.PROBLEM: 2, Severity.WARNING: 1, Severity.NOTE: 0}
"""The exit status that the worst finding makes; 0 where there is none."""


@dataclass(frozen=True)
class Finding:
    """One thing that a user should know.

    Attributes:
        severity: How much it matters.
        check: What was checked, a name that does not change.
        message: What was found.
        remedy: What to do about it; empty where nothing is to be done.
    """

    severity: Severity
    check: str
    message: str
    remedy: str = ""


def exit_status(findings: Iterable[Finding]) -> int:
    """Return 0 where all is well, 1 with warnings, 2 where the plugin cannot be active."""
    return max((EXIT_STATUS[finding.severity] for finding in findings), default=0)


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """Return findings with the worst first, else in the order they came."""
    ranks = list(Severity)
    return sorted(findings, key=lambda finding: ranks.index(finding.severity))
