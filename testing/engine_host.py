# SPDX-License-Identifier: Apache-2.0
"""Starts engines in a process of their own and talks to them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from testing.requests import Output

CALL_TIMEOUT_S = 300.0
"""No start and no batch of requests of a small model takes this long on two cores."""

BASE_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class EngineError(RuntimeError):
    """An engine did not start, or a request failed.

    Attributes:
        reason: The last line of the engine's traceback; empty if there is none.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class EngineHost:
    """A process that runs one engine at a time.

    Args:
        log: File that takes the process's output.
        environment: Beside `BASE_ENVIRONMENT`.
        own_process: Whether the engine's core and its workers are processes of their own, as
            `vllm serve` has them; if not, they run inside the host, which starts much faster.
    """

    def __init__(self, log: Path, own_process: bool = False, **environment: str) -> None:
        environ = {**os.environ, **BASE_ENVIRONMENT}
        environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if own_process else "0"
        if not own_process:
            # Threads of one engine must not wait on each other where the cores are shared.
            environ["OMP_NUM_THREADS"] = "1"
        environ.update(environment)
        # Worker processes import `testing.faults` by name.
        root = str(Path(__file__).parents[1])
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        ours, theirs = socket.socketpair()
        self.log = log
        with log.open("ab") as sink:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "testing.engine_worker", str(theirs.fileno())],
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
        self._settings: dict[str, Any] | None = None
        self.started: dict[str, Any] = {}

    @property
    def runs(self) -> bool:
        """Whether the host's process runs."""
        return self._process.poll() is None

    def engine(self, **settings: Any) -> EngineHost:
        """Run an engine of these settings, unless it is the one that runs already."""
        if settings != self._settings:
            self.stop()
            self.started = self._call(
                "start",
                gpu_memory_utilization=0.3,
                max_model_len=2048,
                disable_log_stats=False,
                seed=0,
                **settings,
            )
            self._settings = settings
        return self

    def stop(self) -> None:
        """Stop the engine, if one runs."""
        self._settings = None
        self._call("stop")

    def generate(self, prompts: list[list[int]], max_tokens: int, **how: Any) -> list[Output]:
        """Send greedy requests, or ones with a `seed`: at once, or one by one with `alone=True`.

        `fresh=True` empties the prefix cache before each batch, `prompt_logprobs=True` asks for
        the prompt's log-probabilities (vLLM then reads nothing from the prefix cache).
        """
        return self._call("generate", prompts=prompts, max_tokens=max_tokens, **how)

    def hand_over(
        self, prompts: list[list[int]], max_tokens: int, params: list[dict[str, Any] | None]
    ) -> list[Any]:
        """Send greedy requests with parameters for a KV connector, see `handed_over`."""
        return self._call("hand_over", prompts=prompts, max_tokens=max_tokens, params=params)

    def pages(self, blocks: tuple[list[int], ...]) -> list[dict[str, list[bytes]]]:
        """Return what blocks hold, given by KV group, in each worker: by layer, their bytes."""
        return self._call("pages", blocks=blocks)

    def metrics(self) -> dict[str, float]:
        """Return vLLM's counters and gauges by name."""
        return self._call("metrics")

    def layers(self) -> dict[str, dict[str, Any]]:
        """Return backend, block size and page size of each layer with a KV cache."""
        return self._call("layers")

    def plan(self) -> dict[str, Any]:
        """Return the running engine's plan of the KV cache, and what vLLM reports of it."""
        return self._call("plan")

    def plant(self, fault: str | None) -> None:
        """Make the engine go wrong in every layer, see `faults`; None for right again."""
        self._call("plant", fault=fault)

    def plant_in_plans(self, fault: str | None) -> None:
        """Spoil the plans of engines that start from now on, see `planted_plans`."""
        self._call("plant_in_plans", fault=fault)

    def log_tail(self, lines: int = 60) -> str:
        """Return the end of what the processes printed."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def close(self) -> None:
        """Stop the engine and end every process of the host."""
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
            if not self._connection.poll(CALL_TIMEOUT_S):
                raise EngineError(f"{command}: no answer in {CALL_TIMEOUT_S:.0f} s")
            done, result = self._connection.recv()
        except (EOFError, BrokenPipeError) as error:
            raise EngineError(f"{command}: the engine's process ended") from error
        if not done:
            reason = result.strip().splitlines()[-1]
            raise EngineError(f"{command} failed:\n{result}\n{self.log_tail()}", reason)
        return result
