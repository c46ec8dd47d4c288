# SPDX-License-Identifier: Apache-2.0
"""A function that is neither vLLM's nor ours is found in every place that the plugin patches."""

import functools
import subprocess
import sys
import types
from pathlib import Path

import pytest

from vllm_hybrid_kv.patches.mechanism import Target, source_hash
from vllm_hybrid_kv.tools.doctor.foreign import Places, module_of

SOURCE = """
class Owner:
    @classmethod
    def method(cls): return 1

def function(a): return a
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    def load(name, source=""):
        path = tmp_path / f"{name}.py"
        path.write_text(source)
        module = types.ModuleType(name)
        exec(compile(source, str(path), "exec"), module.__dict__)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return load


@pytest.fixture
def definer(load):
    return load("vllm.definer", SOURCE)


@pytest.fixture
def caller(load, definer):
    module = load("vllm.caller")
    module.renamed = definer.function
    return module


def targets(definer):
    return [
        Target("vllm.definer:function", source_hash(definer.function)),
        Target("vllm.definer:Owner.method", source_hash(definer.Owner.method.__func__)),
    ]


@pytest.fixture
def known(definer):
    return targets(definer)


@pytest.fixture
def rival(load):
    return load("rival.patch", "def function(a): return 2\n")


@pytest.mark.usefixtures("caller")
def test_an_unpatched_vllm_has_no_foreign_functions(known):
    assert Places(known).foreign() == []


def test_a_function_replaced_in_its_own_module_is_found(known, definer, rival):
    places = Places(known)
    definer.function = rival.function
    assert places.foreign() == [
        {"place": "vllm.definer.function", "module": "rival.patch", "package": ""}
    ]


def test_a_function_replaced_in_a_calling_module_is_found_under_its_name_there(
    known, caller, rival
):
    places = Places(known)
    caller.renamed = rival.function
    (foreign,) = places.foreign()
    assert foreign["place"] == "vllm.caller.renamed"


def test_a_replaced_method_is_found(known, definer, rival):
    places = Places(known)
    definer.Owner.method = classmethod(rival.function)
    (foreign,) = places.foreign()
    assert (foreign["place"], foreign["module"]) == ("vllm.definer.Owner.method", "rival.patch")


def modules(places):
    return [foreign["module"] for foreign in places.foreign()]


def test_functools_wraps_does_not_hide_the_replacement(known, definer, load):
    wrap = load(
        "rival.wrap",
        "import functools\n"
        "def wrap(f):\n"
        "    @functools.wraps(f)\n"
        "    def g(*a): return f(*a)\n"
        "    return g\n",
    ).wrap
    places = Places(known)
    definer.function = wrap(definer.function)
    assert definer.function.__module__ == "vllm.definer"
    assert modules(places) == ["rival.wrap"]


def test_a_function_replaced_before_plugins_were_loaded_is_found(known, definer, rival):
    definer.function = rival.function
    assert modules(Places(known)) == ["rival.patch"]


def test_a_replacement_that_is_not_a_function_is_named_by_its_type(known, definer):
    places = Places(known)
    definer.function = functools.partial(print)
    assert modules(places) == ["functools"]


def test_functions_of_vllm_and_of_the_plugin_are_not_foreign(known, definer, load):
    places = Places(known)
    definer.function = load("vllm_hybrid_kv.patches.x", "def f(a): return 3\n").f
    definer.Owner.method = classmethod(load("vllm.other", "def f(a): return 3\n").f)
    assert places.foreign() == []


def test_a_function_that_vllm_decorates_with_another_library_is_not_foreign(load, definer):
    decorator = load("elsewhere", "def decorate(f):\n    def g(a): return f(a)\n    return g\n")
    definer.function = decorator.decorate(definer.function)
    assert module_of(definer.function) == "elsewhere"
    assert Places(targets(definer)).foreign() == []


def test_the_command_line_loads_neither_vllm_nor_torch():
    code = "import sys, vllm_hybrid_kv.tools.main; print({'vllm', 'torch'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
    )
    assert done.stdout.strip() == "set()"
