# SPDX-License-Identifier: Apache-2.0
"""A `vllm serve` process: started, waited for, read, and always shut down."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # GiB for the KV cache: a small model on a small machine.
    "VLLM_CPU_KVCACHE_SPACE": "1",
}

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 60.0


class ServerError(RuntimeError):
    """The server did not start, or ended by itself. Carries the end of its log."""


class Server:
    """`vllm serve` on a free local port, as a context manager.

    Args:
        model: Folder of the model.
        log: File that takes the server's output.
        arguments: Beside the model and the port, as on the command line.
    """

    def __init__(self, model: Path, log: Path, arguments: list[str]) -> None:
        self.port = _free_port()
        self.log = log
        self._command = [
            *(str(Path(sys.executable).with_name("vllm")), "serve", str(model)),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *arguments,
        ]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The server's address, without a path."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Server:
        """Start the process; it is not ready yet, see `wait`."""
        with self.log.open("wb") as sink:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**ENVIRONMENT, **os.environ},
                # A group of its own, so that its children can be found when it is gone.
                start_new_session=True,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the server and whatever it started."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
        with contextlib.suppress(ProcessLookupError):  # nothing was left behind
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def wait(self, progress: Callable[[float, str], None]) -> None:
        """Return when the server answers.

        Args:
            progress: Called twice a second with the seconds so far and the last log line.

        Raises:
            ServerError: The server ended, or did not answer within `START_TIMEOUT_S`.
        """
        begin = time.monotonic()
        while not self._answers():
            seconds = time.monotonic() - begin
            if self._process is None or self._process.poll() is not None:
                raise ServerError(f"vllm serve ended while starting\n{self.tail()}")
            if seconds > START_TIMEOUT_S:
                raise ServerError(f"no answer within {START_TIMEOUT_S:.0f} s\n{self.tail()}")
            progress(seconds, last_message(self.log))
            time.sleep(0.5)

    def text(self, path: str) -> str:
        """Return what the server answers under a path, such as `/metrics`."""
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            content: bytes = answer.read()
        return content.decode()

    def tail(self, lines: int = 40) -> str:
        """Return the end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _answers(self) -> bool:
        try:
            self.text("/health")
        except OSError:
            return False
        return True


def last_message(log: Path) -> str:
    """Return the last line of a vLLM log without its time, place and process."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return re.sub(r"^.*?\] ", "", lines[-1]) if lines else "starting Python"


def find_line(log: Path, pattern: str) -> re.Match[str]:
    """Return the last match of a pattern in a log.

    Raises:
        ServerError: There is none.
    """
    found = None
    for line in log.read_text(errors="replace").splitlines():
        found = re.search(pattern, line) or found
    if found is None:
        raise ServerError(f"{log} has no line with {pattern!r}")
    return found


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port
