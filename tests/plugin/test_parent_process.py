# SPDX-License-Identifier: Apache-2.0
"""A process whose plugin state differs from that of its parent does not start."""

import json
import multiprocessing
import os
import sys

import pytest

from testing.processes import run
from vllm_hybrid_kv import plugin
from vllm_hybrid_kv.errors import HybridKVAgreementError

PROCESSES = """
import json
import multiprocessing
import sys

def patched():
    from vllm.v1.core import kv_cache_utils
    kv_cache_utils.get_kv_cache_capacity = lambda vllm_config, kv_cache_config: (0, 0)

def without_effect():
    from vllm_hybrid_kv.patches import mechanism
    mechanism.Rebinding.apply = lambda self: None

def unchanged():
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
    # The fork server imports vLLM once, and each process has a state of its own.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm.engine.arg_utils", "vllm.v1.worker.worker_base"])
    answers = context.Queue()
    for change in ("unchanged", "patched", "without_effect"):
        context.Process(target=worker, args=(change, answers), name=change).start()
    print(json.dumps({name: rest for name, *rest in (answers.get() for _ in range(3))}))
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Start three children of a process with an active plugin. Returns their results and output."""
    script = tmp_path_factory.mktemp("processes") / "engine.py"
    script.write_text(PROCESSES)
    done = run([sys.executable, script], without=("VLLM_HYBRID_KV_", "VLLM_PLUGINS"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr + done.stdout


def test_a_child_with_the_same_plugin_state_starts(processes):
    assert processes[0]["unchanged"] == ["", True]


def test_a_child_with_a_changed_vllm_stops(processes):
    said, active = processes[0]["patched"]
    assert not active
    assert said.startswith("HybridKVAgreementError: the process patched has hybrid_kv ")
    assert "inactive" in said
    assert "get_kv_cache_capacity" in said
    assert "but the process that started it has hybrid_kv" in said
    assert "`vllm-hybrid-kv doctor`" in said
    # The child does not warn of an inactive plugin, because it stops with an error.
    assert "VLLM_PLUGINS=hybrid_kv to stop" not in processes[1]


def test_a_child_in_which_a_patch_has_no_effect_stops_and_names_it(processes):
    said, active = processes[0]["without_effect"]
    assert not active
    assert said.startswith("HybridKVPatchError: ")
    assert "WorkerBase.__init__ is not the plugin's" in said


def test_a_process_without_a_parent_ignores_an_inherited_state(monkeypatch):
    monkeypatch.setenv(plugin.PARENT_VARIABLE, "hybrid_kv 0.0 inactive")
    plugin.compare_with_parent("hybrid_kv 1.0 active")
    assert os.environ[plugin.PARENT_VARIABLE] == "hybrid_kv 1.0 active"


def test_a_child_of_a_process_without_a_state_becomes_the_reference(monkeypatch):
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: "another")
    monkeypatch.setenv(plugin.PARENT_VARIABLE, "")
    plugin.compare_with_parent("one")
    plugin.compare_with_parent("one")
    with pytest.raises(HybridKVAgreementError, match=r"has two, but .* has one"):
        plugin.compare_with_parent("two")
