# SPDX-License-Identifier: Apache-2.0
"""A function that belongs to neither vLLM nor us is seen wherever it stands."""

import functools
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

from vllm_hybrid_kv.patches.base import Fingerprint, Target
from vllm_hybrid_kv.tools.doctor.rebindings import Places, module_of

SOURCE = """
class Owner:
    @classmethod
    def method(cls): return 1

def function(a): return a
"""


@dataclass(frozen=True)
class Known:
    function: Target
    method: Target
    flag: bool = True


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


@pytest.fixture
def known(definer):
    return Known(
        Target("vllm.definer", "function", Fingerprint.of(definer.function)),
        Target("vllm.definer", "Owner.method", Fingerprint.of(definer.Owner.method.__func__)),
    )


@pytest.fixture
def rival(load):
    return load("rival.patch", "def function(a): return 2\n")


@pytest.mark.usefixtures("caller")
def test_nothing_is_foreign_where_nobody_rebinds(known):
    assert Places(known).foreign() == []


def test_a_function_where_it_is_defined_is_seen(known, definer, rival):
    places = Places(known)
    definer.function = rival.function
    (foreign,) = places.foreign()
    assert (foreign.place, foreign.module) == ("vllm.definer.function", "rival.patch")


def test_a_function_where_it_is_only_imported_is_seen_under_its_name_there(known, caller, rival):
    places = Places(known)
    caller.renamed = rival.function
    (foreign,) = places.foreign()
    assert foreign.place == "vllm.caller.renamed"


def test_a_wrapper_that_looks_like_what_it_wraps_is_seen(known, definer, load):
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
    assert [foreign.module for foreign in places.foreign()] == ["rival.wrap"]


def test_a_method_is_seen(known, definer, rival):
    places = Places(known)
    definer.Owner.method = classmethod(rival.function)
    (foreign,) = places.foreign()
    assert (foreign.place, foreign.module) == ("vllm.definer.Owner.method", "rival.patch")


def test_what_was_foreign_before_plugins_were_loaded_is_seen(known, definer, rival):
    definer.function = rival.function
    assert [foreign.module for foreign in Places(known).foreign()] == ["rival.patch"]


def test_what_is_no_function_is_known_by_its_type(known, definer):
    places = Places(known)
    definer.function = functools.partial(print)
    assert [foreign.module for foreign in places.foreign()] == ["functools"]


def test_ours_and_vllms_are_not_foreign(known, definer, load):
    places = Places(known)
    definer.function = load("vllm_hybrid_kv.patches.x", "def f(a): return 3\n").f
    definer.Owner.method = classmethod(load("vllm.other", "def f(a): return 3\n").f)
    assert places.foreign() == []


def test_what_vllm_itself_decorates_is_vllms(load, definer):
    decorator = load("elsewhere", "def decorate(f):\n    def g(a): return f(a)\n    return g\n")
    definer.function = decorator.decorate(definer.function)
    assert module_of(definer.function) == "elsewhere"
    known = Known(
        Target("vllm.definer", "function", Fingerprint.of(definer.function)),
        Target("vllm.definer", "Owner.method", Fingerprint.of(definer.Owner.method.__func__)),
    )
    assert Places(known).foreign() == []


def test_the_command_loads_neither_vllm_nor_torch():
    import subprocess

    done = subprocess.run(
        [
            *(sys.executable, "-c"),
            "import sys, vllm_hybrid_kv.tools.main; print({'vllm', 'torch'} & set(sys.modules))",
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
    )
    assert done.stdout.strip() == "set()"
