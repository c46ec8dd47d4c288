# SPDX-License-Identifier: Apache-2.0
"""Which process chooses the folder of the counters, shows it and removes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_hybrid_kv.metrics import directory
from vllm_hybrid_kv.state import STATE

SCRIPT = """
import json, multiprocessing, os, sys
from types import SimpleNamespace
from vllm_hybrid_kv.metrics import directory
from vllm_hybrid_kv.metrics.counters import REQUESTS, counter_file
from vllm_hybrid_kv.state import STATE
from vllm_hybrid_kv.state import STATE

def configuration(engine):
    model = SimpleNamespace(served_model_name="a model")
    return SimpleNamespace(
        model_config=model, parallel_config=SimpleNamespace(data_parallel_index=engine)
    )

def publish(engine):
    STATE.engine_config = configuration(engine)
    directory.publish(STATE.engine_config, STATE.settings)

def engine(index, amount):
    publish(index)
    counter_file(directory.folder()).counter(REQUESTS, directory.engine_labels()).add(amount)

publish(0)
publish(0)
told = {"folder": str(directory.folder()), "made": directory.folder().exists()}
fork = multiprocessing.get_context("fork")
for index, amount in ((0, 3), (1, 4), (0, 5)):
    child = fork.Process(target=engine, args=(index, amount))
    child.start()
    child.join()
    assert child.exitcode == 0
told["after its children"] = directory.folder().exists()
if "in process" in sys.argv:
    engine(0, 100)
from prometheus_client import generate_latest
told["shown"] = [
    line for line in generate_latest().decode().splitlines() if line.startswith("vllm_hybrid_kv")
]
if os.fork() == 0:
    # Ends as a process does, with what is to be done at its end.
    sys.exit()
os.wait()
told["after a fork"] = directory.folder().exists()
print(json.dumps(told))
"""


def run(*arguments: str, **environ: str) -> dict:
    environment = {**os.environ, "VLLM_HYBRID_KV_COORDINATOR": "fixed_point", **environ}
    environment.pop(directory.MULTIPROC, None)
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


def test_the_first_process_shows_what_its_children_count_and_leaves_nothing(tmp_path):
    # As inherited from a process that served before and is no parent of engines of this one.
    told = run(TMPDIR=str(tmp_path), **{directory.VARIABLE: str(tmp_path / "another")})
    assert Path(told["folder"]).parent == tmp_path
    assert Path(told["folder"]).name != "another"
    assert not told["made"], "nothing had been counted yet"
    assert told["after its children"]
    name = "vllm_hybrid_kv:prefix_cache_requests_total"
    assert told["shown"] == [
        f'{name}{{engine="0",model_name="a model"}} 8.0',
        f'{name}{{engine="1",model_name="a model"}} 4.0',
    ]
    assert told["after a fork"]
    assert not list(tmp_path.iterdir())


def test_an_engine_in_the_process_that_shows_the_counters_is_counted_too(tmp_path):
    told = run("in process", TMPDIR=str(tmp_path))
    assert told["shown"][0].endswith("} 108.0")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def untouched(monkeypatch):
    for name in list(os.environ):
        if name.startswith("VLLM_HYBRID_KV_") or name in (directory.VARIABLE, directory.MULTIPROC):
            monkeypatch.delenv(name)
    monkeypatch.setattr(STATE, "metrics_owner", None)
    monkeypatch.setattr(STATE, "engine_settings", None)
    model = SimpleNamespace(served_model_name="a model")
    parallel = SimpleNamespace(data_parallel_index=3)
    config = SimpleNamespace(model_config=model, parallel_config=parallel)
    monkeypatch.setattr(STATE, "engine_config", config)
    return config


def test_vllms_folder_is_used_where_there_is_one(untouched, monkeypatch, tmp_path):
    monkeypatch.setenv(directory.MULTIPROC, str(tmp_path))
    monkeypatch.setenv("VLLM_HYBRID_KV_COORDINATOR", "fixed_point")
    directory.publish(untouched, STATE.settings)
    assert directory.folder() == tmp_path
    assert directory.VARIABLE not in os.environ
    assert directory.engine_labels() == {"model_name": "a model", "engine": "3"}


def test_with_vllms_own_coordinator_no_folder_is_chosen(untouched, monkeypatch):
    monkeypatch.setenv("VLLM_HYBRID_KV_COORDINATOR", "stock")
    directory.publish(untouched, STATE.settings)
    assert directory.folder() is None
