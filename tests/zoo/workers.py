# SPDX-License-Identifier: Apache-2.0
"""Compute rows of the zoo's tables in a child process, so that a crash or hang costs one row."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from testing.processes import kill_group, start_group

ROOT = Path(__file__).resolve().parents[2]

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
}


class WorkerError(RuntimeError):
    """The child process ended or took too long, so there is no row."""


class Worker:
    """A child process that answers lines of text with JSON. `ask` restarts it after a failure.

    Args:
        module: The module to run.
        log: The file for the process's output.
        timeout: How many seconds an answer may take, including the start of the process.
        arguments: Command-line arguments of the module.
        wheel: An unpacked release of vLLM to use instead of the installed one.
    """

    def __init__(
        self, module: str, log: Path, timeout: float, *arguments: str, wheel: Path | None = None
    ) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._log = log
        self._timeout = timeout
        self._environment: dict[str, str | None] = {
            **{name: None for name in os.environ if name.startswith("VLLM_HYBRID_KV_")},
            **ENVIRONMENT,
            "PYTHONPATH": os.pathsep.join([*([str(wheel)] if wheel else []), str(ROOT)]),
        }
        if wheel:
            self._environment["VLLM_CACHE_ROOT"] = str(wheel.parent / f"{wheel.name}-cache")
        self._process: subprocess.Popen[str] | None = None

    def ask(self, line: str) -> Any:
        """Send a line and return the answer.

        Raises:
            WorkerError: The process ended, or the answer took too long.
        """
        if self._process is None:
            self._process = start_group(
                self._command,
                self._log,
                self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            ready, _, _ = select.select([self._process.stdout], [], [], self._timeout)
            answer = self._process.stdout.readline() if ready else None
        except BrokenPipeError:
            answer = ""
        if answer:
            return json.loads(answer)
        self.close()
        raise WorkerError(
            f"no answer in {self._timeout:.0f} s" if answer is None else "the process ended"
        )

    def close(self) -> None:
        """Kill the process and its children."""
        if self._process is not None:
            kill_group(self._process)
            self._process = None


def answer_lines(start: Callable[[], None], answer: Callable[[str], Any]) -> None:
    """In the child, answer each line of stdin with JSON. All other output goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    start()
    for line in sys.stdin:
        print(json.dumps(answer(line.strip())), file=answers, flush=True)
