# SPDX-License-Identifier: Apache-2.0
"""One process writes counters, and another one exports them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from testing import processes
from vllm_hybrid_kv import metrics
from vllm_hybrid_kv.metrics import FILE_BYTES, HELP, Counters
from vllm_hybrid_kv.settings import Settings

LABELS = {"model_name": "a model", "engine": "0"}
HIT_TOKENS, REQUESTS = "prefix_cache_hit_tokens", "prefix_cache_requests"


def exported(folder: Path) -> str:
    registry = CollectorRegistry()
    MultiProcessCollector(registry, folder)
    return generate_latest(registry).decode()


def test_a_counter_is_exported_with_help_type_and_labels(tmp_path):
    counters = Counters(tmp_path / "new", LABELS)
    counters.add(HIT_TOKENS, 3, "mamba")
    counters.add(HIT_TOKENS, 4, "mamba")
    name = f"vllm_hybrid_kv:{HIT_TOKENS}_total"
    assert exported(tmp_path / "new").splitlines() == [
        f"# HELP {name} {HELP[HIT_TOKENS]}",
        f"# TYPE {name} counter",
        f'{name}{{engine="0",kind="mamba",model_name="a model"}} 7.0',
    ]


def test_engines_of_a_process_share_a_counter_if_their_labels_are_equal(tmp_path):
    first, second = Counters(tmp_path, LABELS), Counters(tmp_path, dict(LABELS))
    first.add(REQUESTS, 2)
    second.add(REQUESTS, 3)
    Counters(tmp_path, {**LABELS, "engine": "1"}).add(REQUESTS, 1)
    values = [line.split()[-1] for line in exported(tmp_path).splitlines() if line[0] != "#"]
    assert sorted(values) == ["1.0", "5.0"]


def test_the_counters_have_their_own_file_whose_disk_space_is_allocated_at_once(tmp_path):
    Counters(tmp_path, LABELS)
    (path,) = tmp_path.iterdir()
    # The file must have no holes: on a full disk, the kernel kills a process that writes to one.
    assert path.stat().st_blocks * 512 >= FILE_BYTES
    # vLLM's own counters have this name, so ours need another one.
    assert path.name != f"counter_{os.getpid()}.db"
    assert path.name.startswith("counter_")


SCRIPT = """
import json, multiprocessing, os, sys
from types import SimpleNamespace
from testing import processes
from vllm_hybrid_kv import metrics
from vllm_hybrid_kv.state import STATE

def configuration(engine):
    model = SimpleNamespace(served_model_name="a model")
    return SimpleNamespace(
        model_config=model, parallel_config=SimpleNamespace(data_parallel_index=engine)
    )

def publish(engine):
    STATE.engine_config = configuration(engine)
    metrics.publish(STATE.engine_config, STATE.settings)

def engine(index, amount):
    publish(index)
    metrics.Counters(metrics.folder(), metrics.engine_labels()).add("prefix_cache_requests", amount)

publish(0)
publish(0)
report = {"folder": str(metrics.folder())}
fork = multiprocessing.get_context("fork")
for index, amount in ((0, 3), (1, 4), (0, 5)):
    child = fork.Process(target=engine, args=(index, amount))
    child.start()
    child.join()
    assert child.exitcode == 0
engine(0, 100)
from prometheus_client import generate_latest
lines = generate_latest().decode().splitlines()
report["exported"] = sorted(line for line in lines if line.startswith("vllm_hybrid_kv"))
if os.fork() == 0:
    # Runs the exit handlers of the parent.
    sys.exit()
os.wait()
report["exists after a fork"] = metrics.folder().exists()
print(json.dumps(report))
"""


def run(**environ: str) -> dict:
    environ = {"VLLM_HYBRID_KV_COORDINATOR": "fixed_point", **environ}
    command = [sys.executable, "-c", SCRIPT]
    done = processes.run(command, without=(metrics.MULTIPROC,), **environ)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_first_process_exports_its_own_and_its_childrens_counts_and_removes_the_folder(
    tmp_path,
):
    # A new server that inherits this variable from another server must make its own folder.
    report = run(TMPDIR=str(tmp_path), **{metrics.VARIABLE: str(tmp_path / "another")})
    assert Path(report["folder"]).parent == tmp_path
    assert Path(report["folder"]).name != "another"
    name = "vllm_hybrid_kv:prefix_cache_requests_total"
    assert report["exported"] == [
        f'{name}{{engine="0",model_name="a model"}} 108.0',
        f'{name}{{engine="1",model_name="a model"}} 4.0',
    ]
    assert report["exists after a fork"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("coordinator", ["fixed_point", "stock"])
def test_vllms_folder_is_used_if_there_is_one(coordinator, monkeypatch, tmp_path):
    monkeypatch.delenv(metrics.VARIABLE, raising=False)
    monkeypatch.delenv(metrics.MULTIPROC, raising=False)
    if coordinator != "stock":
        monkeypatch.setenv(metrics.MULTIPROC, str(tmp_path))
    metrics.publish(None, Settings(coordinator=coordinator))
    # With vLLM's own coordinator there are no counters, so there is no folder.
    assert metrics.folder() == (None if coordinator == "stock" else tmp_path)
    assert metrics.VARIABLE not in os.environ
