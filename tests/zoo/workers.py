# SPDX-License-Identifier: Apache-2.0
"""Runs rows in a process of its own, which a crash or a row without end costs one row."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}


class WorkerError(RuntimeError):
    """A row's process ended, or took too long."""


class Worker:
    """A process that answers lines of text with lines of JSON; started again after a crash.

    Args:
        module: The module to run.
        log: Takes what the process prints.
        timeout: Seconds for a row, and for the start.
        arguments: Of the module.
        wheel: An unpacked release of vLLM instead of the installed one.
    """

    def __init__(
        self, module: str, log: Path, timeout: float, *arguments: str, wheel: Path | None = None
    ) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._log = log
        self._timeout = timeout
        path = [str(wheel)] if wheel else []
        environ = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_HYBRID_KV_")}
        environ["PYTHONPATH"] = os.pathsep.join([*path, str(ROOT)])
        if wheel:
            environ["VLLM_CACHE_ROOT"] = str(wheel.parent / f"{wheel.name}-cache")
        self._environment = {**environ, **ENVIRONMENT}
        self._process: subprocess.Popen[str] | None = None

    def ask(self, line: str) -> Any:
        """Send a line and return the answer.

        Raises:
            WorkerError: The process ended, or the answer took too long.
        """
        if self._process is None:
            with self._log.open("a") as sink:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=sink,
                    text=True,
                    env=self._environment,
                    cwd=ROOT,
                    start_new_session=True,
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
        """End the process and all that it started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def worker(*args: Any, **more: Any) -> Iterator[Worker]:
    """Run a worker as long as it is needed."""
    running = Worker(*args, **more)
    try:
        yield running
    finally:
        running.close()
