# SPDX-License-Identifier: Apache-2.0
"""Servers of two workers of which one is killed, or has something else than the other."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from testing.ending import STREAMS, Ended, crash, processes_of, until
from testing.engine_host import BASE_ENVIRONMENT

pytestmark = [pytest.mark.engine, pytest.mark.long]

TWO_WORKERS = ("--tensor-parallel-size", "2")
TIMEOUT_S = 600.0

SABOTAGE = """
import multiprocessing

def not_taken():
    if multiprocessing.current_process().name == "VllmWorker-1":
        from vllm_hybrid_kv.patches import base
        base.MethodRebinding.apply = lambda self: None

def patched():
    if multiprocessing.current_process().name == "VllmWorker-1":
        from vllm.v1.core import kv_cache_utils
        kv_cache_utils.get_kv_cache_capacity = lambda vllm_config, kv_cache_config: (0, 0)
"""


@pytest.fixture(autouse=True)
def _two_processes_on_whatever_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@pytest.fixture(scope="module")
def model(small_model: Callable[[str, str], Path]) -> Path:
    return small_model("llama", "bfloat16")


def test_a_worker_killed_in_a_step_ends_the_server_as_it_does_without_the_plugin(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: dict[str, Ended] = {}
    for name, more in (("ours", ("--kv-cache-dtype", "turboquant_k8v4")), ("stock", ())):
        if name == "stock":
            monkeypatch.setenv("VLLM_PLUGINS", "")
        (tmp_path / name).mkdir()
        ends[name] = crash(model, tmp_path / name, "Worker_TP1", *TWO_WORKERS, *more)
        print(name, ends[name])
    ours, stock = ends["ours"], ends["stock"]
    assert ours.running_after_hang_up == 0
    assert ours.ended_by_itself == stock.ended_by_itself
    assert len(ours.broken_off) == len(stock.broken_off) == STREAMS
    assert ours.processes == stock.processes
    assert len(ours.shared_memory) <= len(stock.shared_memory)
    assert [name for name in ours.temporary if "hybrid" in name] == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("not_taken", "WorkerBase.__init__ is not the plugin's"),
        ("patched", "the process VllmWorker-1 has hybrid_kv"),
    ],
)
def test_a_worker_that_has_something_else_stops_all_with_one_message(
    model: Path, tmp_path: Path, change: str, said: str
) -> None:
    site = tmp_path / "site"
    metadata = site / "sabotage-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "sabotage.py").write_text(SABOTAGE)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: sabotage\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        f"[vllm.general_plugins]\nsabotage = sabotage:{change}\n"
    )
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    command = [
        *(Path(sys.executable).with_name("vllm"), "serve", model, *TWO_WORKERS, "--port", "0"),
        *("--kv-cache-dtype", "turboquant_k8v4", "--gpu-memory-utilization", "0.3"),
        *("--enforce-eager", "--max-model-len", "2048"),
    ]
    log = tmp_path / "log.txt"
    with (
        log.open("wb") as sink,
        subprocess.Popen(
            command,
            env={**os.environ, **BASE_ENVIRONMENT, "PYTHONPATH": path},
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            status = process.wait(TIMEOUT_S)
            ended = until(lambda: not processes_of(process.pid))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    output = log.read_text(errors="replace")
    messages = [line for line in output.splitlines() if said in line]
    assert len(messages) == 1, output[-6000:]
    assert "errors.HybridKV" in messages[0]
    assert status not in (0, -9)
    assert ended
    assert "Application startup complete" not in output
