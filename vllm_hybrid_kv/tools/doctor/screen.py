# SPDX-License-Identifier: Apache-2.0
"""The doctor's screen: the verdict, what to know, then everything that was looked at."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vllm_hybrid_kv.patches import SUPPORTED
from vllm_hybrid_kv.tools.doctor.diagnosis import Diagnosis
from vllm_hybrid_kv.tools.doctor.findings import Finding, Severity

LONGEST_REASON = 80
"""Characters. Whole signatures fill the screen and say no more."""

WIDEST_NAME = 38
"""Characters of a name beside its patch and its state on a screen of 80 columns."""

COLOURS = {Severity.PROBLEM: "red", Severity.WARNING: "yellow", Severity.NOTE: "cyan"}


def show(diagnosis: Diagnosis, console: Console) -> None:
    """Print a diagnosis."""
    colour = ("green", "yellow", "red")[diagnosis.exit_status]
    console.print(Text(diagnosis.verdict, style=f"bold {colour}"))
    for finding in diagnosis.findings:
        console.print(_finding(finding))
    for table in _tables(diagnosis):
        console.print()
        console.print(table)


def _finding(finding: Finding) -> RenderableType:
    line = Text.assemble(
        (finding.severity.value, f"bold {COLOURS[finding.severity]}"), f": {finding.message}."
    )
    parts: list[RenderableType] = [line]
    if finding.remedy:
        parts.append(Padding(Text(f"{finding.remedy}."), (0, 0, 0, 2)))
    return Group(*parts)


def _tables(diagnosis: Diagnosis) -> Iterator[Table]:
    yield _versions(diagnosis)
    yield _table(
        ("device", "kernels", "why"),
        [
            (Text(device.name), device.kernels or "none", Text(device.why))
            for device in diagnosis.devices
        ],
    )
    if diagnosis.settings:
        yield _settings(diagnosis)
    if diagnosis.patches:
        yield _patches(diagnosis)


def _table(headers: Sequence[str], rows: Sequence[Sequence[RenderableType]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    for header in headers:
        # Long words break rather than vanish.
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _versions(diagnosis: Diagnosis) -> Table:
    found = diagnosis.as_json()
    versions, folders = found["versions"], found["folders"]
    fits = {True: "fits; ", False: "does not fit; ", None: ""}[versions["vllm_fits"]]
    others = [
        f"{row['name']} ({row['package']})"
        + (f" {row['state']}" if row["state"] != "loaded" else "")
        for row in diagnosis.plugins
        if row["name"] != "hybrid_kv" and row["state"] is not None
    ]
    rows = [
        ("vllm-hybrid-kv", versions["vllm_hybrid_kv"], _site(folders["vllm_hybrid_kv"])),
        ("vLLM", versions["vllm"] or "none", f"{fits}supported: {SUPPORTED}"),
        ("", "", _site(folders["vllm"])),
        ("torch", versions["torch"] or "none", f"Python {versions['python']}"),
    ]
    if others:
        rows.append(("other plugins", str(len(others)), ", ".join(others)))
    return _table(("package", "version", ""), [tuple(map(Text, row)) for row in rows if any(row)])


def _site(folder: str | None) -> str:
    """Return the folder on `sys.path` that a package lies in."""
    return f"in {os.path.dirname(folder)}" if folder else ""


def _settings(diagnosis: Diagnosis) -> Table:
    origin = {(row["setting"], row["name"]): row["origin"] for row in diagnosis.strategies}
    rows = []
    for row in diagnosis.settings:
        choices = []
        for choice in row["choices"]:
            who = origin.get((row["name"], choice), "built in")
            choices.append(choice if who == "built in" else f"{choice} ({who})")
        value = str(row["value"])
        value = value.lower() if isinstance(row["value"], bool) else value
        rows.append(
            tuple(Text(cell) for cell in (row["name"], value, row["source"], ", ".join(choices)))
        )
    return _table(("setting", "value", "from", "choices"), rows)


def _patches(diagnosis: Diagnosis) -> Table:
    rows: list[tuple[RenderableType, ...]] = []
    for patch in diagnosis.patches:
        edits = patch["edits"]
        reasons = [_cut(reason, edit["name"]) for edit in edits for reason in edit["why"]]
        if reasons:
            state = Text("; ".join(reasons), style="red")
        elif all(edit["in_force"] for edit in edits):
            state = Text("in force, verified", style="green")
        else:
            state = Text("not applied, would fit")
        names = ", ".join(_fitting(edit["name"]) for edit in edits)
        rows.append((Text(patch["name"]), Text(names), state))
    table = _table(("patch", "rebinds", "state"), rows)
    # Reasons are the longest, and break at words; names do not.
    table.columns[1].min_width = max(
        len(line)
        for patch in diagnosis.patches
        for edit in patch["edits"]
        for line in _fitting(edit["name"]).splitlines()
    )
    return table


def _cut(reason: str, name: str) -> str:
    """Return a reason as far as it says what is wrong; `--json` has all of it."""
    reason = reason.replace(name, _short(name))
    return reason if len(reason) <= LONGEST_REASON else f"{reason[: LONGEST_REASON - 3]}..."


def _fitting(name: str) -> str:
    """Return the name without its modules, on two lines where it is too wide for one."""
    short = _short(name)
    return short if len(short) <= WIDEST_NAME else short.replace(".", ".\n")


def _short(name: str) -> str:
    """Return a function's or method's name without its modules."""
    parts = name.split(".")
    return ".".join(parts[-2:] if len(parts) > 1 and parts[-2][:1].isupper() else parts[-1:])
