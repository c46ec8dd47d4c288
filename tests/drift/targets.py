# SPDX-License-Identifier: Apache-2.0
"""What became of the functions that an adapter rebinds."""

from __future__ import annotations

import ast
import difflib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.conformance.releases import CACHE
from tests.drift.adapters import Adapter
from tests.drift.release import DriftError, Release
from tests.drift.sources import Definition, FunctionNode, Sources
from vllm_hybrid_kv.patches.base import Fingerprint, Target

READER = Path(__file__).resolve().parent / "in_process" / "read_fingerprints.py"
IMPORT_TIMEOUT_S = 300

MOVED, SIGNATURE, BODY, GONE, UNREADABLE = "moved", "signature", "body", "gone", "unreadable"

SIMILAR = 0.5
"""Share of equal lines from which a function of the same name elsewhere is taken for the same."""

_FUNCTIONS = re.compile(r"^(?:async )?def (\w+)", re.MULTILINE)
_CLASSES = re.compile(r"^class (\w+)", re.MULTILINE)

Place = tuple[str, str]


@dataclass(frozen=True)
class Finding:
    """What became of one function.

    Attributes:
        field: Of `Targets`.
        target: What the adapter knows.
        kinds: `moved`, `signature` and `body` in any combination, or `gone`, or `unreadable`;
            empty where all is as known.
        now: The target as it is in the release; None where there is none.
        still_importable: Whether what moved can be imported from where it was.
        came: Parameters that are new, with their defaults.
        went: Parameters that are gone, with their defaults.
        diff: From the known source to that of the release; empty where the known release is not
            at hand.
        nearest: Names that come near, for what is gone.
        error: Why it cannot be read.
    """

    field: str
    target: Target
    kinds: tuple[str, ...]
    now: Target | None = None
    still_importable: bool = False
    came: tuple[str, ...] = ()
    went: tuple[str, ...] = ()
    diff: tuple[str, ...] = ()
    nearest: tuple[str, ...] = ()
    error: str = ""


def fingerprints(release: Release, places: Iterable[Place]) -> dict[Place, Fingerprint | str]:
    """Import a release in a process of its own, and take fingerprints there.

    Args:
        release: The release.
        places: Modules and names in them.

    Returns:
        The fingerprints; a message for what cannot be read.

    Raises:
        DriftError: The release cannot be imported.
    """
    wanted = sorted(set(places))
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if not release.installed:
        environment["PYTHONPATH"] = str(release.folder)
        # What it finds out about model classes would else replace what the installed one found.
        environment["VLLM_CACHE_ROOT"] = str(CACHE / "vllm-drift-cache")
    try:
        done = subprocess.run(
            [sys.executable, str(READER)],
            input=json.dumps(wanted),
            env=environment,
            capture_output=True,
            text=True,
            timeout=IMPORT_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DriftError(f"vLLM in {release.folder}: {error}") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["nothing was said"]
        raise DriftError(
            f"vLLM {release.version} in {release.folder} cannot be imported: {lines[-1]}. "
            f"It asks for torch {release.requirement('torch') or 'as it comes'}"
        )
    read = json.loads(done.stdout.splitlines()[-1])
    if Path(read["file"]).resolve().parents[1] != release.folder.resolve():
        raise DriftError(f"not the vLLM in {release.folder} was imported, but {read['file']}")
    return {
        place: found["error"] if "error" in found else Fingerprint(**found)
        for place, found in zip(wanted, read["fingerprints"], strict=True)
    }


def known_definition(adapter: Adapter, target: Target) -> Definition | None:
    """Return a target's definition in the release that the adapter knows, if at hand."""
    if adapter.known is None:
        return None
    return adapter.known.sources.find(target.module, target.name)


def compare(adapters: Sequence[Adapter], release: Release) -> list[list[Finding]]:
    """Compare every function that adapters rebind with what a release has.

    Args:
        adapters: The adapters.
        release: The release, imported once.

    Returns:
        The findings by adapter, one for each of its targets.

    Raises:
        DriftError: The release cannot be imported.
    """
    sources = release.sources
    located = [
        {
            field: _locate(sources, target, known_definition(adapter, target))
            for field, target in adapter.targets.items()
        }
        for adapter in adapters
    ]
    places = [
        (definition.module, definition.name)
        for found in located
        for definition in found.values()
        if definition is not None
    ]
    read = fingerprints(release, places)
    return [
        [_finding(sources, adapter, field, definition, read) for field, definition in found.items()]
        for adapter, found in zip(adapters, located, strict=True)
    ]


def _finding(
    sources: Sources,
    adapter: Adapter,
    field: str,
    definition: Definition | None,
    read: Mapping[Place, Fingerprint | str],
) -> Finding:
    target = adapter.targets[field]
    known = known_definition(adapter, target)
    if definition is None:
        return Finding(field, target, (GONE,), nearest=_nearest(sources, target))
    place = definition.module, definition.name
    fingerprint = read[place]
    if isinstance(fingerprint, str):
        return Finding(field, target, (UNREADABLE,), error=fingerprint)
    finding = _classify(field, target, Target(*place, fingerprint), known, definition)
    there = sources.find(target.module, target.name)
    return replace(finding, still_importable=MOVED in finding.kinds and there is not None)


def _classify(
    field: str, target: Target, now: Target, known: Definition | None, definition: Definition
) -> Finding:
    before, after = target.fingerprint, now.fingerprint
    kinds = []
    came: list[str] = []
    went: list[str] = []
    if (target.module, target.name) != (now.module, now.name):
        kinds.append(MOVED)
    if before.signature != after.signature:
        kinds.append(SIGNATURE)
        old, new = parameters(before.signature), parameters(after.signature)
        came = [parameter for parameter in new if parameter not in old]
        went = [parameter for parameter in old if parameter not in new]
    if before.source != after.source:
        kinds.append(BODY)
    lines = diff(known, definition) if known is not None and BODY in kinds else ()
    return Finding(field, target, tuple(kinds), now, came=tuple(came), went=tuple(went), diff=lines)


def diff(old: Definition, new: Definition) -> tuple[str, ...]:
    """Return the unified diff of two definitions, without the lines that do not count."""
    lines = difflib.unified_diff(old.lines, new.lines, str(old), str(new), n=2, lineterm="")
    return tuple(lines)


def parameters(signature: str) -> list[str]:
    """Return the parameters of a signature with their defaults.

    Args:
        signature: As in a fingerprint, without annotations.
    """
    try:
        (node,) = ast.parse(f"def function{signature}: pass").body
    except SyntaxError:
        # A default that is no Python, such as <object object at …>.
        return [part.strip() for part in signature.strip("()").split(",")]
    assert isinstance(node, ast.FunctionDef)
    return arguments(node)


def arguments(node: FunctionNode) -> list[str]:
    """Return the parameters of a function with their defaults, without annotations."""
    found = node.args
    positional = [*found.posonlyargs, *found.args]
    defaults = [None] * (len(positional) - len(found.defaults)) + list(found.defaults)
    named = [*zip(positional, defaults, strict=True)]
    listed = [_argument(argument.arg, default) for argument, default in named]
    if found.vararg is not None:
        listed.append(f"*{found.vararg.arg}")
    elif found.kwonlyargs:
        listed.append("*")
    listed += [
        _argument(argument.arg, default)
        for argument, default in zip(found.kwonlyargs, found.kw_defaults, strict=True)
    ]
    return [*listed, *([f"**{found.kwarg.arg}"] if found.kwarg is not None else [])]


def _argument(name: str, default: ast.expr | None) -> str:
    return name if default is None else f"{name}={ast.unparse(default)}"


def similarity(old: Definition, new: Definition) -> float:
    """Return the share of equal lines, from 0 to 1."""
    return difflib.SequenceMatcher(None, old.lines, new.lines, autojunk=False).ratio()


def elsewhere(sources: Sources, name: str, known: Definition | None) -> list[Definition]:
    """Return the functions or classes of a name anywhere in a release, the likeliest first.

    Args:
        sources: The release's.
        name: Of a function or a class.
        known: What it was; None where that is not at hand.
    """
    pattern = re.compile(rf"^(?:(?:async )?def|class) ({re.escape(name)})\b", re.MULTILINE)
    found = [
        definition
        for module in sources.matching(pattern).get(name, ())
        if (definition := sources.find(module, name)) is not None and definition.module == module
    ]
    if known is not None:
        found.sort(key=lambda definition: -similarity(known, definition))
    return found


def _locate(sources: Sources, target: Target, known: Definition | None) -> Definition | None:
    """Find a target where it was, where that imports it from, or by its name."""
    found = sources.find(target.module, target.name)
    if found is not None:
        return found
    class_name, _, method = target.name.rpartition(".")
    if class_name:
        owners = elsewhere(sources, class_name, None)
        members = [sources.members(owner).get(method) for owner in owners]
        candidates = [member for member in members if member is not None]
    else:
        candidates = elsewhere(sources, target.name, known)
    if known is not None:
        candidates = [one for one in candidates if similarity(known, one) >= SIMILAR]
    return candidates[0] if candidates else None


def _nearest(sources: Sources, target: Target) -> tuple[str, ...]:
    """Return what may have become of a target: names that are alike, each with its module."""
    class_name, _, name = target.name.rpartition(".")
    owner = sources.find(target.module, class_name) if class_name else None
    if owner is not None:
        members = sources.members(owner)
        return tuple(
            str(members[near]) for near in difflib.get_close_matches(name, members, 3, 0.6)
        )
    there = sources.matching(_CLASSES if class_name else _FUNCTIONS)
    close = difflib.get_close_matches(class_name or name, there, 3, 0.7)
    return tuple(f"{module}.{near}" for near in close for module in there[near][:2])
