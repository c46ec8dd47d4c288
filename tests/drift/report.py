# SPDX-License-Identifier: Apache-2.0
"""What a comparison found, for people and for machines."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.drift import proposal
from tests.drift.adapter_tests import Outcome
from tests.drift.comparison import Comparison
from tests.drift.release import Release
from tests.drift.targets import BODY, GONE, MOVED, SIGNATURE, UNREADABLE

DIFF_LINES = 40
"""Lines of a diff that are printed; `--json` has all of them."""

KINDS = (MOVED, SIGNATURE, BODY, GONE, UNREADABLE)


def print_report(
    console: Console,
    chosen: Comparison,
    all_of_them: Sequence[Comparison],
    outcome: Outcome | None,
) -> None:
    """Print what was found.

    Args:
        console: Where to.
        chosen: The adapter that is told of in full.
        all_of_them: Every adapter.
        outcome: Of the tests; None where they were not run.
    """
    _print_release(console, chosen.release)
    _print_adapters(console, all_of_them)
    for one in all_of_them:
        _print_list(console, f"What {one.adapter.name} needs", one.steps())
    _print_diffs(console, chosen)
    _print_names(console, chosen)
    _print_surroundings(console, chosen)
    _print_fields(console, chosen)
    if outcome is not None:
        _print_tests(console, chosen, outcome)
    _say(console, verdict(chosen, outcome))


def fits(chosen: Comparison, outcome: Outcome | None) -> bool:
    """Whether an adapter can be used as it is, and its tests passed if they were run."""
    return chosen.fits and (outcome is None or outcome.fits)


def verdict(chosen: Comparison, outcome: Outcome | None) -> str:
    """Return what it comes to, in one line."""
    release, name = chosen.release.version, chosen.adapter.name
    tests = ""
    if outcome is not None:
        tests = " and the tests pass" if outcome.fits else ", but its tests do not pass"
    if chosen.fits:
        return f"{name} fits vLLM {release}{tests}."
    count = len(chosen.moved)
    return (
        f"{name} and vLLM {release}: {count} of {len(chosen.findings)} functions "
        f"are not as it knows them, {len(chosen.broken)} other names break."
    )


def as_json(
    chosen: Comparison, all_of_them: Sequence[Comparison], outcome: Outcome | None
) -> dict[str, Any]:
    """Return everything for machines."""
    release = chosen.release
    return {
        "vllm": release.version,
        "folder": str(release.folder),
        "requires": {
            "python": release.metadata.get("Requires-Python", [""])[0],
            "torch": release.requirement("torch"),
        },
        "fits": fits(chosen, outcome),
        "adapter": chosen.adapter.name,
        "verdict": verdict(chosen, outcome),
        "adapters": {
            one.adapter.name: {
                "known": one.adapter.known.version if one.adapter.known else None,
                "fits": one.fits if one is chosen else not one.moved,
                "steps": list(one.steps()),
                "findings": [asdict(finding) for finding in one.findings],
            }
            for one in all_of_them
        },
        "names": [asdict(change) for change in chosen.names],
        "surroundings": asdict(chosen.surroundings) if chosen.surroundings else None,
        "proposed": chosen.proposed(),
        "tests": asdict(outcome) if outcome is not None else None,
    }


def _say(console: Console, text: str, **style: Any) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True, **style)


def _head(console: Console, text: str) -> None:
    _say(console, f"\n{text}", style="bold")


def _print_list(console: Console, head: str, lines: Iterable[str]) -> None:
    listed = list(lines)
    if listed:
        _head(console, head)
        for line in listed:
            _say(console, f"* {line}")


def _print_release(console: Console, release: Release) -> None:
    _say(console, f"vLLM {release.version} in {release.folder}")
    python = release.metadata.get("Requires-Python", ["any"])[0]
    _say(console, f"asks for Python {python}, here is {platform.python_version()}")
    torch = release.requirement("torch")
    try:
        here = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        here = "none"
    _say(console, f"asks for torch {torch or 'as it comes'}, here is {here}")


def _print_adapters(console: Console, all_of_them: Sequence[Comparison]) -> None:
    table = Table()
    for column in ("adapter", "knows"):
        table.add_column(column)
    for column in ("as known", *KINDS):
        table.add_column(column, justify="right")
    for one in all_of_them:
        known = one.adapter.known
        table.add_row(
            one.adapter.name,
            known.version if known is not None else "not at hand",
            f"{len(one.findings) - len(one.moved)} of {len(one.findings)}",
            *(str(one.count(kind) or "") for kind in KINDS),
        )
    console.print(table)


def _print_diffs(console: Console, chosen: Comparison) -> None:
    if chosen.moved and chosen.adapter.known is None:
        minor = "{}.{}".format(*chosen.adapter.minor)
        _say(console, f"\nNo diffs: vLLM {minor} is not at hand, neither installed nor in .cache/")
    for finding in chosen.moved:
        if not finding.diff:
            continue
        _head(console, f"{finding.field}: {finding.target}")
        for line in finding.diff[:DIFF_LINES]:
            _say(console, line, style={"+": "green", "-": "red"}.get(line[:1]))
        if len(finding.diff) > DIFF_LINES:
            _say(console, f"… {len(finding.diff) - DIFF_LINES} more lines in --json")


def _print_names(console: Console, chosen: Comparison) -> None:
    changed = [change for change in chosen.names if not change.breaks]
    _print_list(
        console,
        "Used by the plugin and changed, to be read (diffs in --json)",
        (f"{change.kind}: {change.name} ({change.detail})" for change in changed),
    )


def _print_surroundings(console: Console, chosen: Comparison) -> None:
    around = chosen.surroundings
    if around is None:
        return
    _print_list(console, "Who imports what is rebound", around.holders)
    _print_list(console, "Who checks for classes that the plugin derives from", around.class_checks)
    _print_list(console, "Ways in that vLLM gives to others", around.ways_in)
    _print_list(
        console,
        "Relied on, to be read",
        (
            f"{change.kind}: {change.name} ({change.detail}), {change.used_in[0]}"
            for change in around.watched
        ),
    )
    _print_list(console, "Requirements", around.requirements)


def _print_fields(console: Console, chosen: Comparison) -> None:
    fields = [finding for finding in chosen.moved if finding.now is not None]
    if fields:
        _head(console, "For TARGETS of the adapter (--adapter FILE writes all of it)")
        for finding in fields:
            _say(console, proposal.field_source(finding).rstrip("\n"))


def _print_tests(console: Console, chosen: Comparison, outcome: Outcome) -> None:
    which = f"{chosen.adapter.name} with these fields" if chosen.moved else chosen.adapter.name
    _head(
        console,
        f"Tests with {which}: {outcome.passed} passed, {len(outcome.failed)} failed, "
        f"{outcome.skipped} skipped",
    )
    for test, why in outcome.failed.items():
        _say(console, f"* {test}: {why}")
