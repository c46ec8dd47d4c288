# SPDX-License-Identifier: Apache-2.0
"""Counters that one process writes and another exports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from vllm_hybrid_kv import metrics
from vllm_hybrid_kv.metrics import FILE_BYTES, HELP, Counters, FolderCollector
from vllm_hybrid_kv.state import STATE

LABELS = {"model_name": "a model", "engine": "0"}
HIT_TOKENS, REQUESTS = "prefix_cache_hit_tokens", "prefix_cache_requests"


def exported(folder: Path) -> str:
    registry = CollectorRegistry()
    registry.register(FolderCollector(folder))
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


def test_engines_of_a_process_with_equal_labels_share_a_counter(tmp_path):
    first, second = Counters(tmp_path, LABELS), Counters(tmp_path, dict(LABELS))
    first.add(REQUESTS, 2)
    second.add(REQUESTS, 3)
    first.add(REQUESTS, 1)
    assert exported(tmp_path).endswith(" 6.0\n")


def test_concurrent_engines_have_counters_with_their_own_labels(tmp_path):
    for engine in ("0", "1"):
        Counters(tmp_path, {**LABELS, "engine": engine}).add(REQUESTS, 1)
    assert exported(tmp_path).count("} 1.0\n") == 2


def test_the_disk_space_for_the_counters_is_allocated_at_once(tmp_path):
    Counters(tmp_path, LABELS)
    (path,) = tmp_path.iterdir()
    # Writing to a hole of a mapped file on a full disk would kill the process.
    assert path.stat().st_blocks * 512 >= FILE_BYTES


def test_the_file_differs_from_that_of_vllms_own_counters(tmp_path):
    Counters(tmp_path, LABELS)
    (name,) = os.listdir(tmp_path)
    assert name != f"counter_{os.getpid()}.db"
    assert name.split("_")[0] == "counter"


def test_nothing_is_exported_before_anything_was_counted(tmp_path):
    assert not exported(tmp_path / "missing").strip()


SCRIPT = """
import json, multiprocessing, os, sys
from types import SimpleNamespace
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
report = {"folder": str(metrics.folder()), "exists at first": metrics.folder().exists()}
fork = multiprocessing.get_context("fork")
for index, amount in ((0, 3), (1, 4), (0, 5)):
    child = fork.Process(target=engine, args=(index, amount))
    child.start()
    child.join()
    assert child.exitcode == 0
report["exists after its children"] = metrics.folder().exists()
if "in process" in sys.argv:
    engine(0, 100)
from prometheus_client import generate_latest
report["exported"] = [
    line for line in generate_latest().decode().splitlines() if line.startswith("vllm_hybrid_kv")
]
if os.fork() == 0:
    # Runs the exit handlers of the parent.
    sys.exit()
os.wait()
report["exists after a fork"] = metrics.folder().exists()
print(json.dumps(report))
"""


def run(*arguments: str, **environ: str) -> dict:
    environment = {**os.environ, "VLLM_HYBRID_KV_COORDINATOR": "fixed_point", **environ}
    environment.pop(metrics.MULTIPROC, None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_first_process_exports_what_its_children_count_and_removes_the_folder(tmp_path):
    # The variable as inherited from a server that is not the parent of this process's engines.
    report = run(TMPDIR=str(tmp_path), **{metrics.VARIABLE: str(tmp_path / "another")})
    assert Path(report["folder"]).parent == tmp_path
    assert Path(report["folder"]).name != "another"
    assert not report["exists at first"]
    assert report["exists after its children"]
    name = "vllm_hybrid_kv:prefix_cache_requests_total"
    assert report["exported"] == [
        f'{name}{{engine="0",model_name="a model"}} 8.0',
        f'{name}{{engine="1",model_name="a model"}} 4.0',
    ]
    assert report["exists after a fork"]
    assert not list(tmp_path.iterdir())


def test_an_engine_in_the_exporting_process_is_counted_too(tmp_path):
    report = run("in process", TMPDIR=str(tmp_path))
    assert report["exported"][0].endswith("} 108.0")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def engine_config(monkeypatch):
    for name in list(os.environ):
        if name.startswith("VLLM_HYBRID_KV_") or name in (metrics.VARIABLE, metrics.MULTIPROC):
            monkeypatch.delenv(name)
    monkeypatch.setattr(STATE, "metrics_owner", None)
    monkeypatch.setattr(STATE, "engine_settings", None)
    model = SimpleNamespace(served_model_name="a model")
    parallel = SimpleNamespace(data_parallel_index=3)
    config = SimpleNamespace(model_config=model, parallel_config=parallel)
    monkeypatch.setattr(STATE, "engine_config", config)
    return config


def test_vllms_folder_is_used_if_there_is_one(engine_config, monkeypatch, tmp_path):
    monkeypatch.setenv(metrics.MULTIPROC, str(tmp_path))
    monkeypatch.setenv("VLLM_HYBRID_KV_COORDINATOR", "fixed_point")
    metrics.publish(engine_config, STATE.settings)
    assert metrics.folder() == tmp_path
    assert metrics.VARIABLE not in os.environ
    assert metrics.engine_labels() == {"model_name": "a model", "engine": "3"}


def test_vllms_own_coordinator_needs_no_folder(engine_config, monkeypatch):
    monkeypatch.setenv("VLLM_HYBRID_KV_COORDINATOR", "stock")
    metrics.publish(engine_config, STATE.settings)
    assert metrics.folder() is None
