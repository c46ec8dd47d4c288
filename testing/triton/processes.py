# SPDX-License-Identifier: Apache-2.0
"""Run Triton in child processes that interpret kernels on CPU tensors or compile them for GPUs.

Triton chooses between interpreting and compiling when a kernel is defined. That includes Triton's
own library, so a process that has imported Triton cannot change the choice.
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

    Unchanged, the interpreter patches again for every launch and every function that a kernel
    calls, which takes a third of the time of these tests.
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
    """Runs functions of importable modules, one at a time, in a process that interprets kernels."""

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
    # Tests that run at the same time have priority, except with `pytest -n`, where the next test
    # waits for the compiler.
    if "PYTEST_XDIST_WORKER" not in os.environ:
        os.nice(10)


class Compiler:
    """Compiles jobs in a process of its own. Start them early, before their results are needed.

    A job is hashable, comes from an importable module and has a method `compile`.
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
