# SPDX-License-Identifier: Apache-2.0
"""The text of a report: the verdict, the findings, then everything that was checked."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from typing import Any

from rich.text import Text

from vllm_hybrid_kv.patches.mechanism import CHECKED
from vllm_hybrid_kv.patches.targets import SUPPORTED
from vllm_hybrid_kv.tools.doctor.report import Report
from vllm_hybrid_kv.tools.doctor.runner import NAME
from vllm_hybrid_kv.tools.output import Table

LONGEST_REASON = 160
"""Characters. Longer reasons contain whole signatures; `--json` has all of it."""

COLOURS = {"problem": "red", "warning": "yellow", "note": "cyan"}


def text(report: Report) -> Iterator[Text | Table]:
    """Yield the lines and tables to print."""
    colour = ("green", "yellow", "red")[report.exit_status]
    yield Text(report.verdict, style=f"bold {colour}")
    for finding in report.findings:
        severity = (finding.severity, f"bold {COLOURS[finding.severity]}")
        yield Text.assemble(severity, ": ", sentence(finding.message))
        if finding.remedy:
            yield Text(f"  {sentence(finding.remedy)}")
    result = report.to_json()
    yield Table("", ("package", "version", "details"), list(_versions(result)))
    devices = [(row["name"], row["kernels"] or "none", row["why"]) for row in result["devices"]]
    yield Table("", ("device", "kernels", "why"), devices)
    if result["settings"]:
        yield Table("", ("setting", "value", "from", "choices"), list(_settings(result)))
    if result["patches"]:
        yield Table("", ("patch", "target", "state"), list(_patches(result)))
        for patch in result["patches"]:
            for reason in (reason for edit in patch["edits"] for reason in edit["why"]):
                yield Text(textwrap.shorten(reason, LONGEST_REASON, placeholder="..."))


def sentence(text: str) -> str:
    """End a text with a full stop, unless it ends like a sentence already."""
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _versions(result: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    versions, folders = result["versions"], result["folders"]
    fits = {True: "fits; ", False: "does not fit; ", None: ""}[versions["vllm_fits"]]
    yield "vllm-hybrid-kv", versions["vllm_hybrid_kv"], _parent(folders["vllm_hybrid_kv"])
    yield "vLLM", versions["vllm"] or "none", f"{fits}supported: {SUPPORTED}"
    if folders["vllm"]:
        yield "", "", _parent(folders["vllm"])
    yield "torch", versions["torch"] or "none", f"Python {versions['python']}"
    others = [
        f"{row['name']} ({row['package']})"
        + ("" if row["state"] == "loaded" else f" {row['state']}")
        for row in result["plugins"]
        if row["name"] != NAME and row["state"] is not None
    ]
    if others:
        yield "other plugins", str(len(others)), ", ".join(others)


def _parent(folder: str) -> str:
    return f"in {os.path.dirname(folder)}"


def _settings(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    origins = {(row["setting"], row["name"]): row["origin"] for row in result["strategies"]}
    for row in result["settings"]:
        choices = []
        for choice in row["choices"]:
            origin = origins.get((row["name"], choice), "built in")
            choices.append(choice if origin == "built in" else f"{choice} ({origin})")
        value = str(row["value"])
        value = value.lower() if isinstance(row["value"], bool) else value
        yield row["name"], value, row["source"], ", ".join(choices)


def _patches(result: dict[str, Any]) -> Iterator[tuple[str, str, Text]]:
    for patch in result["patches"]:
        name, unchanged = patch["name"], 0
        for edit in patch["edits"]:
            if edit["name"].endswith(CHECKED) and edit["active"]:
                unchanged += 1
                continue
            state = ("would fit", "yellow")
            if edit["why"]:
                state = ("failed", "red")
            elif edit["active"]:
                state = ("active", "green")
            yield name, short(edit["name"]), Text(*state)
            name = ""
        if unchanged:
            yield name, f"{unchanged} functions that it relies on", Text("unchanged", "green")


def short(target: str) -> str:
    """Return `Class.method` or `function` of a dotted path."""
    parts = target.split(".")
    return ".".join(parts[-2:] if len(parts) > 1 and parts[-2][:1].isupper() else parts[-1:])
