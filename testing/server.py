# SPDX-License-Identifier: Apache-2.0
"""A `vllm serve` process that cannot outlive the block it was started in."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import psutil
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

START_TIMEOUT_S = 300.0
"""A small model is served within a minute on two cores; a busy machine may take longer."""

STOP_TIMEOUT_S = 30.0
"""How long a server may take to end its requests and its processes."""

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
"""The demo's model and tokenizer are local, and 1 GiB of KV cache is plenty for them."""

STAGES = (
    ("Initializing a V1 LLM engine", "starting the engine"),
    ("Starting to load model", "loading the model"),
    ("Loading weights took", "planning the KV cache"),
    ("KV cache size", "warming up"),
    ("Starting vLLM server", "opening the port"),
)
"""What in the server's log says how far it has come."""


class ServerError(RuntimeError):
    """A process of the demo did not start, or did not stop.

    Attributes:
        log: File that says why, if it is not the server's own.
    """

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message)
        self.log = log


class Server:
    """A running `vllm serve`.

    Attributes:
        url: Where it listens, such as http://127.0.0.1:8000.
        log: File with everything its processes print.
    """

    def __init__(self, model: Path, arguments: Sequence[str], log: Path) -> None:
        """Start the process; use `serve` instead, which also waits and stops it.

        Args:
            model: Folder of the model.
            arguments: Further arguments of `vllm serve`.
            log: Where its output goes.
        """
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        # One for all questions whether it is there yet: each new client reads the certificates.
        self._client = httpx.Client(timeout=2.0)
        vllm = Path(sys.executable).with_name("vllm")
        self._process = start_group(
            [vllm, "serve", model, "--host", "127.0.0.1", "--port", str(port), *arguments], log
        )

    @property
    def group(self) -> int:
        """The process group that all processes of the server are in."""
        return self._process.pid

    def wait(self, console: Console, watch: Callable[[], None]) -> float:
        """Wait until it answers, showing how far it has come.

        Args:
            console: Where to show it.
            watch: Called while waiting; raises what ends the wait.

        Returns:
            Seconds waited.

        Raises:
            ServerError: It ended, or did not answer within `START_TIMEOUT_S`.
        """
        began = time.monotonic()
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("starting vllm serve", total=None)
            shown = ""
            while not self._answers():
                watch()
                if self._process.poll() is not None:
                    raise ServerError(f"vllm serve ended with status {self._process.returncode}")
                if time.monotonic() - began > START_TIMEOUT_S:
                    raise ServerError(f"vllm serve was not ready in {START_TIMEOUT_S:.0f} s")
                stage = self._stage()
                progress.update(task, description=f"vllm serve: {stage}")
                if stage != shown and not console.is_terminal:
                    console.print(f"  {time.monotonic() - began:3.0f} s  {stage}")
                shown = stage
                time.sleep(0.3)
        return time.monotonic() - began

    def find_in_log(self, pattern: str) -> str:
        """Return what the first group of a pattern matches in the log.

        Raises:
            ServerError: Nothing in the log matches.
        """
        found = re.search(pattern, self._read_log())
        if found is None:
            raise ServerError(f"nothing in {self.log} matches {pattern!r}")
        return found.group(1)

    def log_tail(self, lines: int = 40) -> str:
        """Return the last lines of the log."""
        return "\n".join(self._read_log().splitlines()[-lines:])

    def stop(self) -> float:
        """End all processes of the server, if need be by force.

        Returns:
            Seconds that it took.

        Raises:
            ServerError: It had to be forced, or a process is left even so.
        """
        began = time.monotonic()
        group = self.group
        try:
            self._client.close()
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)
            # Its children end a moment after it.
            forced = not _wait_for_group(group, began + STOP_TIMEOUT_S)
        finally:
            # Reached by a second Ctrl-C as well.
            kill_group(self._process)
        if forced:
            raise ServerError(f"vllm serve did not stop within {STOP_TIMEOUT_S:.0f} s: killed")
        return time.monotonic() - began

    def _answers(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self._client.get(f"{self.url}/health").status_code == httpx.codes.OK
        return False

    def _stage(self) -> str:
        log = self._read_log()
        reached = [stage for mark, stage in STAGES if mark in log]
        return reached[-1] if reached else "importing vLLM"

    def _read_log(self) -> str:
        return self.log.read_text(errors="replace")


@contextlib.contextmanager
def serve(
    model: Path,
    arguments: Sequence[str],
    log: Path,
    console: Console,
    watch: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Server, float]]:
    """Serve a model for the length of a `with` block.

    Args:
        model: Folder of the model.
        arguments: Further arguments of `vllm serve`.
        log: Where its output goes.
        console: Where to show progress.
        watch: Called while the server starts; raises what is to stop it.

    Yields:
        The server once it answers, and the seconds that took.

    Raises:
        ServerError: It did not start, or had to be killed at the end of a block that went well.
    """
    server = Server(model, arguments, log)
    try:
        yield server, server.wait(console, watch)
    except BaseException:
        # Whatever went wrong is what is to be reported.
        with contextlib.suppress(ServerError):
            server.stop()
        raise
    seconds = server.stop()
    console.print(f"Server stopped in {seconds:.1f} s; none of its processes is left.")


def start_group(
    command: Sequence[str | Path], log: Path, **environ: str
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, which Ctrl-C does not reach.

    Args:
        command: What to run.
        log: Where its output goes.
        environ: Variables beside our own and `ENVIRONMENT`.

    Raises:
        KeyboardInterrupt: Ctrl-C came meanwhile; the process is ended.
    """
    interrupts: list[int] = []
    # An exception between its start and our knowing of it would leave the process behind.
    handlers = {
        number: signal.signal(number, lambda number, frame: interrupts.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command,
                env={**os.environ, **ENVIRONMENT, **environ},
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if interrupts:
        kill_group(process)
        raise KeyboardInterrupt
    return process


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and all others of the session that was started with it, by force.

    Raises:
        ServerError: One of them is left.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if not _wait_for_group(process.pid, time.monotonic() + STOP_TIMEOUT_S):
        raise ServerError(f"processes of group {process.pid} cannot be ended")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_group(group: int, deadline: float) -> bool:
    """Wait until no process of a group is left; say whether that was before the deadline."""
    while _is_left(group):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _is_left(group: int) -> bool:
    """Whether a process of a group runs; one that waits for its parent to look at it does not."""
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False
