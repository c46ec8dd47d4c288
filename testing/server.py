# SPDX-License-Identifier: Apache-2.0
"""A `vllm serve` process that cannot outlive the block that started it."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from testing.processes import ProcessError, group_ends, kill_group, start_group

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0

ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1"}
"""1 GiB of KV cache is enough for small models."""

STAGES = (
    ("Initializing a V1 LLM engine", "starting the engine"),
    ("Starting to load model", "loading the model"),
    ("Loading weights took", "planning the KV cache"),
    ("KV cache size", "warming up"),
    ("Starting vLLM server", "opening the port"),
)
"""Text in the server's log, and the stage of start-up that begins there."""


class Server:
    """A running `vllm serve`. `serve` starts one, waits until it is ready and stops it.

    Attributes:
        url: Base URL, such as http://127.0.0.1:8000.
        log: The file with the output of all its processes.
    """

    def __init__(self, model: Path, arguments: Sequence[str], log: Path) -> None:
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        # One client for all polls: each new client reads the certificates again.
        self._client = httpx.Client(timeout=2.0)
        vllm = Path(sys.executable).with_name("vllm")
        address = ("--host", "127.0.0.1", "--port", str(port))
        self._process = start_group(
            [vllm, "serve", str(model), *address, *arguments], log, ENVIRONMENT
        )

    @property
    def group(self) -> int:
        """The process group of all the server's processes."""
        return self._process.pid

    def wait(self, console: Console, watch: Callable[[], None] = lambda: None) -> float:
        """Wait until the server answers and return the seconds waited.

        Args:
            console: Shows the stages of start-up.
            watch: Called while waiting; may raise to end the wait.

        Raises:
            ProcessError: The server ended, or did not answer within `START_TIMEOUT_S`.
        """
        began = time.monotonic()
        shown = ""
        while not self._answers():
            watch()
            if self._process.poll() is not None:
                raise ProcessError(f"vllm serve ended with status {self._process.returncode}")
            if time.monotonic() - began > START_TIMEOUT_S:
                raise ProcessError(f"vllm serve was not ready in {START_TIMEOUT_S:.0f} s")
            stage = self._stage()
            if stage != shown:
                console.print(f"  {time.monotonic() - began:3.0f} s  {stage}")
            shown = stage
            time.sleep(0.3)
        return time.monotonic() - began

    def find_in_log(self, pattern: str) -> str:
        """Return the first group of a pattern's first match in the log.

        Raises:
            ProcessError: Nothing in the log matches.
        """
        found = re.search(pattern, self._read_log())
        if found is None:
            raise ProcessError(f"nothing in {self.log} matches {pattern!r}")
        return found.group(1)

    def metrics(self) -> list[Metric]:
        """Return the Prometheus metric families of /metrics."""
        answer = self._client.get(f"{self.url}/metrics", follow_redirects=True, timeout=60)
        return list(text_string_to_metric_families(answer.raise_for_status().text))

    def metric(self, name: str) -> float:
        """Return the sum of all samples of a metric.

        Raises:
            ProcessError: The server has no metric of this name.
        """
        values = [s.value for family in self.metrics() for s in family.samples if s.name == name]
        if not values:
            raise ProcessError(f"the server's metrics have no {name}")
        return sum(values)

    def stop(self) -> float:
        """End all processes of the server and return the seconds that it took.

        Raises:
            ProcessError: The server did not stop within `STOP_TIMEOUT_S` and was killed.
        """
        began = time.monotonic()
        try:
            self._client.close()
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)
            # The server's children end shortly after it.
            stopped = group_ends(self.group, began + STOP_TIMEOUT_S - time.monotonic())
        finally:
            # A second Ctrl-C comes here too.
            kill_group(self._process)
        if not stopped:
            raise ProcessError(f"vllm serve did not stop within {STOP_TIMEOUT_S:.0f} s: killed")
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
    console: Console | None = None,
    watch: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Server, float]]:
    """Serve a model during a `with` block.

    Args:
        model: Folder of the model.
        arguments: Further arguments of `vllm serve`.
        log: File for the server's output.
        console: Shows progress; None shows nothing.
        watch: Called while the server starts; may raise to stop it.

    Yields:
        The server when it is ready, and the seconds that start-up took.

    Raises:
        ProcessError: The server did not start, or had to be killed.
    """
    console = console or Console(quiet=True)
    server = Server(model, arguments, log)
    try:
        yield server, server.wait(console, watch)
    except BaseException:
        # Report the first error, not that of stopping.
        with contextlib.suppress(ProcessError):
            server.stop()
        raise
    seconds = server.stop()
    console.print(f"Server stopped in {seconds:.1f} s; no process is left.")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
