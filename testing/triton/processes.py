# SPDX-License-Identifier: Apache-2.0
"""Processes in which Triton interprets kernels on CPU tensors, or compiles them for GPUs.

Triton decides between the two when a kernel is defined, its own library's included, so that a
process that has imported it cannot change over.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, Protocol


def _processes(count: int, prepare: Callable[[], None]) -> ProcessPoolExecutor:
    """Processes that call `prepare` before they import anything but this module."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, mp_context=context, initializer=prepare)


def _prepare_to_interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"
    interpret_faster()


def interpret_faster() -> None:
    """Let Triton's interpreter put itself in the place of `triton.language` once.

    It does so for every launch, and again for every function that a kernel calls, which takes a
    third of the time of these tests.
    """
    from triton.runtime import interpreter

    put_in_place = interpreter._patch_lang
    done: set[tuple[int, ...]] = set()

    class Stays:
        def restore(self) -> None:
            pass

    def once(function: Any) -> Stays:
        modules = {id(value) for value in function.__globals__.values() if inspect.ismodule(value)}
        if (seen := tuple(sorted(modules & languages))) not in done:
            put_in_place(function)
            done.add(seen)
        return Stays()

    languages = {id(interpreter.tl), id(interpreter.tl.core)}
    interpreter._patch_lang = once


def _prepare_to_compile() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    # The tests that run meanwhile come first. With `pytest -n` the next test waits for it.
    if "PYTEST_XDIST_WORKER" not in os.environ:
        os.nice(10)


class Interpreter:
    """Runs functions of importable modules in a process of its own, one at a time."""

    def __init__(self) -> None:
        self._process = _processes(1, _prepare_to_interpret)

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._process.submit(function, *args, **kwargs).result()

    def close(self) -> None:
        self._process.shutdown()


class Job(Protocol):
    """Something to compile; hashable, of an importable module."""

    def compile(self) -> Any: ...


class Compiler:
    """Compiles in a process of its own what it has been told of before it is asked for it."""

    def __init__(self) -> None:
        self._process = _processes(1, _prepare_to_compile)
        self._started: dict[Job, Future[Any]] = {}

    def start(self, job: Job) -> Future[Any]:
        if job not in self._started:
            self._started[job] = self._process.submit(job.compile)
        return self._started[job]

    def __call__(self, job: Job) -> Any:
        return self.start(job).result()

    def close(self) -> None:
        self._process.shutdown(cancel_futures=True)
