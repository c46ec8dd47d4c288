# SPDX-License-Identifier: Apache-2.0
"""Processes that are given a text and give JSON lines back, one by one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from vllm_hybrid_kv.settings import ENVIRONMENT_PREFIX

ROOT = Path(__file__).parents[2]
"""The folder that `benchmarks` is imported from."""

ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_PLUGINS": "hybrid_kv",
    "HF_HUB_OFFLINE": "1",
    # A scheduler is one thread.
    "OMP_NUM_THREADS": "1",
}


class ChildError(RuntimeError):
    """A process failed. The message ends with what it printed last."""


def answers(module: str, text: str, log: Path) -> Iterator[dict[str, Any]]:
    """Start a process, and give what it answers as it comes.

    Args:
        module: What it runs, by `serve`.
        text: What it is given.
        log: File that takes what it prints.

    Raises:
        ChildError: It ended with another status than 0.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    # The plugin's variables win over its settings, which are what is compared here.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(ENVIRONMENT_PREFIX)}
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=sink,
            text=True,
            env={**inherited, **ENVIRONMENT},
            cwd=ROOT,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with process.stdin:
            process.stdin.write(text)
        for line in process.stdout:
            yield json.loads(line)
        if process.wait():
            printed = log.read_text(errors="replace").strip()
            raise ChildError(f"{module} ended with status {process.returncode}:\n{printed[-2000:]}")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def serve(answer: Callable[[str], Iterable[dict[str, Any]]]) -> None:
    """Answer what is on the input, in a process that `answers` started."""
    # vLLM and torch print as they like; what is said to the parent has a file of its own.
    with os.fdopen(os.dup(1), "w") as to_parent:
        os.dup2(2, 1)
        for row in answer(sys.stdin.read()):
            print(json.dumps(row), file=to_parent, flush=True)
