# SPDX-License-Identifier: Apache-2.0
"""A run: an engine for each cache, one after another, each in a process of its own.

A process may run one engine only: what vLLM compiles and patches is the process's. A run that was
interrupted goes on behind the last sequence that was scored.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_hybrid_kv.settings import environment_name
from vllm_hybrid_kv.tools.eval.errors import EvaluationError, SubjectError
from vllm_hybrid_kv.tools.eval.folder import FACTS, Folder, Scored, read_scores
from vllm_hybrid_kv.tools.eval.subjects import Subject

# The folder that a command is started in is not on its path, and is on that of `python -c`.
_CODE = (
    "import sys; sys.path[:] = [folder for folder in sys.path if folder]; "
    "from vllm_hybrid_kv.tools.eval.child import main; main(sys.argv[1], sys.argv[2])"
)

DEFAULTS = {
    "max_num_batched_tokens": 512,
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "seed": 0,
}
"""Arguments of vLLM's that a user may change: chunks bound the logits that are in memory at once,
and compiling takes longer than a run gains."""

FIXED = {"max_num_seqs": 1, "enable_prefix_caching": False, "disable_log_stats": True}
"""Those that the recorder depends on: one request at a time, and every token computed."""

RESERVED = (
    *FIXED,
    *("model", "kv_cache_dtype", "max_model_len", "additional_config", "worker_extension_cls"),
    "speculative_config",
)

ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    # One sequence at a time needs little, and vLLM else takes a share of all memory.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # The engine in the process itself: it starts faster, and ends with it.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
"""What a process gets where the user has not set it."""


@dataclass(frozen=True)
class Measured:
    """One cache's scores.

    Attributes:
        subject: The cache.
        facts: What its engine said of itself.
        scored: By sequence.
    """

    subject: Subject
    facts: Mapping[str, Any]
    scored: Sequence[Scored]


class Run:
    """An evaluation of several caches of one model, in a folder."""

    def __init__(
        self,
        folder: Folder,
        model: str,
        sequences: Sequence[Sequence[int]],
        engine: Mapping[str, Any],
    ) -> None:
        """Prepare a run.

        Args:
            folder: Opened for it.
            model: A folder, or a name on the hub.
            sequences: The tokens of each.
            engine: Further arguments of vLLM's `LLM`.
        """
        self._folder = folder
        self._sequences = [list(sequence) for sequence in sequences]
        self._engine = {
            **DEFAULTS,
            **engine,
            **FIXED,
            "model": model,
            # A prompt of that length, and the one token that vLLM has to answer.
            "max_model_len": max(map(len, self._sequences)) + 1,
        }

    def measure(
        self, subject: Subject, reference: Subject, scored: Callable[[int], None]
    ) -> Measured:
        """Score all sequences with one cache, or those that are not scored yet.

        Args:
            subject: The cache.
            reference: The one to compare with, measured before, or the same.
            scored: Is told how many sequences are scored, whenever one is.

        Raises:
            SubjectError: Its engine does not start or ends.
            EvaluationError: The folder cannot be written.
        """
        try:
            folder, states = self._folder.of(subject.name), self._folder.of(reference.name)
            files = [folder / f"{number:05}.npz" for number in range(len(self._sequences))]
            kept = [states / f"{number:05}.safetensors" for number in range(len(self._sequences))]
            keep = subject == reference
            pending = [
                number
                for number in range(len(files))
                if self._read(files[number], number) is None or (keep and not kept[number].exists())
            ]
            scored(len(files) - len(pending))
            if pending or not (folder / FACTS).exists():
                job = {
                    "engine": self._engine,
                    "kv_cache_dtype": subject.kv_cache_dtype,
                    "settings": dict(subject.settings),
                    "sequences": self._sequences,
                    "pending": pending,
                    "scores": list(map(str, files)),
                    "states": list(map(str, kept)),
                    "keep": keep,
                }
                self._work(subject, folder, job, len(files) - len(pending), scored)
            facts = json.loads((folder / FACTS).read_text())
        except OSError as error:
            raise EvaluationError(f"{self._folder.path}: {error.strerror or error}") from None
        found = [self._read(file, number) for number, file in enumerate(files)]
        if any(one is None for one in found):
            raise EvaluationError(f"{folder} has lost scores meanwhile; start again")
        return Measured(subject, facts, [one for one in found if one is not None])

    def _read(self, file: Path, number: int) -> Scored | None:
        return read_scores(file, len(self._sequences[number]) - 1)

    def _work(
        self,
        subject: Subject,
        folder: Path,
        job: Mapping[str, Any],
        done: int,
        scored: Callable[[int], None],
    ) -> None:
        """Run an engine, and follow what it says."""
        job_file, log = folder / "job.json", folder / "log.txt"
        job_file.write_text(json.dumps(job))
        process, lines = _start(job_file, log, _environment(subject))
        problem = None
        try:
            with lines:
                for line in lines:
                    said = json.loads(line)
                    if "facts" in said:
                        (folder / FACTS).write_text(json.dumps(said["facts"]) + "\n")
                    elif "done" in said:
                        done += 1
                        scored(done)
                    else:
                        problem = said["error"]
            status = process.wait()
        finally:
            _end(process)
        if problem is not None:
            raise SubjectError(f"{problem} (all of it is in {log})")
        if status:
            how = f"exit status {status}" if status > 0 else signal.Signals(-status).name
            raise SubjectError(f"its engine ended with {how} (what it printed is in {log})")


def _start(
    job: Path, log: Path, environment: dict[str, str]
) -> tuple[subprocess.Popen[bytes], Any]:
    read, write = os.pipe()
    with log.open("wb") as sink, os.fdopen(write, "wb"):
        process = subprocess.Popen(
            [sys.executable, "-c", _CODE, str(job), str(write)],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            pass_fds=[write],
            env=environment,
            start_new_session=True,
        )
    return process, os.fdopen(read, encoding="utf-8")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process with its workers, which are of its group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment(subject: Subject) -> dict[str, str]:
    environment = {**ENVIRONMENT, **os.environ}
    for setting in subject.settings:
        # It would win over what the subject says.
        environment.pop(environment_name(setting), None)
    return environment
