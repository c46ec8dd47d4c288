# SPDX-License-Identifier: Apache-2.0
"""Find what a release changed in the functions that the plugin patches or relies on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.drift.release import Release
from vllm_hybrid_kv.patches import targets
from vllm_hybrid_kv.patches.mechanism import Target, source_hash, source_of

TABLES = ("PATCHED", "RELIED_ON", "OFFLOADING")

SIMILAR = 0.5
"""If a function of the same name in another module is at least this similar, it counts as moved."""


@dataclass(frozen=True)
class Found:
    """A function of a supported minor, compared with another release.

    Attributes:
        target: The function, with its hash in the supported minor.
        table: The table that lists it, one of `TABLES`.
        module: The release's module that defines it; None if the function is gone.
        hash: The hash of its source in the release.
        diff: The lines of a diff from the supported minor to the release.
    """

    target: Target
    table: str
    module: str | None = None
    hash: str | None = None
    diff: Sequence[str] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """Either `gone`, or any of `moved` and `changed`; empty if the function is unchanged."""
        if self.module is None:
            return ("gone",)
        moved, changed = self.module != self.target.module, self.hash != self.target.source
        return (*["moved"] * moved, *["changed"] * changed)

    def report(self) -> str:
        """Describe the change in a line, followed by the diff."""
        place = f" to {self.module}" if "moved" in self.kinds else ""
        head = f"{self.target} ({self.table}): {' and '.join(self.kinds)}{place}"
        return "\n".join([head, *self.diff])


def compare(minor: str, known: Release | None, release: Release) -> list[Found]:
    """Look up every function of a supported minor in another release.

    Args:
        minor: The supported minor.
        known: A release of that minor to make diffs from; without it there are no diffs.
        release: The other release.
    """
    return [
        _find(target, table, known, release)
        for table in TABLES
        for target in targets.targets_of(minor, getattr(targets, table)).values()
    ]


def _find(target: Target, table: str, known: Release | None, release: Release) -> Found:
    before = known and known.code(target.module, target.name)
    old = source_of(before).splitlines() if before else []
    module, now = target.module, release.code(target.module, target.name)
    if now is None:
        similarities = {}
        for module in release.modules_that_define(target.name.partition(".")[0]):
            if (code := release.code(module, target.name)) is not None:
                new = source_of(code).splitlines()
                similarity = difflib.SequenceMatcher(None, old, new, autojunk=False).ratio()
                similarities[similarity if old else 1.0] = module, code
        best = max(similarities, default=0.0)
        if best < SIMILAR:
            return Found(target, table)
        module, now = similarities[best]
    new = source_of(now).splitlines()
    diff = difflib.unified_diff(old, new, str(target), f"{module}.{target.name}", n=2, lineterm="")
    return Found(target, table, module, source_hash(now), [*diff] if old else [])


def source_with(found: Sequence[Found], minor: str) -> str:
    """Return the source of `targets.py` with the hashes of a release added, not yet formatted.

    A function that is gone gets no hash, so the plugin stays inactive with that release.
    """
    minors = tuple(dict.fromkeys([*targets.MINORS, minor]))
    column = minors.index(minor)
    text = Path(targets.__file__).read_text()
    text = re.sub(r"(?m)^MINORS = .*", f"MINORS = {minors!r}", text)
    for name in TABLES:
        rows = {
            (module, function): [*hashes, None][: len(minors)]
            for module, functions in getattr(targets, name).items()
            for function, hashes in functions.items()
        }
        for row in rows.values():
            row[column] = None
        for one in found:
            if one.table == name and one.module is not None:
                row = rows.setdefault((one.module, one.target.name), [None] * len(minors))
                row[column] = one.hash
        table: dict[str, dict[str, tuple[str | None, ...]]] = {}
        for (module, function), row in sorted(rows.items()):
            table.setdefault(module, {})[function] = tuple(row)
        text = re.sub(rf"(?ms)^{name}: Table = .*?^}}\n", f"{name}: Table = {table!r}\n", text)
    return text
