# SPDX-License-Identifier: Apache-2.0
"""A worker whose patches differ from the other worker's stops the server."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from testing.engine_host import BASE_ENVIRONMENT
from testing.processes import group_ends, kill_group, start_group

pytestmark = [pytest.mark.engine, pytest.mark.long]

TIMEOUT_S = 600.0
SETTLED_S = 60.0

SABOTAGE = """
import multiprocessing

def not_taken():
    if multiprocessing.current_process().name == "VllmWorker-1":
        from vllm_hybrid_kv.patches import mechanism
        mechanism.Rebinding.apply = lambda self: None

def patched():
    if multiprocessing.current_process().name == "VllmWorker-1":
        from vllm.v1.core import kv_cache_utils
        kv_cache_utils.get_kv_cache_capacity = lambda vllm_config, kv_cache_config: (0, 0)
"""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("not_taken", "WorkerBase.__init__ is not the plugin's"),
        ("patched", "the process VllmWorker-1 has hybrid_kv"),
    ],
)
def test_a_worker_with_other_patches_stops_all_processes_with_one_message(
    small_model: Callable[..., Path], tmp_path: Path, nobind: None, change: str, words: str
) -> None:
    site = tmp_path / "site"
    metadata = site / "sabotage-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "sabotage.py").write_text(SABOTAGE)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: sabotage\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        f"[vllm.general_plugins]\nsabotage = sabotage:{change}\n"
    )
    command = [
        *(Path(sys.executable).with_name("vllm"), "serve", small_model("llama")),
        *("--tensor-parallel-size", "2", "--port", "0", "--kv-cache-dtype", "turboquant_k8v4"),
        *("--gpu-memory-utilization", "0.3", "--enforce-eager", "--max-model-len", "2048"),
    ]
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    log = tmp_path / "log.txt"
    process = start_group(command, log, {**BASE_ENVIRONMENT, "PYTHONPATH": path}, cwd=tmp_path)
    try:
        status = process.wait(TIMEOUT_S)
        ended = group_ends(process.pid, SETTLED_S)
    finally:
        kill_group(process)
    output = log.read_text(errors="replace")
    messages = [line for line in output.splitlines() if words in line]
    assert len(messages) == 1, output[-6000:]
    assert "errors.HybridKV" in messages[0]
    assert status not in (0, -9)
    assert ended
    assert "Application startup complete" not in output
