# SPDX-License-Identifier: Apache-2.0
"""If a process of an engine refuses to start, the process that the user started learns why."""

import logging
import multiprocessing
import os
from pathlib import Path

import pytest

from vllm_hybrid_kv import plugin
from vllm_hybrid_kv.errors import HybridKVError
from vllm_hybrid_kv.patches.startup import VARIABLE, _take_refusal
from vllm_hybrid_kv.state import STATE

WORDS = "layer model.layers.2 cannot be served"


def log_failure(kind):
    """Log as vLLM's worker processes do when they fail."""
    try:
        if kind == "another error":
            raise RuntimeError(WORDS)
        try:
            raise HybridKVError(WORDS)
        except HybridKVError as error:
            if kind == "a refusal":
                raise
            raise RuntimeError("the worker failed") from error
    except Exception:
        logging.getLogger("vllm.v1.executor.multiproc_executor").exception("WorkerProc failed")


def in_a_child(kind):
    process = multiprocessing.get_context("fork").Process(target=log_failure, args=(kind,))
    process.start()
    process.join(60)
    assert process.exitcode == 0


@pytest.fixture(autouse=True)
def _registered(unregistered, monkeypatch):
    monkeypatch.setenv(VARIABLE, "")
    plugin.register()


@pytest.mark.parametrize("kind", ["a refusal", "an error that comes from one"])
def test_a_refusal_that_a_child_logs_is_taken_once(kind):
    in_a_child(kind)
    file = Path(os.environ[VARIABLE])
    assert file.is_file()
    assert _take_refusal() == WORDS
    assert not file.exists()
    assert _take_refusal() == ""


def test_the_refusal_of_an_earlier_engine_is_forgotten(make_config):
    in_a_child("a refusal")
    make_config()
    assert _take_refusal() == ""


def test_other_errors_and_the_process_that_the_user_started_leave_no_file():
    in_a_child("another error")
    log_failure("a refusal")
    assert not Path(os.environ[VARIABLE]).exists()


def test_without_the_plugin_there_is_no_file():
    STATE.active_patches.undo()
    STATE.active_patches = None
    in_a_child("a refusal")
    assert not Path(os.environ[VARIABLE]).exists()
