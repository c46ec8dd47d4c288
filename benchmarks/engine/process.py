# SPDX-License-Identifier: Apache-2.0
"""Starts an engine in a process of its own and talks to it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.engine.configurations import Configuration
from testing.requests import Output

ROOT = Path(__file__).parents[2]
"""The folder that `benchmarks` and `demo` are imported from."""

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # All of an engine in the one process, so that its steps can be timed one by one.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


class EngineError(RuntimeError):
    """An engine did not start, or a request failed. The message is one line."""


class Engine:
    """A process with one engine.

    Attributes:
        started: What the engine says of itself: runner, graphs, backends, capacity.
    """

    def __init__(
        self,
        configuration: Configuration,
        arguments: dict[str, Any],
        log: Path,
        timeout_s: float,
    ) -> None:
        """Start it; use `running` instead, which also ends it.

        Args:
            configuration: Its settings.
            arguments: Further arguments of `vllm.LLM`.
            log: File that takes what it prints.
            timeout_s: How long a call may take.

        Raises:
            EngineError: It did not start.
        """
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environ = {**os.environ, **ENVIRONMENT, **configuration.environment(), "PYTHONPATH": path}
        if configuration.graphs is not None:
            # What is compiled for this engine is compiled by it, whatever runs beside it.
            environ["VLLM_CACHE_ROOT"] = str(log.with_suffix(".cache"))
        ours, theirs = socket.socketpair()
        self.log = log
        self._timeout_s = timeout_s
        with log.open("wb") as sink:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.engine.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=environ,
                cwd=log.parent,
                start_new_session=True,
            )
        theirs.close()
        self._connection = Connection(ours.detach())
        self.started: dict[str, Any] = {}
        try:
            self.started = self._call("start", **configuration.arguments(), **arguments)
            if self.started["plugin"] != configuration.plugin:
                raise EngineError(
                    "the plugin is not active in it: is vllm-hybrid-kv installed in this Python?"
                    if configuration.plugin
                    else "the plugin is active in it, without being asked for"
                )
        except BaseException:
            self.close()
            raise

    def generate(self, prompts: list[list[int]], max_tokens: int, **how: bool) -> list[Output]:
        """Send greedy requests: all at once, or one after another with `alone=True`.

        `fresh=True` empties the prefix cache before each batch, `prompt_logprobs=True` asks for
        the prompt's log-probabilities (vLLM then reads nothing from the prefix cache).
        """
        return self._call("generate", prompts=prompts, max_tokens=max_tokens, **how)

    def metrics(self) -> dict[str, float]:
        """Return vLLM's counters and gauges by name."""
        return self._call("metrics")

    def begin(self, prompts: list[list[int]], max_tokens: int) -> None:
        """Run requests until each has given a token, and keep them there."""
        self._call("begin", prompts=prompts, max_tokens=max_tokens)

    def decode(self, steps: int) -> tuple[float, int]:
        """Run steps of the requests begun; return the seconds and the tokens that came."""
        seconds, tokens = self._call("decode", steps=steps)
        return seconds, tokens

    def finish(self) -> None:
        """Drop the requests begun."""
        self._call("finish")

    def close(self) -> None:
        """End every process of the engine."""
        self._connection.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _call(self, command: str, **arguments: Any) -> Any:
        try:
            self._connection.send((command, arguments))
            if not self._connection.poll(self._timeout_s):
                raise EngineError(f"{command}: no answer in {self._timeout_s:.0f} s")
            done, result = self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            status = self._process.wait(timeout=30)
            message = f"the process ended with status {status}: {self._last_line()}"
            raise EngineError(f"{command}: {message}") from error
        if not done:
            raise EngineError(result)
        return result

    def _last_line(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line), "it printed nothing")


class Engines:
    """Starts the engines of one model.

    Args:
        model: Folder of the model.
        dtype: Of weights and activations.
        log: Start of the name of each engine's log file.
        timeout_s: How long a call may take.
        arguments: Further arguments of `vllm.LLM`, the same for all.
    """

    def __init__(
        self, model: Path, dtype: str, log: Path, timeout_s: float, **arguments: Any
    ) -> None:
        self._arguments = {"model": str(model), "dtype": dtype, **arguments}
        self._log = log
        self._timeout_s = timeout_s

    def start(self, configuration: Configuration, mode: str = "") -> Engine:
        """Start an engine, which the caller closes. Its log is named for it and for `mode`."""
        words = "".join(c if c.isalnum() else "-" for c in f"{mode} {configuration.name}".strip())
        log = self._log.with_name(f"{self._log.name}-{words}.txt")
        return Engine(configuration, self._arguments, log, self._timeout_s)

    @contextlib.contextmanager
    def running(self, configuration: Configuration) -> Iterator[Engine]:
        """Run an engine for the length of a `with` block."""
        engine = self.start(configuration)
        try:
            yield engine
        finally:
            engine.close()
