# SPDX-License-Identifier: Apache-2.0
"""Run the checks in a child process, and make the JSON document and the text."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from rich.text import Text

from vllm_hybrid_kv.patches.mechanism import CHECKED
from vllm_hybrid_kv.patches.targets import SUPPORTED
from vllm_hybrid_kv.tools.child import Child
from vllm_hybrid_kv.tools.doctor.checks import FOLDER
from vllm_hybrid_kv.tools.doctor.devices import cpu_device
from vllm_hybrid_kv.tools.doctor.runner import EXIT_STATUS, NAME, Facts, Finding, finding
from vllm_hybrid_kv.tools.output import Table, counted
from vllm_hybrid_kv.version import __version__

SCHEMA = 2
"""The JSON document's version. It grows if a key is removed or changes its meaning.

2: `patches` replaces `seams`, with `active` instead of `in_force`; 0.3 removes the old keys.
"""

FIRST = ("vllm", "version", "process")
"""Findings of these checks come first within a severity, because they may cause others."""

LONGEST_REASON = 160
"""Longer reasons (some have signatures) are cut in the text. The JSON document has them whole."""

COLOURS = {"problem": "red", "warning": "yellow", "note": "cyan"}


def diagnose(additional_config: str = "", timeout: float = 180.0) -> dict[str, Any]:
    """Check this environment, and return the JSON document. The timeout is in seconds."""
    with tempfile.TemporaryDirectory(prefix="vllm-hybrid-kv-doctor-") as folder:
        with Child(
            *("vllm_hybrid_kv.tools.doctor.runner:run", additional_config),
            log=Path(folder) / "log",
            timeout=timeout,
        ) as child:
            messages = list(child.messages())
        return read(messages, child.problem, child.last_output())


def read(
    messages: Iterable[dict[str, Any]], ending: str | None = None, output: Sequence[str] = ()
) -> dict[str, Any]:
    """Make the document from the messages of a child process that may have ended early.

    `ending` says how the child failed, if it did; `output` has the last lines that it printed.
    """
    unknown = {**cpu_device(), "why": "unknown, because an earlier check failed"}
    facts: Facts = {"devices": [unknown]}
    findings: list[Finding] = []
    activity: str | None = "Starting Python"
    for message in messages:
        activity = None if "end" in message else message.get("begin", activity)
        facts.update(message.get("facts", {}))
        findings += message.get("findings", ())
    if activity is not None:
        remedy = (
            "Allow more time with --timeout"
            if (ending or "").startswith("took ")
            else "Reinstall the package that is named, in a build for this machine"
        )
        said = f"; its last output is: {output[-1]}" if output else ""
        reason = f"{activity} {ending or 'ended with exit status 0'}{said}"
        findings.append(finding("problem", "process", reason, remedy))
    findings.sort(key=lambda one: (-EXIT_STATUS[one["severity"]], one["check"] not in FIRST))
    return document(findings, facts)


def document(findings: list[Finding], facts: Facts) -> dict[str, Any]:
    """Make the JSON document, which docs/doctor.schema.json describes. The worst finding is first.

    The exit status is 0 if all is well, 1 with warnings, 2 if the plugin cannot be active.
    """
    status = max((EXIT_STATUS[one["severity"]] for one in findings), default=0)
    vllm, patches = facts.get("vllm", {}), facts.get("patches", [])
    edits = [edit for patch in patches for edit in patch["edits"]]
    active = bool(edits and not facts["foreign"] and all(edit["active"] for edit in edits))
    severity = {2: "problem", 1: "warning", 0: ""}[status]
    count = sum(one["severity"] == severity for one in findings)
    result = f"{count} {severity}{'' if count == 1 else 's'}" if status else "all is well"
    device = facts.get("platform", {}).get("device") or "no device"
    on = f"on vLLM {vllm.get('version')} ({device})"
    if status == 2:
        state = "cannot be active here"
    else:
        state = f"is active {on}" if active else f"would work {on} but is not loaded"
    return {
        "schema": SCHEMA,
        "exit_status": status,
        "active": active,
        "verdict": f"{NAME} {__version__} {state}: {result}.",
        "findings": findings,
        "versions": {
            "vllm_hybrid_kv": __version__,
            "vllm": vllm.get("version"),
            "vllm_supported": SUPPORTED,
            "vllm_fits": "minor" in facts if vllm else None,
            **{
                name: next((one.version for one in distributions(name=name)), None)
                for name in ("torch", "numba")
            },
            **facts.get("torch", {"cuda": None, "hip": None}),
            "python": platform.python_version(),
        },
        "folders": {"vllm_hybrid_kv": FOLDER, "vllm": vllm.get("folder")},
        "vllm_plugins": facts.get("vllm_plugins"),
        "devices": facts["devices"],
        "settings": facts.get("settings", []),
        "strategies": facts.get("strategies", []),
        "patches": patches,
        "seams": [
            {
                **patch,
                "edits": [
                    {"name": edit["name"], "in_force": edit["active"], "why": edit["why"]}
                    for edit in patch["edits"]
                ],
            }
            for patch in patches
        ],
        "plugins": facts.get("plugins", []),
    }


def text(document: dict[str, Any]) -> Iterator[Text | Table]:
    """Yield the lines and tables to print: the verdict, the findings, then everything checked."""
    style = ("bold green", "bold yellow", "bold red")[document["exit_status"]]
    yield Text(document["verdict"], style=style)
    for one in document["findings"]:
        yield Text.assemble(
            (one["severity"], f"bold {COLOURS[one['severity']]}"), ": ", _sentence(one["message"])
        )
        if one["remedy"]:
            yield Text(f"  {_sentence(one['remedy'])}")
    yield Table("", ("package", "version", "details"), list(_versions(document)))
    yield Table(
        "",
        ("device", "kernels", "why"),
        [(row["name"], row["kernels"] or "none", row["why"]) for row in document["devices"]],
    )
    if document["settings"]:
        yield Table("", ("setting", "value", "from", "choices"), list(_settings(document)))
    if document["patches"]:
        yield Table("", ("patch", "target", "state"), list(_patches(document)))
        for patch in document["patches"]:
            for reason in (reason for edit in patch["edits"] for reason in edit["why"]):
                yield Text(textwrap.shorten(reason, LONGEST_REASON, placeholder="..."))


def _sentence(text: str) -> str:
    """End a text with a full stop, unless it ends like a sentence already."""
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _versions(document: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    versions, folders = document["versions"], document["folders"]
    fits = {True: "fits; ", False: "does not fit; ", None: ""}[versions["vllm_fits"]]
    yield (
        "vllm-hybrid-kv",
        versions["vllm_hybrid_kv"],
        f"in {os.path.dirname(folders['vllm_hybrid_kv'])}",
    )
    yield "vLLM", versions["vllm"] or "none", f"{fits}supported: {SUPPORTED}"
    if folders["vllm"]:
        yield "", "", f"in {os.path.dirname(folders['vllm'])}"
    yield "torch", versions["torch"] or "none", f"Python {versions['python']}"
    others = [
        f"{row['name']} ({row['package']})"
        + ("" if row["state"] == "loaded" else f" {row['state']}")
        for row in document["plugins"]
        if row["name"] != NAME and row["state"] is not None
    ]
    if others:
        yield "other plugins", str(len(others)), ", ".join(others)


def _settings(document: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    packages = {
        (row["setting"], row["name"]): f"{row['name']} ({row['origin']})"
        for row in document["strategies"]
        if row["origin"] != "built in"
    }
    for row in document["settings"]:
        choices = [packages.get((row["name"], choice), choice) for choice in row["choices"]]
        value = json.dumps(row["value"]).strip('"')
        yield row["name"], value, row["source"], ", ".join(choices)


def _patches(document: dict[str, Any]) -> Iterator[tuple[str, str, Text]]:
    for patch in document["patches"]:
        name, unchanged = patch["name"], 0
        for edit in patch["edits"]:
            if edit["name"].endswith(CHECKED) and edit["active"]:
                unchanged += 1
                continue
            state = ("active", "green") if edit["active"] else ("would fit", "yellow")
            state = ("failed", "red") if edit["why"] else state
            yield name, _short(edit["name"]), Text(*state)
            name = ""
        if unchanged:
            words = f"{counted(unchanged, 'function')} that it relies on"
            yield name, words, Text("unchanged", "green")


def _short(target: str) -> str:
    """Return `Class.method` or `function` of a dotted path."""
    parts = target.split(".")
    return ".".join(parts[-2:] if len(parts) > 1 and parts[-2][:1].isupper() else parts[-1:])
