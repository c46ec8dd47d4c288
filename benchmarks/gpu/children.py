# SPDX-License-Identifier: Apache-2.0
"""Call functions in child processes, so that a kernel that crashes or hangs stops nothing else.

An illegal memory access breaks the CUDA context of its process for good, and a kernel that never
ends can only be killed with its process. So the parent process uses no GPU. A child whose process
or context is lost is replaced by a fresh one.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, TypeVar

import torch

from benchmarks.gpu.environment import interpreted
from testing.triton.processes import interpret_faster

MOST_PROCESSES = 12
"""The largest number of processes. Each has its own CUDA context of about half a GiB."""

CALL_SECONDS = 60.0
"""A call that takes longer is stopped and counts as hung, except in Triton's interpreter."""

DONE, FAILED, LOST, OUT_OF_TIME = "done", "failed", "lost", "out of time"

# Children are copies of a server that has imported torch and Triton but not used the GPU, so a
# fresh child starts at once.
_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = ["benchmarks.gpu.children", "benchmarks.gpu.sections", "benchmarks.gpu.checks"]

Item = TypeVar("Item")


class Outcome(NamedTuple):
    """The result of a call.

    Attributes:
        status: `DONE`, `FAILED` if the function raised, `LOST` if the process ended, hung or lost
            its GPU, `OUT_OF_TIME` if the caller's time was up.
        value: What the function returned, or the reason why it did not.
        kernel: The last name that the function announced.
    """

    status: str
    value: Any
    kernel: str = ""


_to_parent: Connection | None = None


def announce(kernel: str) -> None:
    """Tell the parent process which kernel comes next, so that it knows which one was fatal."""
    if _to_parent is not None:
        _to_parent.send(kernel)


def synchronize() -> None:
    """Wait for the GPU.

    Raises:
        RuntimeError: An earlier call broke the CUDA context.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _explain(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:500]}"


def _serve(to_parent: Connection) -> None:
    """Call functions for the parent, until one breaks the CUDA context."""
    global _to_parent
    _to_parent = to_parent
    faulthandler.enable()
    torch.set_num_threads(1)
    if interpreted():
        interpret_faster()
    while True:
        try:
            function, arguments = to_parent.recv()
        except EOFError:
            return
        try:
            outcome = DONE, function(*arguments)
        except Exception as error:
            outcome = FAILED, _explain(error)
        try:
            synchronize()
        except Exception as error:
            reason = outcome[1] if outcome[0] == FAILED else _explain(error)
            to_parent.send((LOST, reason))
            # Skip destructors, which would use the broken context.
            os._exit(1)
        to_parent.send(outcome)


class Child:
    """Calls functions of importable modules in one process, or in a fresh one if that is lost."""

    def __init__(self) -> None:
        self._process: Any = None

    def _start(self) -> None:
        _CONTEXT.set_forkserver_preload(_PRELOADED)
        self._pipe, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Kill the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None

    def call(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        seconds: float,
        hang: float = CALL_SECONDS,
    ) -> Outcome:
        """Call a function for at most `seconds`, and on a GPU for at most `hang` seconds."""
        if self._process is None or not self._process.is_alive():
            self.stop()
            self._start()
        limit = seconds if interpreted() else min(seconds, hang)
        deadline = time.monotonic() + limit
        self._pipe.send((function, arguments))
        kernel = ""
        while True:
            if not self._pipe.poll(max(0.0, deadline - time.monotonic())):
                self.stop()
                if limit < seconds:
                    return Outcome(LOST, f"it hung for {limit:.0f} s", kernel)
                return Outcome(OUT_OF_TIME, f"not finished in the {limit:.0f} s left", kernel)
            try:
                answer = self._pipe.recv()
            except (EOFError, ConnectionResetError):
                self._process.join()
                reason = f"its process ended with status {self._process.exitcode}"
                self.stop()
                return Outcome(LOST, reason, kernel)
            if not isinstance(answer, str):
                status, value = answer
                if status == LOST:
                    # The process is about to end, so the next call must not use it.
                    self.stop()
                return Outcome(status, value, kernel)
            kernel = answer


def share_out(
    function: Callable[[Item], Any],
    items: Sequence[Item],
    seconds: float,
    record: Callable[[int, Outcome], None] = lambda index, outcome: None,
    processes: int = 0,
) -> list[Outcome]:
    """Call a function on items in several processes, all of which have ended on return.

    Args:
        function: A function of an importable module.
        items: The arguments, one for each call.
        seconds: The time limit for all calls.
        record: Gets the index and the outcome of each call, one at a time.
        processes: How many. 0 chooses one fewer than there are CPUs, at most `MOST_PROCESSES`.

    Returns:
        The outcomes in order.
    """
    deadline = time.monotonic() + seconds
    outcomes = [Outcome(OUT_OF_TIME, "not run") for _ in items]
    waiting = deque(enumerate(items))
    lock = threading.Lock()

    def work() -> None:
        with Child() as child:
            while (left := deadline - time.monotonic()) > 0:
                try:
                    index, item = waiting.popleft()
                except IndexError:
                    return
                outcomes[index] = child.call(function, item, seconds=left)
                with lock:
                    record(index, outcomes[index])

    count = processes or max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) - 1, len(items)))
    with ThreadPoolExecutor(count) as pool:
        for thread in [pool.submit(work) for _ in range(count)]:
            thread.result()
    return outcomes
