# SPDX-License-Identifier: Apache-2.0
"""The text of a report: the verdict, the findings, then everything that was checked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vllm_hybrid_kv.patches import SUPPORTED
from vllm_hybrid_kv.tools.doctor.report import Report
from vllm_hybrid_kv.tools.doctor.runner import NAME

LONGEST_REASON = 80
"""Characters. Longer reasons contain whole signatures; `--json` has all of it."""

WIDEST_NAME = 38
"""Characters of a target, so that a row with patch and state fits 80 columns."""

COLOURS = {"problem": "red", "warning": "yellow", "note": "cyan"}


def show(report: Report, console: Console) -> None:
    """Print a report."""
    colour = ("green", "yellow", "red")[report.exit_status]
    console.print(Text(report.verdict, style=f"bold {colour}"))
    for finding in report.findings:
        severity = (finding.severity, f"bold {COLOURS[finding.severity]}")
        console.print(Text.assemble(severity, ": ", sentence(finding.message)))
        if finding.remedy:
            console.print(Padding(Text(sentence(finding.remedy)), (0, 0, 0, 2)))
    for table in _tables(report.to_json()):
        console.print()
        console.print(table)


def sentence(text: str) -> str:
    """End a text with a full stop, unless it ends like a sentence already."""
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _tables(result: dict[str, Any]) -> Iterator[Table]:
    yield _table(("package", "version", ""), _versions(result))
    devices = [(row["name"], row["kernels"] or "none", row["why"]) for row in result["devices"]]
    yield _table(("device", "kernels", "why"), devices)
    if result["settings"]:
        yield _table(("setting", "value", "from", "choices"), _settings(result))
    if result["patches"]:
        table = _table(("patch", "targets", "state"), map(_patch, result["patches"]))
        # Reasons break at words, names must not.
        table.columns[1].min_width = max(
            len(line)
            for patch in result["patches"]
            for edit in patch["edits"]
            for line in _fitting(edit["name"]).splitlines()
        )
        yield table


def _table(headers: Sequence[str], rows: Any) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return table


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


def _patch(patch: dict[str, Any]) -> tuple[RenderableType, ...]:
    edits = patch["edits"]
    if reasons := [_shortened(why, edit["name"]) for edit in edits for why in edit["why"]]:
        state = Text("; ".join(reasons), style="red")
    elif all(edit["active"] for edit in edits):
        state = Text("active", style="green")
    else:
        state = Text("not applied, would fit")
    return patch["name"], ", ".join(_fitting(edit["name"]) for edit in edits), state


def _shortened(reason: str, target: str) -> str:
    reason = reason.replace(target, _short(target))
    return reason if len(reason) <= LONGEST_REASON else f"{reason[: LONGEST_REASON - 3]}..."


def _fitting(target: str) -> str:
    """Return a target without its modules, on two lines if it is too wide for one."""
    short = _short(target)
    return short if len(short) <= WIDEST_NAME else short.replace(".", ".\n")


def _short(target: str) -> str:
    """Return `Class.method` or `function` of a dotted path."""
    parts = target.split(".")
    return ".".join(parts[-2:] if len(parts) > 1 and parts[-2][:1].isupper() else parts[-1:])
