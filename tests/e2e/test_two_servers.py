# SPDX-License-Identifier: Apache-2.0
"""Two servers that start at the same time with an empty kernel cache and a read-only home."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from testing.server import Server
from testing.server_crash import stream

pytestmark = [pytest.mark.engine, pytest.mark.long]

ARGUMENTS = (
    *("--served-model-name", "served", "--kv-cache-dtype", "turboquant_k8v4", "--enforce-eager"),
    *("--max-model-len", "2048", "--gpu-memory-utilization", "0.3"),
)


def answers(model: Path, logs: Sequence[Path]) -> list[str]:
    """Start a server for each log, all at the same time, and return the answer of each."""
    with contextlib.ExitStack() as stack:
        servers = []
        for log in logs:
            servers.append(Server(model, ARGUMENTS, log))
            stack.callback(servers[-1].stop)
        found = []
        for server in servers:
            server.wait(Console(quiet=True))
            chunks = stream(server.url, seed=1, tokens=40)
            found.append("".join(choice.text for chunk in chunks for choice in chunk.choices))
        return found


def test_both_answer_alike_and_a_third_one_compiles_nothing(
    small_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nobind: None
) -> None:
    model, kernels = small_model("llama"), tmp_path / "kernels"
    # Not even root can write here.
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, "/proc/nowhere")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(kernels))
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
