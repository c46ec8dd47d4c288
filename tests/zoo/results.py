# SPDX-License-Identifier: Apache-2.0
"""The zoo's results as they are committed, written after every row."""

from __future__ import annotations

import fcntl
import hashlib
import json
from pathlib import Path
from typing import Any

from tests.zoo.workers import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "zoo.json"


def sources() -> str:
    """Return a fingerprint of the code that rows depend on."""
    digest = hashlib.sha256()
    for folder in ("vllm_hybrid_kv", "kernels", "tests/zoo"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name not in ("report.py", "results.py", "test_zoo.py"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Results:
    """Rows by table and name; see `sources` for when a row is done.

    Args:
        path: The file, which need not be there.
        keep: Whether rows of other sources are done, too.
    """

    def __init__(self, path: Path = RESULTS, keep: bool = False) -> None:
        self._path = path
        self._keep = keep
        self._sources = sources()
        self.tables: dict[str, dict[str, Any]] = {"plans": {}, "engines": {}}
        if path.exists():
            self.tables.update(json.loads(path.read_text()))

    def done(self, table: str, name: str) -> bool:
        """Return whether a row need not be made again."""
        row = self.tables[table].get(name)
        return row is not None and (self._keep or row["sources"] == self._sources)

    def put(self, table: str, name: str, row: dict[str, Any]) -> None:
        """Add a row and write the file."""
        lock = ROOT / ".cache" / "zoo.lock"
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            if self._path.exists():
                # Another process may have added rows meanwhile.
                self.tables.update(json.loads(self._path.read_text()))
            self.tables[table][name] = {**row, "sources": self._sources}
            ordered = {key: dict(sorted(rows.items())) for key, rows in self.tables.items()}
            self._path.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")
