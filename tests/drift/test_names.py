# SPDX-License-Identifier: Apache-2.0
"""What else the plugin uses of vLLM, and what stands around it: changes planted in a small one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.drift import names, surroundings, synthetic
from tests.drift.names import Change, breaks_callers
from tests.drift.release import Release
from tests.drift.sources import Sources
from tests.drift.surroundings import Surroundings
from tests.drift.synthetic import edited
from tests.drift.uses import Uses, uses
from vllm_hybrid_kv.patches.base import Fingerprint, Target


@pytest.fixture
def known(tmp_path: Path) -> Release:
    return synthetic.write(tmp_path / "known")


@pytest.fixture
def used(tmp_path: Path) -> Uses:
    return uses(synthetic.write_plugin(tmp_path / "root"), "plugin")


@pytest.fixture
def changes(known: Release, used: Uses, tmp_path: Path) -> Any:
    def changes(**changed: Any) -> dict[tuple[str, str], Change]:
        new = synthetic.write(tmp_path / "new", "0.91.0", **changed).sources
        found = names.compare_names(used, known.sources, new)
        found += names.compare_bases(used.subclasses, known.sources, new)
        return {(change.kind, change.name): change for change in found}

    return changes


def test_what_a_package_uses_is_read_from_its_files(used):
    assert used.names.keys() == {
        ("vllm", "managing"),
        ("vllm", "managing.capacity"),
        ("vllm.managing", "Manager"),
        ("vllm.planning", "plan"),
    }
    (subclass,) = used.subclasses
    assert (subclass.name, subclass.base) == ("plugin.ours.Ours", ("vllm.managing", "Manager"))
    assert subclass.defines.keys() == {"find"}
    assert subclass.asks_for == {"free", "blocks"}


def test_the_plugin_uses_what_it_says_it_does():
    used = uses()
    assert ("vllm.v1.core.kv_cache_coordinator", "HybridKVCacheCoordinator") in used.names
    backends = {subclass.name.rpartition(".")[2]: subclass for subclass in used.subclasses}
    assert backends["K8V4AttentionBackend"].base[1] == "AttentionBackend"
    # By way of its own FixedPointCoordinator.
    assert backends["HybridAwareCoordinator"].base[1] == "HybridKVCacheCoordinator"
    assert "find_longest_cache_hit" in backends["HybridAwareCoordinator"].defines


def test_nothing_changed_is_nothing_found(changes):
    assert changes() == {}


def test_a_name_that_is_gone_breaks_and_is_looked_for(changes):
    text = synthetic.FILES["planning.py"]
    found = changes(planning="def capacity(config):\n    return 1\n", sizing=text)
    change = found["gone", "vllm.planning.plan"]
    assert change.breaks
    assert change.detail == "now in vllm.sizing.plan"
    assert change.used_in == ("plugin/ours.py",)


def test_a_name_behind_a_module_is_looked_for_too(changes):
    found = changes(
        **edited("managing", ("import capacity", "import capacity as c"), (" capacity(", " c("))
    )
    assert found["gone", "vllm.managing.capacity"].breaks


def test_without_the_known_release_what_is_gone_is_found(used, tmp_path):
    new = synthetic.write(tmp_path / "new", planning="capacity = 1\n").sources
    (change,) = names.compare_names(used, None, new)
    assert (change.kind, change.name) == ("gone", "vllm.planning.plan")


@pytest.mark.parametrize(
    ("new", "breaks"),
    [
        (["config", "sizes=1"], False),
        (["config", "sizes=1", "more=2"], False),
        (["config", "sizes=1", "**more"], False),
        (["config", "sizes"], True),
        (["sizes=1"], True),
        (["sizes=1", "config=2"], True),
        (["config", "sizes=1", "more"], True),
    ],
)
def test_calls_break_where_a_parameter_is_gone_moved_or_required(new, breaks):
    assert breaks_callers(["config", "sizes=1"], new) == breaks


def test_another_signature_of_a_function_is_told(changes):
    found = changes(**edited("planning", ("sizes=(1, 2)", "sizes=(1, 2), unit=None")))
    change = found["signature", "vllm.planning.plan"]
    assert (change.detail, change.breaks) == ("came: unit=None", False)


def test_an_overridden_method_with_other_parameters_breaks(changes):
    found = changes(
        **edited("managing", ("def find(self, hashes):", "def find(self, hashes, lookahead=0):"))
    )
    change = found["signature", "vllm.managing.Manager.find"]
    assert change.detail == "came: lookahead=0; overridden"
    assert change.breaks


def test_an_overridden_method_that_is_gone_breaks(changes):
    found = changes(
        **edited(
            "managing",
            ("@abstractmethod\n            def find(self, hashes): ...", "def other(self): ..."),
            ("def find(self, hashes):", "def search(self, hashes):"),
        )
    )
    assert found["gone", "vllm.managing.Manager.find"].breaks


def test_what_a_subclass_asks_its_base_for_is_followed_to_the_bases_of_that(changes):
    found = changes(
        **edited("managing", ("def free(self, block):", "def release(self, block):")),
    )
    assert found["gone", "vllm.managing.Base.free"].breaks


def test_an_attribute_that_a_method_no_longer_sets_breaks(changes):
    found = changes(**edited("managing", ("self.blocks =", "self.all_blocks =")))
    assert found["gone", "vllm.managing.Manager.blocks"].breaks


def test_a_new_abstract_method_has_to_be_defined(changes):
    method = "@abstractmethod\n            def touch(self, block): ...\n\n            "
    found = changes(**edited("managing", ("@abstractmethod\n", f"{method}@abstractmethod\n")))
    change = found["abstract", "vllm.managing.Base.touch"]
    assert change.breaks
    assert change.detail == "plugin.ours.Ours has to define it"


def test_a_new_method_of_a_base_is_told(changes):
    found = changes(
        **edited("managing", ("unit: int = 16", "unit: int = 16\n            window: int = 0"))
    )
    change = found["new", "vllm.managing.Manager"]
    assert change.detail == "new, and could be overridden: window"
    assert not change.breaks


def test_names_are_followed_through_stars_branches_and_relative_imports(tmp_path):
    sources = synthetic.write(
        tmp_path,
        planning="from .sizing import plan\n",
        **{
            "sizing/__init__": "from .all import *\n",
            "sizing/all": "try:\n    from ..fast import plan\nexcept OSError:\n    plan = None\n",
            "fast": "if True:\n    def plan(): ...\nelse:\n    plan = None\n",
        },
    ).sources
    found = sources.find("vllm.planning", "plan")
    assert str(found) == "vllm.fast.plan"
    assert sources.find("vllm.planning", "other") is None


def test_imports_in_a_circle_end(tmp_path):
    files = {"planning": "from .sizing import plan\n", "sizing": "from .planning import plan\n"}
    assert synthetic.write(tmp_path, **files).sources.find("vllm.planning", "plan") is None


def test_a_file_that_this_python_cannot_read_has_no_names(tmp_path):
    sources = synthetic.write(tmp_path, planning="def plan(:\n").sources
    assert sources.find("vllm.planning", "plan") is None


def around(known: Release, new: Release, used: Uses) -> Surroundings:
    targets = [
        Target(module, name, Fingerprint("", "")) for module, name in synthetic.PLACES.values()
    ]
    pairs = [(target, target) for target in targets]
    return surroundings.compare(known, new, pairs, used.subclasses)


def test_a_new_importer_of_a_rebound_function_is_told(known, used, tmp_path):
    new = synthetic.write(
        tmp_path / "new",
        **{
            "store/__init__": "",
            "store/a": "from ..planning import plan\nplan(1)\n",
            "store/b": "def late():\n    from vllm.planning import plan as p\n    p(1)\n",
            "store/c": "from vllm.planning import plan\nPLANNERS = {'plan': plan}\n",
            "store/d": "from elsewhere import plan\n",
        },
    )
    assert around(known, new, used).holders == (
        "new: plan imported by vllm.store.a, at the top",
        "new: plan imported by vllm.store.b, inside a function",
        "new: plan imported by vllm.store.c, kept as a value in line 2",
    )
    assert around(new, known, used).holders[0].startswith("gone: plan imported by vllm.store.a")


def test_checks_of_classes_and_ways_in_that_are_new_are_told(known, used, tmp_path):
    offload = """
        from vllm import managing


        def register_dtype(name): ...


        def get_block_cls(): ...


        def get_blocks(): ...


        class PlanBuilder:
            def ready(self, manager):
                return isinstance(manager, (int, managing.Manager))
        """
    found = around(known, synthetic.write(tmp_path / "new", offload=offload), used)
    assert found.class_checks == ("new: Manager in vllm.offload: isinstance",)
    assert found.ways_in == (
        "new: PlanBuilder in vllm.offload",
        "new: get_block_cls in vllm.offload",
        "new: register_dtype in vllm.offload",
    )


def test_other_requirements_are_told(known, used, tmp_path):
    new = synthetic.write(tmp_path / "new", "0.91.0")
    metadata = new.folder / "vllm-0.91.0.dist-info" / "METADATA"
    text = metadata.read_text().replace("torch==2.14.0", "torch>=2.15")
    metadata.write_text(text.replace(">=3.11", ">=3.12"))
    assert around(known, Release(new.folder), used).requirements == (
        "torch: ==2.14.0 became >=2.15",
        "Python: >=3.11 became >=3.12",
    )


def test_what_is_watched_is_in_the_installed_vllm():
    from tests.drift.release import installed

    here = installed()
    assert here is not None
    assert isinstance(here.sources, Sources)
    missing = [name for name in surroundings.WATCHED if here.sources.find(*name) is None]
    assert not missing
