# SPDX-License-Identifier: Apache-2.0
"""Launch kernels, or compile several at a time without launching them."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import triton

Progress = Callable[[int, int], None]
"""Gets the number of compiled kernels, and of all kernels whose compilation has been requested."""

_only_compile = contextvars.ContextVar("only_compile", default=False)


def launcher(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """Return `kernel[grid]`, or in `compile_in_threads` a function that only compiles."""
    if _only_compile.get():
        return functools.partial(kernel.warmup, grid=grid)
    return kernel[grid]


def compile_in_threads(launch: Callable[[], object], threads: int, progress: Progress) -> None:
    """Compile the kernels that a function launches, without running them.

    Triton's compiler mostly runs outside of Python's lock, so threads compile side by side.

    Args:
        launch: Is called once. Its kernels do not run, so what they should write is undefined.
        threads: How many kernels are compiled at a time.
        progress: Called from these threads after each kernel.
    """

    def compile_all() -> None:
        _only_compile.set(True)
        with _Executor(threads, progress) as executor, triton.AsyncCompileMode(executor):
            launch()

    # If a kernel does not compile, Triton 3.6 leaves its mode active. A copy of the context
    # confines the mode to this call.
    contextvars.copy_context().run(compile_all)


class _Executor(ThreadPoolExecutor):
    """A pool of threads that reports each finished call."""

    def __init__(self, threads: int, progress: Progress) -> None:
        super().__init__(threads)
        self._progress = progress
        self._submitted: list[Future[Any]] = []

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = super().submit(function, *args, **kwargs)
        self._submitted.append(future)
        future.add_done_callback(self._report)
        return future

    def _report(self, _: Future[Any]) -> None:
        done = sum(future.done() for future in self._submitted)
        self._progress(done, len(self._submitted))
