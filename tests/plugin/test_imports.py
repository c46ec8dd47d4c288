# SPDX-License-Identifier: Apache-2.0
"""Importing the plugin is cheap, and without vLLM its errors say what to install."""

import json
import sys
from pathlib import Path

import pluggy
import pytest

import vllm_hybrid_kv
from testing.processes import run

NEW_MODULES = """
import json, sys
before = set(sys.modules)
import vllm_hybrid_kv.plugin
print(json.dumps(sorted(set(sys.modules) - before)))
"""


@pytest.fixture
def without_vllm(tmp_path):
    """Return a function that runs Python, which can import only this package and pluggy."""
    for package in (vllm_hybrid_kv, pluggy):
        folder = Path(package.__file__).parent
        (tmp_path / folder.name).symlink_to(folder, target_is_directory=True)
    return lambda code: run([sys.executable, "-S", "-c", code], PYTHONPATH=str(tmp_path))


def test_importing_the_entry_point_loads_five_small_modules():
    done = run([sys.executable, "-c", NEW_MODULES])
    assert done.returncode == 0, done.stderr
    new = json.loads(done.stdout)
    ours = [name for name in new if name.startswith("vllm_hybrid_kv")]
    assert ours == [
        "vllm_hybrid_kv",
        "vllm_hybrid_kv.errors",
        "vllm_hybrid_kv.plugin",
        "vllm_hybrid_kv.state",
        "vllm_hybrid_kv.version",
    ]
    # multiprocessing gives the main module a second name.
    others = {name.partition(".")[0] for name in new} - {"vllm_hybrid_kv", "__mp_main__"}
    assert others <= sys.stdlib_module_names


REGISTER = """
import sys
import vllm.plugins
from vllm.engine.arg_utils import EngineArgs
from vllm_hybrid_kv.state import STATE
vllm.plugins.load_general_plugins()
EngineArgs(model=sys.argv[1], skip_tokenizer_init=True).create_engine_config()
assert STATE.active_patches is not None
print("kernels" if "vllm_hybrid_kv.kernels.cpu" in sys.modules else "no kernels")
"""


def test_without_a_k8v4_cache_no_kernels_are_loaded(model):
    done = run([sys.executable, "-c", REGISTER, model])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "no kernels"


def test_without_vllm_the_package_imports(without_vllm):
    code = "import vllm_hybrid_kv as p; print(p.__version__, p.hookimpl, p.HybridKVError)"
    done = without_vllm(code)
    assert done.returncode == 0, done.stderr
    assert vllm_hybrid_kv.__version__ in done.stdout


@pytest.mark.parametrize("use", ["p.register()", "p.Settings"])
def test_without_vllm_the_error_says_what_to_install(use, without_vllm):
    done = without_vllm(f"import vllm_hybrid_kv as p; {use}")
    assert done.returncode != 0
    assert "vLLM is not installed" in done.stderr.splitlines()[-1]
    assert "pip install 'vllm-hybrid-kv[cpu]'" in done.stderr.splitlines()[-1]


def test_every_public_name_is_there():
    for name in vllm_hybrid_kv.__all__:
        assert getattr(vllm_hybrid_kv, name) is not None
    assert set(vllm_hybrid_kv.__all__) <= set(dir(vllm_hybrid_kv))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = vllm_hybrid_kv.nonsense


def test_the_old_name_of_an_error_still_works_with_a_warning():
    with pytest.warns(DeprecationWarning, match="use HybridKVPatchError"):
        assert vllm_hybrid_kv.HybridKVSeamError is vllm_hybrid_kv.HybridKVPatchError
