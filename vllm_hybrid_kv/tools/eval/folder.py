# SPDX-License-Identifier: Apache-2.0
"""The folder of a run, from which an interrupted run continues.

run.json                      what the scores depend on; another run cannot use the folder
lock                          locked by the process that uses the folder
<cache>/scores.jsonl          lines {"facts": ...} and {"number": 0, "scores": ...}
<cache>/log.txt               the output of its engine
<reference>/00000.safetensors hidden states of the reference
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_hybrid_kv.tools.output import ToolError


class Folder:
    """A run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def opened(self, identity: Mapping[str, Any]) -> Iterator[None]:
        """Lock the folder for a run.

        Args:
            identity: What the scores of the run depend on, as JSON.

        Raises:
            ToolError: It belongs to another run, another process uses it, or it is read-only.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "lock").open("w")
        except OSError as error:
            raise ToolError(
                f"{self.path}: {error.strerror}; choose a writable folder with --work"
            ) from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ToolError(
                    f"{self.path}: another evaluation uses this folder; wait for it, or choose "
                    "another folder with --work"
                ) from None
            self._check_identity(json.loads(json.dumps(identity)))
            yield

    def _check_identity(self, identity: dict[str, Any]) -> None:
        file = self.path / "run.json"
        if not file.exists():
            file.write_text(json.dumps(identity, indent=1) + "\n")
            return
        try:
            stored = dict(json.loads(file.read_text()))
        except (ValueError, TypeError):
            raise ToolError(
                f"{file} does not belong to an evaluation; choose another folder with --work"
            ) from None
        differs = [
            name for name in {**stored, **identity} if stored.get(name) != identity.get(name)
        ]
        if differs:
            raise ToolError(
                f"{self.path} belongs to an evaluation with another {', '.join(differs)}; choose "
                "another folder with --work, or remove it"
            )

    def of(self, cache: str) -> Path:
        """Return the folder of a cache by the cache's name, and make it."""
        plain = re.sub(r"[^\w.=-]+", "_", cache).strip("_")
        if plain != cache:
            plain += f"_{hashlib.sha256(cache.encode()).hexdigest()[:6]}"
        folder = self.path / plain
        folder.mkdir(exist_ok=True)
        return folder


def digest(value: Any) -> str:
    """Return the SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def model_identity(model: str) -> dict[str, Any]:
    """Return the files of a model's folder with sizes and times, or its name on the hub."""
    folder = Path(model)
    if not folder.is_dir():
        return {"name": model}
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return {
        "name": str(folder.resolve()),
        "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
    }
