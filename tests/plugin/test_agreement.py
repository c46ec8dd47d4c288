# SPDX-License-Identifier: Apache-2.0
"""Processes of one engine that have another plugin than the one that started them do not start."""

import json
import multiprocessing
import os

import pytest

from vllm_hybrid_kv import plugin
from vllm_hybrid_kv.errors import HybridKVAgreementError

PROCESSES = """
import json
import multiprocessing
import sys

def patched():
    from vllm.v1.core import kv_cache_utils
    kv_cache_utils.get_kv_cache_capacity = lambda vllm_config, kv_cache_config: (0, 0)

def not_taken():
    from vllm_hybrid_kv.patches import mechanism
    mechanism.MethodRebinding.apply = lambda self: None

def as_it_is():
    pass

def worker(change, answers):
    from vllm_hybrid_kv import plugin
    from vllm_hybrid_kv.state import STATE
    globals()[change]()
    said = ""
    try:
        plugin.register()
    except ValueError as error:
        said = f"{type(error).__name__}: {error}"
    answers.put((change, said, STATE.active_patches is not None))

if __name__ == "__main__":
    from vllm_hybrid_kv import plugin
    plugin.register()
    # Each has its own interpreter's worth of state, and vLLM imported in the one they stem from.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm.engine.arg_utils", "vllm.v1.worker.worker_base"])
    answers = context.Queue()
    for change in ("as_it_is", "patched", "not_taken"):
        context.Process(target=worker, args=(change, answers), name=change).start()
    print(json.dumps({name: rest for name, *rest in (answers.get() for _ in range(3))}))
"""


@pytest.fixture(scope="module")
def processes(run_python, tmp_path_factory):
    """What came of three processes that a process with an active plugin started."""
    script = tmp_path_factory.mktemp("processes") / "engine.py"
    script.write_text(PROCESSES)
    done = run_python(str(script), timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr + done.stdout


def test_a_process_that_has_the_same_starts(processes):
    assert processes[0]["as_it_is"] == ["", True]


def test_a_process_with_another_vllm_stops_where_alone_it_would_leave_vllm_unchanged(processes):
    said, active = processes[0]["patched"]
    assert not active
    assert said.startswith("HybridKVAgreementError: the process patched has hybrid_kv ")
    assert "inactive" in said
    assert "get_kv_cache_capacity" in said
    assert "but the process that started it has hybrid_kv" in said
    assert "`vllm-hybrid-kv doctor`" in said
    # Said once: no warning of an inactive plugin beside it.
    assert "VLLM_PLUGINS=hybrid_kv to stop" not in processes[1]


def test_a_process_in_which_a_patch_did_not_take_stops_with_its_name(processes):
    said, active = processes[0]["not_taken"]
    assert not active
    assert said.startswith("HybridKVPatchError: ")
    assert "WorkerBase.__init__ is not the plugin's" in said


def test_a_process_that_a_user_starts_does_not_compare_with_what_it_inherits(monkeypatch):
    monkeypatch.setenv(plugin.PARENT_VARIABLE, "hybrid_kv 0.0 inactive")
    plugin.compare_with_parent("hybrid_kv 1.0 active")
    assert os.environ[plugin.PARENT_VARIABLE] == "hybrid_kv 1.0 active"


def test_a_child_of_a_process_without_the_plugin_is_the_first_to_have_it(monkeypatch):
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: "another")
    monkeypatch.setenv(plugin.PARENT_VARIABLE, "")
    plugin.compare_with_parent("one")
    plugin.compare_with_parent("one")
    with pytest.raises(HybridKVAgreementError, match=r"has two, but .* has one"):
        plugin.compare_with_parent("two")
