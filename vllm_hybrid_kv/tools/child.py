# SPDX-License-Identifier: Apache-2.0
"""Run a function in a child process, and read the messages that the function sends.

The function gets a callable that sends messages, followed by the arguments from the parent:

    with Child("vllm_hybrid_kv.tools.eval.engine:score", job_file, log=log, timeout=60) as child:
        for message in child.messages():         # dicts, while the child runs
            ...
    if child.problem:                            # None if it finished
        raise ToolError(f"{child.problem}; its output is in {log}")

    def score(send, job_file): send(done=3)      # in the child

The output of the child and its libraries goes to the log. At the end of the `with` block, or after
the timeout, every process of the child's process group is killed.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import pkgutil
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# `python -c` puts the current folder on the path, but the command `vllm` does not. Remove the
# folder, so that the child imports the same vLLM as a server.
_CODE = (
    "import sys; sys.path[:] = [folder for folder in sys.path if folder]; "
    "from vllm_hybrid_kv.tools.child import run; run(*sys.argv[1:])"
)

_FAULT = re.compile(r'Fatal Python error.*?^  File "(.+?)", line (\d+)', re.MULTILINE | re.DOTALL)

_POLL_S = 0.2


class Child:
    """A Python process that runs one function; use it in a `with` block.

    Args:
        function: `module:name`.
        arguments: Arguments of the function, after the one that sends messages.
        log: The file for the child's output.
        timeout: Seconds until the child is killed; None for no limit.
        environment: The child's whole environment; None for this process's.

    Attributes:
        problem: Set when `messages` ends: why the child failed, in one line; None if it did not.
    """

    def __init__(
        self,
        function: str,
        *arguments: str,
        log: Path,
        timeout: float | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.problem: str | None = None
        self._log = log
        self._timeout = math.inf if timeout is None else timeout
        self._ends_at = time.monotonic() + self._timeout
        self._pipe, sender = multiprocessing.Pipe(duplex=False)
        with log.open("wb") as sink, sender:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-X", "faulthandler", "-c", _CODE),
                    *(str(sender.fileno()), function, *arguments),
                ],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                pass_fds=[sender.fileno()],
                env=environment,
                start_new_session=True,
            )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill_group()
        self._pipe.close()

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yield the messages as they arrive, until the child ends; then set `problem`."""
        error: str | None = None
        for message in self._received():
            if "uncaught" in message:
                error = message["uncaught"]
            else:
                yield message
        try:
            status = self._process.wait(max(self._ends_at - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            self._kill_group()
            self.problem = f"took more than {self._timeout:g} s"
        else:
            self.problem = error or self._ending(status)

    def _received(self) -> Iterator[dict[str, Any]]:
        """Yield messages until the pipe closes, the child ends or the time is up."""
        while (left := self._ends_at - time.monotonic()) > 0:
            # A process that the child forked may hold the pipe open after the child's end.
            ended = self._process.poll() is not None
            if self._pipe.poll(0 if ended else min(left, _POLL_S)):
                try:
                    yield json.loads(self._pipe.recv_bytes())
                except EOFError:
                    return
            elif ended:
                return

    def last_output(self, lines: int = 5) -> tuple[str, ...]:
        """Return the last lines that the child printed, without empty ones."""
        printed = self._log.read_text(errors="replace").splitlines()
        return tuple(line for line in printed if line.strip())[-lines:]

    def _ending(self, status: int) -> str | None:
        if status >= 0:
            return f"ended with exit status {status}" if status else None
        fault = _FAULT.search(self._log.read_text(errors="replace"))
        place = f" at {fault[1]}:{fault[2]}" if fault else ""
        return f"ended with {signal.Signals(-status).name}{place}"

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def run(pipe: str, function: str, *arguments: str) -> None:
    """Run a function in the child; see `Child` for the arguments."""
    status = 1
    with Connection(int(pipe), readable=False) as messages:

        def send(**fields: Any) -> None:
            messages.send_bytes(json.dumps(fields).encode())

        try:
            pkgutil.resolve_name(function)(send, *arguments)
            status = 0
        except BaseException as error:  # vLLM may end its process with SystemExit.
            traceback.print_exc()
            send(uncaught=_describe(error))
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads that vLLM leaves running would keep the process from ending.
    os._exit(status)


def _describe(error: BaseException) -> str:
    """Format an error as one line. Omit its class if the plugin wrote the message for users."""
    message = " ".join(str(error).split())
    if isinstance(error, ValueError | SystemExit) and message:
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
