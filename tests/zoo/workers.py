# SPDX-License-Identifier: Apache-2.0
"""Compute rows of the zoo's tables in a child process, so that a crash or hang costs one row."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from testing.engine_host import EngineError, EngineHost

ROOT = Path(__file__).resolve().parents[2]


class Worker:
    """A child process that computes one row at a time. `ask` restarts it after a failure.

    Args:
        module: The module to run. It executes the command `answer`.
        log: The file for the process's output.
        timeout: How many seconds an answer may take, including the start of the process.
        environment: Environment variables to change.
    """

    def __init__(self, module: str, log: Path, timeout: float, **environment: str) -> None:
        outer = (name for name in os.environ if name.startswith("VLLM_HYBRID_KV_"))
        self._environment: dict[str, str | None] = {**dict.fromkeys(outer), **environment}
        self._arguments = log, timeout, module
        self._host: EngineHost | None = None

    def ask(self, name: str) -> Any:
        """Return the row of an architecture.

        Raises:
            EngineError: The process ended, or the answer took too long.
        """
        if self._host is None:
            self._host = EngineHost(*self._arguments, **self._environment)
        try:
            return self._host.call("answer", name)
        except EngineError:
            self.close()
            raise

    def close(self) -> None:
        """End the process and its children."""
        if self._host is not None:
            self._host.close()
            self._host = None
