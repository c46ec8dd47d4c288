# SPDX-License-Identifier: Apache-2.0
"""A process in which Triton interprets kernels on CPU tensors.

Triton decides between compiling and interpreting when a kernel is defined, its own library's
included, so that a test process that has imported it before cannot change over.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def prepare() -> None:
    """Set what must be set before torch or Triton is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"


class Interpreter:
    """Runs functions of importable modules in a process of its own, one at a time."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=prepare)

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._pool.submit(function, *args, **kwargs).result()

    def close(self) -> None:
        self._pool.shutdown()
