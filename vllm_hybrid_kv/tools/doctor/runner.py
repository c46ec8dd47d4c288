# SPDX-License-Identifier: Apache-2.0
"""Define checks, and run all checks in the child process."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterable
from typing import Any

NAME = "hybrid_kv"

EXIT_STATUS = {"problem": 2, "warning": 1, "note": 0}
"""The exit status that each severity causes; the worst finding decides.

problem: the plugin cannot be active, or vLLM cannot start. warning: the plugin works, but something
is probably not as intended. note: good to know.
"""


Finding = dict[str, str]
"""What a check found out, as JSON for the report. `finding` makes it."""

Facts = dict[str, Any]
"""JSON values that checks store for `--json`, for the text and for later checks."""

Run = Callable[[Facts], Iterable[Finding] | None]


def finding(severity: str, check: str, message: str, remedy: str = "") -> Finding:
    """Return a finding; docs/troubleshooting.md lists the names of checks."""
    return {"severity": severity, "check": check, "message": message, "remedy": remedy}


CHECKS: list[tuple[Run, str, tuple[str, ...], tuple[str, str]]] = []
"""The check functions, each with the arguments of its decorator `check`."""


def check(
    activity: str, *needs: str, error: tuple[str, str] = ("problem", "vllm")
) -> Callable[[Run], Run]:
    """Add the decorated function, which yields findings and may add facts, to `CHECKS`.

    Args:
        activity: What the function does, in words for messages, such as `Importing vLLM`.
        needs: Facts without which the check is skipped.
        error: `severity` and `check` of the finding if the function raises.
    """

    def add(function: Run) -> Run:
        CHECKS.append((function, activity, needs, error))
        return function

    return add


def run(send: Callable[..., None], additional_config: str) -> None:
    """Run all checks in this child process; `additional_config` is JSON as for vLLM, or empty.

    Sends a check's activity when the check begins, and its findings and all facts when it ends.
    Sends `end=True` after the last check.
    """
    from vllm_hybrid_kv.tools.doctor import checks, devices  # noqa: F401 (fill CHECKS)

    facts = {"additional_config": json.loads(additional_config or "null")}
    for function, activity, needs, (severity, name) in CHECKS:
        if not facts.keys() >= set(needs):
            continue
        send(begin=activity)
        findings: list[Finding] = []
        try:
            # Keep the findings that a check yields before an exception.
            for one in function(facts) or ():
                findings.append(one)
        except BaseException as error:  # also SystemExit: the other checks still run
            remedy = "Fix the package that is named, or reinstall it"
            findings.append(finding(severity, name, f"{activity} raises {located(error)}", remedy))
        send(facts=facts, findings=findings)
    send(end=True)


def setting(facts: Facts, name: str) -> dict[str, Any]:
    """Return the value and source of a setting; both are None if the settings are not valid."""
    rows = facts.get("settings", ())
    return next((row for row in rows if row["name"] == name), {"value": None, "source": None})


def describe(error: BaseException) -> dict[str, str]:
    """Return an exception as JSON: `kind`, `message`, the `missing` module and `where`."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen ")  # the import system
    ]
    return {
        "kind": type(error).__name__,
        "message": " ".join(str(error).split()),
        "missing": (error.name or "") if isinstance(error, ModuleNotFoundError) else "",
        "where": f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "",
    }


def located(error: BaseException) -> str:
    """Format an exception as one line of text, with file and line number."""
    described = describe(error)
    return f"{described['kind']}: {described['message']} (at {described['where']})"
