# SPDX-License-Identifier: Apache-2.0
"""What changed in the functions that the plugin patches or relies on."""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conformance.releases import CACHE, REPOSITORY
from tests.drift.release import DriftError, Release
from tests.drift.sources import Sources
from vllm_hybrid_kv.patches import targets
from vllm_hybrid_kv.patches.mechanism import Target

READER = Path(__file__).resolve().parent / "in_process" / "read_release.py"
TIMEOUT_S = 300

SIMILAR = 0.5
"""The share of equal lines above which a function of the same name elsewhere is the same."""

Functions = Mapping[str, dict[str, Any]]


@dataclass(frozen=True)
class Change:
    """What changed in one function.

    Attributes:
        target: The function, with the hash that a supported minor has.
        table: The table that lists it, `PATCHED` or `RELIED_ON`.
        kinds: Any of `moved`, `signature`, `source`, or `gone`; empty if nothing changed.
        place: Where the release has it.
        hash: The hash of its source in the release.
        details: The change in words.
        diff: From the source in the supported minor to that in the release.
    """

    target: Target
    table: str
    kinds: tuple[str, ...] = ()
    place: str = ""
    hash: str | None = None
    details: str = ""
    diff: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """How a release compares with a supported minor.

    Attributes:
        minor: The supported minor.
        release: The version of the release.
        changes: One for each function.
        importers: Modules that import a patched function by name, and did not, or no longer do.
        broken_imports: Names that the plugin imports and the release does not have.
    """

    minor: str
    release: str
    changes: tuple[Change, ...]
    importers: tuple[str, ...] = ()
    broken_imports: tuple[str, ...] = field(default=())

    @property
    def changed(self) -> list[Change]:
        return [change for change in self.changes if change.kinds]

    @property
    def fits(self) -> bool:
        return not self.changed and not self.broken_imports


def read_release(
    release: Release, places: Iterable[str], imports: Iterable[tuple[str, str]] = ()
) -> dict[str, Any]:
    """Import a release in a process of its own, and read functions there.

    Args:
        release: The release.
        places: As in `Target.place`.
        imports: Modules and names whose import is tried.

    Raises:
        DriftError: The release cannot be imported.
    """
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    path = [str(REPOSITORY)]
    if not release.installed:
        path.insert(0, str(release.folder))
        # Keep what vLLM caches about model classes apart from that of the installed release.
        environment["VLLM_CACHE_ROOT"] = str(CACHE / "vllm-drift-cache")
    environment["PYTHONPATH"] = os.pathsep.join(path)
    done = subprocess.run(
        [sys.executable, str(READER)],
        input=json.dumps({"places": sorted(set(places)), "imports": list(imports)}),
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise DriftError(
            f"vLLM {release.version} in {release.folder} cannot be imported: {lines[-1]}. "
            f"It requires torch {release.requirement('torch') or 'of any version'}"
        )
    read: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if Path(read["file"]).resolve().parents[1] != release.folder.resolve():
        raise DriftError(f"instead of the vLLM in {release.folder} Python imported {read['file']}")
    return read


def compare(minor: str, known: Release | None, release: Release) -> Comparison:
    """Compare the functions of a supported minor with those of a release.

    Args:
        minor: The supported minor.
        known: A release of that minor, for diffs; None if there is none here.
        release: The release.

    Raises:
        DriftError: A release cannot be imported.
    """
    sources = Sources(release.folder)
    listed = {
        table: targets.targets_of(minor, getattr(targets, table)).values()
        for table in ("PATCHED", "RELIED_ON")
    }
    everything = [target for table in listed.values() for target in table]
    candidates = {target: [target.place, *_elsewhere(sources, target)] for target in everything}
    imports = Sources(REPOSITORY, "vllm_hybrid_kv").imports_of("vllm")
    read = read_release(
        release, [place for places in candidates.values() for place in places], imports
    )
    before: Functions = {}
    failed_before: set[tuple[str, str]] = set()
    if known is not None:
        places_before = [target.place for target in everything]
        read_before = read_release(known, places_before, imports)
        before = read_before["functions"]
        # Such as an import that needs a GPU.
        failed_before = {
            pair for pair, error in zip(imports, read_before["imports"], strict=True) if error
        }
    changes = tuple(
        _change(target, table, before.get(target.place), candidates[target], read["functions"])
        for table, of_table in listed.items()
        for target in of_table
    )
    importers: tuple[str, ...] = ()
    if known is not None:
        importers = _importers(Sources(known.folder), sources, listed["PATCHED"])
    broken = tuple(
        f"{module}.{name}, imported by {user}: {error}"
        for ((module, name), user), error in zip(imports.items(), read["imports"], strict=True)
        if error is not None and (module, name) not in failed_before
    )
    return Comparison(minor, release.version, changes, importers, broken)


def _elsewhere(sources: Sources, target: Target) -> list[str]:
    """Return the places that define a function or class of the target's name."""
    modules = sources.defining(target.name.partition(".")[0])
    return [f"{module}:{target.name}" for module in modules if module != target.module][:10]


def _change(
    target: Target,
    table: str,
    before: dict[str, Any] | None,
    places: list[str],
    functions: Functions,
) -> Change:
    found = [place for place in places if "hash" in functions[place]]
    if before is not None and "source" in before:
        old = before["source"]
        found = [
            place
            for place in found
            if place == target.place or _similarity(old, functions[place]["source"]) >= SIMILAR
        ]
    if not found:
        return Change(target, table, ("gone",), details=functions[target.place]["error"])
    place = found[0]
    if place != target.place and before is not None and "source" in before:
        place = max(found, key=lambda one: _similarity(before["source"], functions[one]["source"]))
    now = functions[place]
    kinds, details, diff = [], [], ()
    if place != target.place:
        kinds.append("moved")
        details.append(f"moved to {place}")
    if now["hash"] != target.source:
        kinds.append("source")
        details.append(f"hash {target.source} became {now['hash']}")
        if before is not None and "source" in before:
            added = [one for one in now["parameters"] if one not in before["parameters"]]
            removed = [one for one in before["parameters"] if one not in now["parameters"]]
            if added or removed:
                kinds.append("signature")
                details += [f"new parameter {one}" for one in added]
                details += [f"parameter {one} is gone" for one in removed]
            lines = difflib.unified_diff(
                before["source"], now["source"], str(target), place, n=2, lineterm=""
            )
            diff = tuple(lines)
    return Change(target, table, tuple(kinds), place, now["hash"], "; ".join(details), diff)


def _similarity(old: list[str], new: list[str]) -> float:
    return difflib.SequenceMatcher(None, old, new, autojunk=False).ratio()


def _importers(old: Sources, new: Sources, patched: Iterable[Target]) -> tuple[str, ...]:
    lines = []
    for target in patched:
        if "." in target.name:
            continue
        before, after = old.importers(target.name), new.importers(target.name)
        lines += [
            f"new: {module} imports {target.name}, {after[module]}"
            for module in sorted(after)
            if before.get(module) != after[module]
        ]
        lines += [
            f"gone: {module} imported {target.name}"
            for module in sorted(before.keys() - after.keys())
        ]
    return tuple(lines)


def tables_with(comparison: Comparison, minor: str) -> dict[str, targets.Table]:
    """Return the tables with the column of a release, the last or in place of its old one.

    A function that is gone has no hash there, so that the plugin stays inactive.
    """
    minors = [*targets.MINORS, *([] if minor in targets.MINORS else [minor])]
    column = minors.index(minor)
    tables: dict[str, targets.Table] = {}
    for name in ("PATCHED", "RELIED_ON"):
        rows: dict[tuple[str, str], list[str | None]] = {
            (module, function): [*hashes, *[None] * (len(minors) - len(hashes))]
            for module, functions in getattr(targets, name).items()
            for function, hashes in functions.items()
        }
        for row in rows.values():
            row[column] = None
        for change in comparison.changes:
            if change.table == name and change.hash is not None:
                module, _, function = change.place.partition(":")
                rows.setdefault((module, function), [None] * len(minors))[column] = change.hash
        table: dict[str, dict[str, tuple[str | None, ...]]] = {}
        for (module, function), row in sorted(rows.items()):
            table.setdefault(module, {})[function] = tuple(row)
        tables[name] = table
    return tables


def source_with(comparison: Comparison, minor: str) -> str:
    """Return `patches/targets.py` with the column of a release, not yet formatted by ruff."""
    text = Path(targets.__file__).read_text()
    for name, table in tables_with(comparison, minor).items():
        start = text.index(f"{name}: Table = ")
        end = text.index("\n}\n", start) + 3
        text = f"{text[:start]}{name}: Table = {_source(table)}\n{text[end:]}"
    if minor not in targets.MINORS:
        before, after = _quoted(repr(targets.MINORS)), _quoted(repr((*targets.MINORS, minor)))
        text = text.replace(f"MINORS = {before}", f"MINORS = {after}")
    return text


def _source(table: targets.Table) -> str:
    rows = []
    for module, functions in table.items():
        listed = "".join(f'"{name}": {hashes!r},\n' for name, hashes in functions.items())
        rows.append(f'"{module}": {{\n{listed}}},\n')
    return _quoted(f"{{\n{''.join(rows)}}}")


def _quoted(python: str) -> str:
    return python.replace("'", '"')
