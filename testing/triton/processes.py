# SPDX-License-Identifier: Apache-2.0
"""Processes in which Triton interprets kernels on CPU tensors, or compiles them for GPUs.

Triton chooses between the two when a kernel or its own library is defined, so a process that has
imported Triton cannot change the mode.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any


def _process(prepare: Callable[[], None]) -> ProcessPoolExecutor:
    """Start a process that calls `prepare` before it imports Triton."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=context, initializer=prepare)


def _prepare_to_interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"
    interpret_faster()


def interpret_faster() -> None:
    """Make Triton's interpreter patch `triton.language` only once.

    It patches for every launch and for every function that a kernel calls, which takes a third
    of the time of these tests.
    """
    from triton.runtime import interpreter

    patch_language = interpreter._patch_lang
    patched: set[tuple[int, ...]] = set()

    class KeepPatched:
        def restore(self) -> None:
            pass

    def patch_once(function: Any) -> KeepPatched:
        modules = {id(value) for value in function.__globals__.values() if inspect.ismodule(value)}
        if (key := tuple(sorted(modules & languages))) not in patched:
            patch_language(function)
            patched.add(key)
        return KeepPatched()

    languages = {id(interpreter.tl), id(interpreter.tl.core)}
    interpreter._patch_lang = patch_once


class Interpreter:
    """Runs functions of importable modules in its own process, one at a time."""

    def __init__(self) -> None:
        self._process = _process(_prepare_to_interpret)

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._process.submit(function, *args, **kwargs).result()

    def close(self) -> None:
        self._process.shutdown()


def _call_wrapped(module: str, name: str, arguments: dict[str, Any]) -> None:
    getattr(importlib.import_module(module), name).__wrapped__(**arguments)


def interpreted(test: Callable[..., None]) -> Callable[..., None]:
    """Decorate a test so that it runs in the process of the fixture `interpreter`."""

    @functools.wraps(test)
    def run(interpreter: Interpreter, **arguments: Any) -> None:
        interpreter(_call_wrapped, test.__module__, test.__name__, arguments)

    signature = inspect.signature(test)
    fixture = inspect.Parameter("interpreter", inspect.Parameter.KEYWORD_ONLY)
    parameters = [*signature.parameters.values(), fixture]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


def _prepare_to_compile() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    # Tests that run at the same time have priority. With `pytest -n` the next test waits for it.
    if "PYTEST_XDIST_WORKER" not in os.environ:
        os.nice(10)


class Compiler:
    """Compiles jobs in its own process, started before their results are needed.

    A job is hashable, of an importable module, and has a method `compile`.
    """

    def __init__(self) -> None:
        self._process = _process(_prepare_to_compile)
        self._started: dict[Any, Future[Any]] = {}

    def start(self, job: Any) -> Future[Any]:
        if job not in self._started:
            self._started[job] = self._process.submit(job.compile)
        return self._started[job]

    def __call__(self, job: Any) -> Any:
        return self.start(job).result()

    def close(self) -> None:
        self._process.shutdown(cancel_futures=True)
