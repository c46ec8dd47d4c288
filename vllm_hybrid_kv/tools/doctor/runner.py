# SPDX-License-Identifier: Apache-2.0
"""What a check is, and the child process that runs all of them."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

NAME = "hybrid_kv"

EXIT_STATUS = {"problem": 2, "warning": 1, "note": 0}
"""The exit status that each severity causes; the worst finding decides.

problem: the plugin cannot be active, or vLLM cannot start. warning: it works, and something
probably is not as intended. note: good to know.
"""


@dataclass(frozen=True)
class Finding:
    """One thing that a user should know.

    Attributes:
        severity: A key of `EXIT_STATUS`.
        check: A public name; docs/troubleshooting.md lists them.
        message: What is wrong, with the values.
        remedy: What to do about it; empty if nothing has to be done.
    """

    severity: str
    check: str
    message: str
    remedy: str = ""


def problem(check: str, message: str, remedy: str = "") -> Finding:
    return Finding("problem", check, message, remedy)


def warning(check: str, message: str, remedy: str = "") -> Finding:
    return Finding("warning", check, message, remedy)


@dataclass
class Probe:
    """What the checks of one child process share.

    Attributes:
        additional_config: The parsed value of vLLM's `--additional-config`.
        facts: Values for `--json`, for the text and for later checks. JSON can represent them.
        strategies: The `hooks.Strategies` of this process, if they could be loaded.
    """

    additional_config: object = None
    facts: dict[str, Any] = field(default_factory=dict)
    strategies: Any = None

    def setting(self, name: str) -> dict[str, Any]:
        """Return the name, value and source of a setting; empty if settings are not valid."""
        return next((row for row in self.facts.get("settings", ()) if row["name"] == name), {})


Run = Callable[[Probe], Iterable[Finding] | None]


class Check(NamedTuple):
    """A function that yields findings and may add facts, and when it runs."""

    run: Run
    activity: str
    needs: tuple[str, ...]
    severity: str
    name: str


CHECKS: list[Check] = []


def check(
    activity: str, *needs: str, error: tuple[str, str] = ("problem", "vllm")
) -> Callable[[Run], Run]:
    """Add a function to `CHECKS`.

    Args:
        activity: What the check does, for messages: `importing vLLM`.
        needs: Facts without which the check is skipped.
        error: `severity` and `check` of the finding if the function raises.
    """

    def add(function: Run) -> Run:
        CHECKS.append(Check(function, activity, needs, *error))
        return function

    return add


def run(send: Callable[..., None], additional_config: str) -> None:
    """Run all checks in a child process.

    Args:
        send: Sends a message to the parent.
        additional_config: JSON; empty for none.
    """
    from vllm_hybrid_kv.tools.doctor import checks  # noqa: F401 (fills CHECKS)

    run_checks(Probe(json.loads(additional_config) if additional_config else None), send)


def run_checks(probe: Probe, send: Callable[..., None]) -> None:
    """Run the checks whose needs are met.

    Sends a message when a check begins, with its activity, and when it ends, with its findings
    and the facts that it added; and `end=True` after the last.
    """
    for entry in CHECKS:
        if not probe.facts.keys() >= set(entry.needs):
            continue
        send(begin=entry.activity)
        known, findings = set(probe.facts), []
        try:
            # Not a comprehension: findings before an exception count.
            for finding in entry.run(probe) or ():
                findings.append(finding)
        except BaseException as error:  # also SystemExit: the other checks still run
            message = f"{capitalise(entry.activity)} raises {located(error)}"
            remedy = reinstall() if entry.severity == "problem" else ""
            findings.append(Finding(entry.severity, entry.name, message, remedy))
        facts = {name: value for name, value in probe.facts.items() if name not in known}
        send(facts=facts, findings=[vars(finding) for finding in findings])
    send(end=True)


def capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]


REMOVE_TORCHVISION = (
    "Run `pip uninstall torchvision torchaudio torchcodec`, or install builds that match torch"
)


def reinstall() -> str:
    """Return what to do if a part of vLLM raises; a broken torchvision is a common cause."""
    return REMOVE_TORCHVISION if torchvision_error() else "Reinstall vLLM"


@functools.cache
def torchvision_error() -> str:
    """Return why an installed torchvision cannot be imported; empty if it can."""
    try:
        if importlib.util.find_spec("torchvision") is not None:
            importlib.import_module("torchvision")
    except Exception as error:
        return located(error)
    return ""


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
    """Return an exception with file and line in one line of text."""
    described = describe(error)
    text = ": ".join(filter(None, (described["kind"], described["message"])))
    return f"{text} (at {described['where']})" if described["where"] else text
