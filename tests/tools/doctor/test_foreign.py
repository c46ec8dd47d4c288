# SPDX-License-Identifier: Apache-2.0
"""Doctor finds functions of other packages in the places that the plugin patches."""

import functools
import sys
import types

import pytest

from vllm_hybrid_kv.patches.mechanism import Target, source_hash
from vllm_hybrid_kv.tools.doctor.foreign import Places, module_of

SOURCE = """
class Owner:
    @classmethod
    def method(cls): return 1

def function(a): return a
"""
FUNCTION = "def function(a): return 2\n"
WRAPPER = """
import functools
def wrap(f):
    @functools.wraps(f)
    def g(*a): return f(*a)
    return g
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """A function that makes and imports a module with the given source."""

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
        Target("vllm.definer", "function", source_hash(definer.function.__code__)),
        Target("vllm.definer", "Owner.method", source_hash(definer.Owner.method.__code__)),
    ]


def test_a_function_replaced_in_its_own_module_is_found(load, definer):
    places = Places(targets(definer))
    assert places.foreign() == []
    definer.function = load("rival.patch", FUNCTION).function
    assert places.foreign() == [
        {"place": "vllm.definer.function", "module": "rival.patch", "package": ""}
    ]


def test_a_function_replaced_in_a_calling_module_is_found_under_its_name_there(
    load, definer, caller
):
    places = Places(targets(definer))
    caller.renamed = load("rival.patch", FUNCTION).function
    assert [foreign["place"] for foreign in places.foreign()] == ["vllm.caller.renamed"]


def test_a_replaced_method_is_found(load, definer):
    places = Places(targets(definer))
    definer.Owner.method = classmethod(load("rival.patch", FUNCTION).function)
    (foreign,) = places.foreign()
    assert (foreign["place"], foreign["module"]) == ("vllm.definer.Owner.method", "rival.patch")


@pytest.mark.parametrize(
    ("replace", "modules"),
    [
        # This replacement is found although `functools.wraps` gives it vLLM's name.
        (lambda load, old: load("rival.wrap", WRAPPER).wrap(old), ["rival.wrap"]),
        (lambda *_: functools.partial(print), ["functools"]),
        (lambda load, _: load("vllm_hybrid_kv.patches.x", FUNCTION).function, []),
        (lambda load, _: load("vllm.other", FUNCTION).function, []),
    ],
)
def test_a_replacement_is_foreign_by_the_module_that_defines_it(replace, modules, load, definer):
    places = Places(targets(definer))
    definer.function = replace(load, definer.function)
    assert [foreign["module"] for foreign in places.foreign()] == modules


def test_a_target_that_is_missing_makes_no_place_of_every_global_that_is_none(load, caller):
    caller.empty = None
    places = Places([Target("vllm.caller", "missing", "0")])
    caller.empty = functools.partial(print)
    assert places.foreign() == []


def test_a_function_replaced_before_plugins_were_loaded_is_found(load, definer):
    wanted = targets(definer)
    definer.function = load("rival.patch", FUNCTION).function
    assert [foreign["module"] for foreign in Places(wanted).foreign()] == ["rival.patch"]


def test_a_function_that_vllm_decorates_with_another_library_is_not_foreign(load, definer):
    decorator = load("elsewhere", WRAPPER.replace("    @functools.wraps(f)\n", ""))
    definer.function = decorator.wrap(definer.function)
    assert module_of(definer.function) == "elsewhere"
    assert Places(targets(definer)).foreign() == []
