# SPDX-License-Identifier: Apache-2.0
"""Run `vllm serve` during a `with` block, and stop it at the end in any case."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
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
"""Text in the server's log, and the stage of start-up that begins after it."""


class Server:
    """A running `vllm serve`. `serve` starts one, waits until it is ready and stops it.

    Attributes:
        url: Base URL, such as http://127.0.0.1:8000.
        log: The file with the output of all processes of the server.
        group: The process group of all processes of the server.
    """

    def __init__(self, model: Path, arguments: Sequence[str], log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        # One client for all polls: each new client reads the certificates again.
        self._client = httpx.Client(timeout=2.0)
        vllm = Path(sys.executable).with_name("vllm")
        address = ("--host", "127.0.0.1", "--port", str(port))
        self._process = start_group(
            [vllm, "serve", str(model), *address, *arguments], log, ENVIRONMENT
        )
        self.group = self._process.pid

    def wait(self, console: Console) -> None:
        """Wait until the server answers, and print the stages of start-up.

        Raises:
            ProcessError: The server ended, or did not answer within `START_TIMEOUT_S`.
        """
        began = time.monotonic()
        shown = ""
        while not self._answers():
            if self._process.poll() is not None:
                raise ProcessError(f"vllm serve ended with status {self._process.returncode}")
            if time.monotonic() - began > START_TIMEOUT_S:
                raise ProcessError(f"vllm serve was not ready in {START_TIMEOUT_S:.0f} s")
            log = self.log.read_text(errors="replace")
            stage = ["importing vLLM", *(name for mark, name in STAGES if mark in log)][-1]
            if stage != shown:
                console.print(f"  {time.monotonic() - began:3.0f} s  {stage}")
            shown = stage
            time.sleep(0.3)

    def find_in_log(self, pattern: str) -> str:
        """Return the first group of a pattern's first match in the log.

        Raises:
            ProcessError: Nothing in the log matches.
        """
        found = re.search(pattern, self.log.read_text(errors="replace"))
        if found is None:
            raise ProcessError(f"nothing in {self.log} matches {pattern!r}")
        return found.group(1)

    def samples(self) -> list[Sample]:
        """Return the Prometheus samples of /metrics."""
        answer = self._client.get(f"{self.url}/metrics", follow_redirects=True, timeout=60)
        families = text_string_to_metric_families(answer.raise_for_status().text)
        return [sample for family in families for sample in family.samples]

    def metric(self, name: str) -> float:
        """Return the sum of all samples of a metric.

        Raises:
            ProcessError: The server has no metric of this name.
        """
        values = [sample.value for sample in self.samples() if sample.name == name]
        if not values:
            raise ProcessError(f"the server's metrics have no {name}")
        return sum(values)

    def stop(self) -> None:
        """End all processes of the server.

        Raises:
            ProcessError: The server did not stop within `STOP_TIMEOUT_S` and was killed.
        """
        end = time.monotonic() + STOP_TIMEOUT_S
        try:
            self._client.close()
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)
            # The server's children end shortly after the server.
            stopped = group_ends(self.group, end - time.monotonic())
        finally:
            # A second Ctrl-C comes here too.
            kill_group(self._process)
        if not stopped:
            raise ProcessError(f"vllm serve did not stop within {STOP_TIMEOUT_S:.0f} s: killed")

    def _answers(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self._client.get(f"{self.url}/health").status_code == httpx.codes.OK
        return False


@contextlib.contextmanager
def serve(
    model: Path, arguments: Sequence[str], log: Path, console: Console | None = None
) -> Iterator[Server]:
    """Serve a model during a `with` block. Output goes to `log`, progress to `console`.

    Raises:
        ProcessError: The server did not start, or had to be killed.
    """
    server = Server(model, arguments, log)
    try:
        server.wait(console or Console(quiet=True))
        yield server
    except BaseException:
        # This error is the cause; an error from stopping the server would hide it.
        with contextlib.suppress(ProcessError):
            server.stop()
        raise
    server.stop()
