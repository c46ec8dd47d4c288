# SPDX-License-Identifier: Apache-2.0
"""Keep the zoo's results in a committed file, which gets each row as soon as it is computed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tests.zoo.workers import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "zoo.json"

SOURCES = ("vllm_hybrid_kv", "kernels", "tests/zoo", "testing/engine_*.py")
"""The code that rows depend on. `kernels` is listed because globs do not follow the link
`vllm_hybrid_kv/kernels`."""

WITHOUT_EFFECT = ("tools/doctor", "tools/eval", "report.py", "results.py", "test_zoo.py")


def sources() -> str:
    """Return a hash of the code that rows depend on, to find rows of older code."""
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern if pattern.endswith(".py") else f"{pattern}/**/*.py")):
            if not any(part in path.as_posix() for part in WITHOUT_EFFECT):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Results:
    """The rows of both tables, by architecture.

    Args:
        path: The file, which may not exist yet.
        keep: Whether rows that older code computed count as up to date.
    """

    def __init__(self, path: Path = RESULTS, keep: bool = False) -> None:
        self._path = path
        self._keep = keep
        self._sources = sources()
        self.tables: dict[str, dict[str, Any]] = {"plans": {}, "engines": {}}
        if path.exists():
            self.tables.update(json.loads(path.read_text()))

    def done(self, table: str, name: str) -> bool:
        """Return whether a row exists and is up to date."""
        row = self.tables[table].get(name)
        return row is not None and (self._keep or row["sources"] == self._sources)

    def put(self, table: str, name: str, row: dict[str, Any]) -> None:
        self.tables[table][name] = {**row, "sources": self._sources}
        self._path.write_text(as_lines(self.tables))


def as_lines(tables: dict[str, dict[str, Any]]) -> str:
    """Format the tables as JSON with one row per line, so that a diff shows changed rows."""
    texts = []
    for name, rows in tables.items():
        row_lines = (
            f"  {json.dumps(key)}: {json.dumps(row, ensure_ascii=False)}"
            for key, row in sorted(rows.items())
        )
        texts.append(f" {json.dumps(name)}: {{\n" + ",\n".join(row_lines) + "\n }")
    return "{\n" + ",\n".join(texts) + "\n}\n"
