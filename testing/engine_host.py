# SPDX-License-Identifier: Apache-2.0
"""Start engines in a process of their own and send commands to them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partialmethod
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from testing.processes import OFFLINE, kill_group, start_group

CALL_TIMEOUT_S = 300.0
"""Long enough to start an engine, or to run a batch, of a small model on two cores."""

STOP_TIMEOUT_S = 30.0

BASE_ENVIRONMENT = {**OFFLINE, "VLLM_CPU_KVCACHE_SPACE": "1"}

DEFAULTS = {
    "gpu_memory_utilization": 0.3,
    "max_model_len": 2048,
    "disable_log_stats": False,
    "skip_tokenizer_init": True,
    "seed": 0,
}
"""Arguments of `vllm.LLM` that `EngineHost.engine` may change."""

Pages = list[dict[str, list[bytes]]]
"""For each worker, the bytes of the requested blocks, by layer."""


@dataclass(frozen=True)
class Output:
    """The output of one request: generated tokens and their log-probabilities.

    Attributes:
        margins: For each token, how far the likeliest candidate's log-probability is above the
            second one's.
        prompt_logprobs: Log-probabilities of the prompt's second and later tokens, if requested.
        prompt_ranks: Ranks of the same prompt tokens, if requested; 1 is the likeliest.
        cached: Prompt tokens that came from the prefix cache.
    """

    tokens: list[int]
    logprobs: list[float]
    margins: list[float]
    prompt_logprobs: list[float] | None = None
    prompt_ranks: list[int] | None = None
    cached: int = 0


@dataclass(frozen=True)
class HandedOver:
    """A finished request of an engine with a KV connector.

    Attributes:
        params: The connector's parameters for the engine that continues the request.
        blocks: The blocks that the request held in its last step, by KV group.
        arrived: Contents of the blocks that another engine sent, before a step used them. None if
            the blocks arrived within a step, or not at all.
    """

    output: Output
    params: dict[str, Any] | None
    blocks: tuple[list[int], ...]
    arrived: Pages | None


class EngineError(RuntimeError):
    """An engine did not start, or a request failed.

    Attributes:
        reason: One line: the name and the message of the error in the engine's process.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message


class EngineHost:
    """A process that runs one engine at a time, with the engine's core inside the process.

    `timeout_s` limits each command. `module` calls `execute_commands`. `environment` changes
    environment variables; None removes one. `started` has the facts about the running engine that
    `engine_worker.Worker.start` returns.
    """

    def __init__(
        self,
        log: Path,
        timeout_s: float = CALL_TIMEOUT_S,
        module: str = "testing.engine_worker",
        /,
        **environment: str | None,
    ) -> None:
        # Worker processes import `testing.planted_faults` by name.
        root = str(Path(__file__).parents[1])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        ours, theirs = socket.socketpair()
        self.log = log
        self._timeout_s = timeout_s
        self._process = start_group(
            [sys.executable, "-m", module, str(theirs.fileno())],
            log,
            {
                **BASE_ENVIRONMENT,
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                # With one thread, no thread waits for another when engines share cores.
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": path,
                **environment,
            },
            pass_fds=[theirs.fileno()],
            cwd=log.parent,
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self._settings: dict[str, Any] | None = None
        self.started: dict[str, Any] = {}

    def engine(self, **settings: Any) -> EngineHost:
        """Run an engine with these arguments of `vllm.LLM`, unless it runs already."""
        if settings != self._settings:
            self.stop()
            self.started = self.call("start", **{**DEFAULTS, **settings})
            self._settings = settings
        return self

    def stop(self) -> None:
        """Stop the engine, if one runs."""
        self._settings = None
        self.call("stop")

    def close(self) -> None:
        """Stop the engine and end every process of the host."""
        self._connection.close()
        try:
            self._process.wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            kill_group(self._process)

    def call(self, command: str, *arguments: Any, **options: Any) -> Any:
        """Execute a command and return its result.

        Raises:
            EngineError: The command failed or took too long, or the process ended.
        """
        try:
            self._connection.send((command, arguments, options))
            if not self._connection.poll(self._timeout_s):
                raise EngineError(f"{command}: no answer in {self._timeout_s:.0f} s")
            succeeded, result = self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            status = self._process.wait(timeout=STOP_TIMEOUT_S)
            last = next(iter(reversed(self._log_tail())), "it printed nothing")
            message = f"{command}: the process ended with status {status}: {last}"
            raise EngineError(message) from error
        if not succeeded:
            trace, reason = result
            log = "\n".join(self._log_tail())
            raise EngineError(f"{command} failed:\n{trace}\n{log}", reason)
        return result

    def _log_tail(self) -> list[str]:
        lines = self.log.read_text(errors="replace").splitlines()
        return [line.strip() for line in lines if line.strip()][-60:]

    # `engine_worker.Worker` has a method for each of these commands.
    generate = partialmethod(call, "generate")
    hand_over = partialmethod(call, "hand_over")
    pages = partialmethod(call, "pages")
    metrics = partialmethod(call, "metrics")
    layers = partialmethod(call, "layers")
    plan = partialmethod(call, "plan")
    plant = partialmethod(call, "plant")
    begin_decoding = partialmethod(call, "begin_decoding")
    decode = partialmethod(call, "decode")
    end_decoding = partialmethod(call, "end_decoding")


def execute_commands(
    find: Callable[[str], Callable[..., Any]], at_end: Callable[[], None] = lambda: None
) -> NoReturn:
    """Execute the commands that a host sends to this process, until the host closes.

    Args:
        find: Returns the function of a command.
        at_end: Called before the process ends.
    """
    connection = Connection(int(sys.argv[1]))
    while True:
        try:
            command, arguments, options = connection.recv()
        except EOFError:
            break
        try:
            connection.send((True, find(command)(*arguments, **options)))
        except Exception as error:
            traceback.print_exc()
            connection.send((False, (traceback.format_exc(), reason_of(error))))
    at_end()
    sys.stdout.flush()
    # End at once, without waiting for threads that vLLM leaves running.
    os._exit(0)


def reason_of(error: BaseException) -> str:
    """Return the name of an error and the last informative line of its message.

    The input value and the link at the end of pydantic's messages are omitted.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [
        line.split(" [type=")[0]
        for line in lines
        if not line.startswith("For further information visit")
    ]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
