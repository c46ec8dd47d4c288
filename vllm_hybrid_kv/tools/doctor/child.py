# SPDX-License-Identifier: Apache-2.0
"""Runs the checks in a child process and reads what it reported."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vllm_hybrid_kv.tools.doctor.report import Report
from vllm_hybrid_kv.tools.doctor.runner import EXIT_STATUS, Finding, problem

# `python -c` puts the current folder on the path, `vllm` does not: a server would not import a
# checkout of vLLM in that folder.
_CODE = (
    "import sys; sys.path[:] = [folder for folder in sys.path if folder]; "
    "from vllm_hybrid_kv.tools.doctor.runner import main; main(sys.argv[1], sys.argv[2])"
)

FIRST = ("vllm", "version", "process")
"""These come before findings of the same severity, because they may cause others."""

_FRAME = re.compile(r'^  File "(.+)", line (\d+)', re.MULTILINE)


def diagnose(additional_config: str = "", timeout: float = 180.0) -> Report:
    """Check this environment.

    Args:
        additional_config: JSON for vLLM's `--additional-config`; empty for none.
        timeout: Seconds after which the child process is killed.
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
            finally:
                # With the processes that it started.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return read(report.read_text(), printed.read_text(errors="replace"), status, timeout)


def read(report: str, output: str, status: int | None, timeout: float) -> Report:
    """Return the report of a child process that may have ended early.

    Args:
        report: The lines of `runner.run_checks`; the last line may be incomplete.
        output: What the process printed.
        status: Exit status; negative for a signal, None after a timeout.
        timeout: Seconds.
    """
    facts: dict[str, Any] = {}
    findings: list[Finding] = []
    activity: str | None = "starting Python"
    for line in report.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            break
        activity = None if "end" in entry else entry.get("begin", activity)
        facts.update(entry.get("facts", {}))
        findings += (Finding(**finding) for finding in entry.get("findings", ()))
    if activity is not None:
        findings.append(_early_end(activity, output, status, timeout))
    findings.sort(key=lambda finding: (-EXIT_STATUS[finding.severity], finding.check not in FIRST))
    return Report(findings, facts)


def _early_end(activity: str, output: str, status: int | None, timeout: float) -> Finding:
    message = activity[0].upper() + activity[1:]
    remedy = "Reinstall the package that is named, in a build for this machine"
    if status is None:
        message += f" took more than {timeout:g} s"
        remedy = "Allow more time with --timeout"
    elif status >= 0:
        message += f" ended the process with exit status {status}"
    else:
        names = {number.value: number.name for number in signal.Signals}
        message += f" ended the process with {names.get(-status, f'signal {-status}')}"
        _, fatal, stack = output.partition("Fatal Python error")
        if fatal and (frame := _FRAME.search(stack)):
            message += f" at {frame[1]}:{frame[2]}"
    if lines := [line for line in output.splitlines() if line.strip()]:
        message += f"; its last output is: {lines[-1]}"
    return problem("process", message, remedy)
