# SPDX-License-Identifier: Apache-2.0
"""Starts the process in which vLLM is imported, and makes sense of its end.

The process reports stage by stage, a line of JSON each, so that what it found stands whatever
ends it afterwards.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The folder that a process is started in is on the path of `python -c` and not on that of a
# command such as `vllm`: a checkout of vLLM in it is not what a server would import.
_CODE = (
    "import sys; sys.path[:] = [folder for folder in sys.path if folder]; "
    "from vllm_hybrid_kv.tools.doctor.probe import main; main(sys.argv[1], sys.argv[2])"
)

_FAULT = re.compile(r'^  File "(.+)", line (\d+)', re.MULTILINE)


@dataclass(frozen=True)
class Error:
    """What a stage raised.

    Attributes:
        kind: The name of the exception's class.
        message: What it says.
        missing: The module that was not found, or empty.
        where: File and line.
    """

    kind: str
    message: str
    missing: str
    where: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}" if self.message else self.kind


@dataclass(frozen=True)
class Answer:
    """What the process reported.

    Attributes:
        found: What each stage found, by the stage's name.
        errors: What stages raised.
        unfinished: The stage in which the process ended before it was done, or None.
        ended: How it ended then, in words.
        output: The last lines of what it printed.
    """

    found: Mapping[str, Any]
    errors: Mapping[str, Error]
    unfinished: str | None
    ended: str
    output: tuple[str, ...]


def ask(additional_config: str, timeout: float) -> Answer:
    """Ask vLLM in a process of its own.

    Args:
        additional_config: JSON, as vLLM's `--additional-config`; empty for none.
        timeout: Seconds after which the process is ended.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-hybrid-kv-doctor-") as folder:
        report, printed = Path(folder) / "report", Path(folder) / "output"
        report.touch()
        with printed.open("wb") as output:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-X", "faulthandler", "-c", _CODE),
                    *(str(report), additional_config),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status: int | None = process.wait(timeout)
            except subprocess.TimeoutExpired:
                status = None
                _kill(process)
            except BaseException:
                _kill(process)
                raise
        return read(report.read_text(), printed.read_text(errors="replace"), status, timeout)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process with what it started, which has its group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read(report: str, output: str, status: int | None, timeout: float) -> Answer:
    """Make an answer of a report.

    Args:
        report: Lines of JSON; the last may be cut.
        output: What the process printed.
        status: Its exit status, negative for a signal, None where it took too long.
        timeout: Seconds that it had.
    """
    found: dict[str, Any] = {}
    errors: dict[str, Error] = {}
    stage, finished = "start", False
    for line in report.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if "begin" in entry:
            stage = entry["begin"]
        elif "found" in entry:
            found[entry["stage"]] = entry["found"]
        elif "error" in entry:
            errors[entry["stage"]] = Error(**entry["error"])
        else:
            finished = True
    lines = tuple(line for line in output.splitlines() if line.strip())[-5:]
    if finished:
        return Answer(found, errors, None, "", lines)
    return Answer(found, errors, stage, _end(status, timeout, output), lines)


def _end(status: int | None, timeout: float, output: str) -> str:
    if status is None:
        return f"took more than {timeout:g} s"
    if status >= 0:
        return f"ended the process with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    _, fatal, stack = output.partition("Fatal Python error")
    frame = _FAULT.search(stack) if fatal else None
    where = f" at {frame[1]}:{frame[2]}" if frame else ""
    return f"ended the process with {name}{where}"
