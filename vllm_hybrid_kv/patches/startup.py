# SPDX-License-Identifier: Apache-2.0
"""Reports a refusal, an error of the plugin in a worker, as the last line of a failed start-up.

The process that the user started only knows that another process ended. So workers and the engine
core write a refusal to a file, whose path they inherit in an environment variable. The process that
the user started reads the file and prints the refusal last.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import secrets
import tempfile
from pathlib import Path
from typing import Any

from vllm_hybrid_kv.errors import HybridKVError
from vllm_hybrid_kv.patches.context import Context
from vllm_hybrid_kv.patches.mechanism import Edit, Patch

VARIABLE = "HYBRID_KV_REFUSAL"
"""The environment variable with the path of the file for refusals. It is not a setting."""


class RefusalHandler(logging.Handler, Edit):
    """Writes each refusal that vLLM logs in a child process to the file that `VARIABLE` names."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)

    def apply(self) -> None:
        if multiprocessing.parent_process() is None:
            name = f"vllm-hybrid-kv-refusal-{os.getpid()}-{secrets.token_hex(8)}"
            os.environ[VARIABLE] = str(Path(tempfile.gettempdir()) / name)
            atexit.register(forget)
        logging.getLogger("vllm").addHandler(self)

    def undo(self) -> None:
        logging.getLogger("vllm").removeHandler(self)

    def __str__(self) -> str:
        return "the logger vllm (a handler is added)"

    def emit(self, record: logging.LogRecord) -> None:
        """Write the message if the logged exception is a refusal or was caused by one."""
        error = record.exc_info[1] if record.exc_info else None
        while error is not None and not isinstance(error, HybridKVError):
            error = error.__cause__ or error.__context__
        name = os.environ.get(VARIABLE)
        if error is None or not name or multiprocessing.parent_process() is None:
            return
        try:
            Path(name).write_text(str(error))
        except OSError:
            self.handleError(record)


def startup_patch(context: Context) -> Patch:
    """Re-raise a refusal of another process in the process that the user started."""

    def wait_for_engine_startup(original: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except RuntimeError:
            if refusal := _take_refusal():
                context.stop(HybridKVError(refusal))
            raise

    return Patch(
        "startup",
        replaces="wait_for_engine_startup; adds a handler to the logger vllm",
        why="vLLM ends with 'Engine core initialization failed', far below the reason",
        until="vLLM passes the reason to the process that the user started",
        edits=[
            context.rebind("wait_for_engine_startup", wait_for_engine_startup),
            RefusalHandler(),
        ],
    )


def forget(*_: Any) -> None:
    """Delete the file with the refusal of an earlier engine, if the user started this process."""
    if multiprocessing.parent_process() is None:
        _take_refusal()


def _take_refusal() -> str:
    """Delete the file and return the refusal, or an empty string if there is no file."""
    file = Path(os.environ.get(VARIABLE) or os.devnull)
    if not file.is_file():
        return ""
    refusal = file.read_text()
    file.unlink()
    return refusal
