# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: what it is a run of, and the scores so far.

run.json                 what scores depend on; another run may not go on here
lock                     held by the process that works here
<cache>/00000.npz        scores of a sequence; there or not there, never half
<cache>/facts.json       what its engine said of itself
<cache>/log.txt          what its engine printed
<reference>/00000.safetensors
                         hidden states of the reference
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from vllm_hybrid_kv.tools.eval.errors import EvaluationError

RUN = "run.json"
LOCK = "lock"
FACTS = "facts.json"


@dataclass(frozen=True)
class Scored:
    """The scores of one sequence by position, as arrays; see `scores.Scores`.

    Position 0 is the prediction from one token.
    """

    logprobs: numpy.ndarray
    divergences: numpy.ndarray
    agreements: numpy.ndarray


def write_scores(file: Path, scored: Scored) -> None:
    """Write the scores of a sequence, all or nothing."""
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    with partial.open("wb") as sink:
        numpy.savez(
            sink,
            logprobs=scored.logprobs,
            divergences=scored.divergences,
            agreements=scored.agreements,
        )
    partial.replace(file)


def read_scores(file: Path, positions: int) -> Scored | None:
    """Return the scores of a sequence, or None where they are not there or not whole.

    Args:
        file: Their file.
        positions: How many there must be.
    """
    try:
        with numpy.load(file) as arrays:
            scored = Scored(arrays["logprobs"], arrays["divergences"], arrays["agreements"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    shapes = {scored.logprobs.shape, scored.divergences.shape, scored.agreements.shape}
    return scored if shapes == {(positions,)} else None


class Folder:
    """A run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def opened(self, identity: Mapping[str, Any]) -> Iterator[None]:
        """Work here, alone, on the run that these are of.

        Args:
            identity: What scores depend on, as JSON has it.

        Raises:
            EvaluationError: It is another run's, somebody works here, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / LOCK).open("w")
        except OSError as error:
            raise EvaluationError(
                f"{self.path}: {error.strerror}; give a folder that can be written with --work"
            ) from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise EvaluationError(
                    f"{self.path}: another evaluation works there; wait for it, or give another "
                    "folder with --work"
                ) from None
            self._claim(identity)
            yield

    def _claim(self, identity: Mapping[str, Any]) -> None:
        file = self.path / RUN
        if not file.exists():
            partial = file.with_name(f"{RUN}.{os.getpid()}")
            partial.write_text(json.dumps(identity, indent=1) + "\n")
            partial.replace(file)
            return
        try:
            there = json.loads(file.read_text())
        except ValueError:
            there = None
        if not isinstance(there, dict):
            raise EvaluationError(f"{file} is not an evaluation's; give another folder with --work")
        differs = [
            name
            for name in {**there, **identity}
            if there.get(name) != json.loads(json.dumps(identity.get(name)))
        ]
        if differs:
            raise EvaluationError(
                f"{self.path} has another evaluation: {', '.join(differs)} differ"
                f"{'s' if len(differs) == 1 else ''}; give another folder with --work, or remove it"
            )

    def of(self, subject: str) -> Path:
        """Return the folder of a cache, by its name; made if it is not there."""
        plain = re.sub(r"[^\w.=-]+", "_", subject).strip("_")
        if plain != subject:
            plain += f"_{hashlib.sha256(subject.encode()).hexdigest()[:6]}"
        folder = self.path / plain
        folder.mkdir(exist_ok=True)
        return folder


def digest(value: Any) -> str:
    """Return the SHA-256 of a value as JSON has it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def model_identity(model: str) -> dict[str, Any]:
    """Return what a model is known by: its files with sizes and times, or its name on the hub."""
    folder = Path(model)
    if not folder.is_dir():
        return {"name": model}
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return {
        "name": str(folder.resolve()),
        "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
    }
