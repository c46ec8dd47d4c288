# SPDX-License-Identifier: Apache-2.0
"""Two servers that start at once on an empty kernel cache, in a home that cannot be written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from testing.ending import stream
from testing.server import Server

pytestmark = [pytest.mark.engine, pytest.mark.long]

ARGUMENTS = (
    *("--served-model-name", "served", "--kv-cache-dtype", "turboquant_k8v4", "--enforce-eager"),
    *("--max-model-len", "2048", "--gpu-memory-utilization", "0.3"),
)


def answers(model: Path, logs: Sequence[Path]) -> list[str]:
    """Start as many servers as there are logs, all at once, and return what each answers."""
    servers: list[Server] = []
    try:
        servers += [Server(model, ARGUMENTS, log) for log in logs]
        for server in servers:
            server.wait(Console(quiet=True), lambda: None)
        return [
            "".join(
                choice.text
                for chunk in stream(server.url, seed=1, tokens=40)
                for choice in chunk.choices
            )
            for server in servers
        ]
    finally:
        with contextlib.ExitStack() as stack:
            for server in servers:
                stack.callback(server.stop)


def test_both_start_and_answer_alike_and_the_next_one_has_nothing_to_compile(
    small_model: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, kernels = small_model("llama", "bfloat16"), tmp_path / "kernels"
    # Root writes wherever permissions say no, but not here.
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, "/proc/nowhere")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(kernels))
    # Else each takes all cores there are for itself.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    logs = [tmp_path / f"{name}.txt" for name in ("one", "another", "later")]
    one, another = answers(model, logs[:2])
    compiled = set(kernels.rglob("*.nbc"))
    (later,) = answers(model, logs[2:])
    assert one
    assert one == another == later
    assert compiled
    assert set(kernels.rglob("*.nbc")) == compiled
    assert not [file for file in kernels.rglob("*") if ".tmp." in file.name]
    assert not any("compiled in memory" in log.read_text(errors="replace") for log in logs)
