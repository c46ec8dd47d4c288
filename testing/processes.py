# SPDX-License-Identifier: Apache-2.0
"""Run child processes in process groups of their own, so that no grandchild outlives a test."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

KILL_TIMEOUT_S = 30.0
POLL_S = 0.1

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment variables that stop vLLM from using the network."""


class ProcessError(RuntimeError):
    """A child process failed to start, to answer or to stop.

    Attributes:
        log: The file that shows why, if there is one.
    """

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message)
        self.log = log


def start_group(
    command: Sequence[str | Path],
    log: Path,
    environment: Mapping[str, str | None] | None = None,
    **options: Any,
) -> subprocess.Popen[Any]:
    """Start a process in a new session, which Ctrl-C does not reach, with its output in a log.

    `environment` changes `os.environ` and `OFFLINE`; None removes a variable. `options` are further
    arguments of `subprocess.Popen`.
    """
    changed = {**os.environ, **OFFLINE, **(environment or {})}
    environ = {name: value for name, value in changed.items() if value is not None}
    with log.open("ab") as sink:
        default = {"stdin": subprocess.DEVNULL, "stdout": sink, "stderr": sink}
        return subprocess.Popen(
            command, env=environ, start_new_session=True, **{**default, **options}
        )


def run(
    command: Sequence[object],
    *,
    timeout_s: float = 300.0,
    cwd: Path | None = None,
    without: tuple[str, ...] = (),
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run a command and return its status and output.

    The command gets `os.environ`, changed by `environment`, but no variables whose names begin with
    one of the prefixes `without`.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(without)}
    return subprocess.run(
        [str(word) for word in command], env={**kept, **environment}, cwd=cwd, timeout=timeout_s,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def kill_group(process: subprocess.Popen[Any]) -> None:
    """Kill a process that `start_group` started and everything in its process group.

    Raises:
        ProcessError: A process of the group still runs after `KILL_TIMEOUT_S`.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if not group_ends(process.pid, KILL_TIMEOUT_S):
        raise ProcessError(f"process group {process.pid} survived SIGKILL")


def group_members(group: int) -> list[psutil.Process]:
    """Return the running processes of a group, without zombies."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def group_ends(group: int, timeout_s: float) -> bool:
    """Wait until no process of a group runs. Returns False after the timeout."""
    return wait_until(lambda: not group_members(group), timeout_s)


def wait_until(done: Callable[[], bool], timeout_s: float) -> bool:
    """Poll until `done()` is true. Returns False after the timeout."""
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True
