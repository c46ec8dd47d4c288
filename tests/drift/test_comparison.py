# SPDX-License-Identifier: Apache-2.0
"""Changes of a function are classified, in a small vLLM that is made of files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.drift import comparison
from tests.drift.comparison import Comparison
from tests.drift.release import DriftError, Release
from vllm_hybrid_kv.patches import targets

PLAN = """
def plan(config, sizes=(1, 2)):
    # The order of sizes is kept.
    total = 0
    for size in sizes:
        total += size
    return config, total
"""
MANAGER = """
from vllm.planning import plan

class Manager:
    @classmethod
    def make(cls, config):
        return cls(config)
"""
MINOR = "0.90"


def write(folder: Path, **files: str) -> Release:
    """Write a release; a module is named by a keyword."""
    (folder / "vllm").mkdir(parents=True)
    texts = {
        "__init__": "from .version import __version__\n",
        "version": '__version__ = "0.90.0"\n',
        "planning": PLAN,
        "managing": MANAGER,
        **files,
    }
    for name, text in texts.items():
        (folder / "vllm" / f"{name}.py").write_text(text)
    metadata = folder / "vllm-0.90.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: vllm\nVersion: 0.90.0\nRequires-Dist: torch==2.14\n")
    return Release(folder)


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Release:
    release = write(tmp_path / "known")
    places = ["vllm.planning:plan", "vllm.managing:Manager.make"]
    functions = comparison.read_release(release, places)["functions"]
    table = {
        place.partition(":")[0]: {place.partition(":")[2]: (functions[place]["hash"],)}
        for place in places
    }
    monkeypatch.setattr(targets, "MINORS", (MINOR,))
    monkeypatch.setattr(targets, "PATCHED", table)
    monkeypatch.setattr(targets, "RELIED_ON", {})
    monkeypatch.setattr(
        comparison.Sources, "imports_of", lambda *_: {("vllm.planning", "plan"): "a"}
    )
    return release


@pytest.fixture
def compare(known, tmp_path):
    def compare(**files: str) -> Comparison:
        return comparison.compare(MINOR, known, write(tmp_path / "new", **files))

    return compare


def kinds(found: Comparison) -> dict[str, tuple[str, ...]]:
    return {change.target.name: change.kinds for change in found.changed}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("# The order", "# Any order", ()),
        ("total += size", "total -= size", ("source",)),
        ("sizes=(1, 2)", "sizes=(1, 2), unit=16", ("source", "signature")),
        ("def plan", "def make_plan", ("gone",)),
    ],
)
def test_a_change_of_a_function_has_its_kind(old, new, expected, compare):
    found = compare(planning=PLAN.replace(old, new), managing=MANAGER.replace("plan\n", "*\n"))
    assert kinds(found).get("plan", ()) == expected


def test_a_function_that_moved_and_changed_is_found_by_its_name(compare):
    text = PLAN.replace("total += size", "total -= size")
    found = compare(planning="", sizing=text, managing=MANAGER.replace("planning", "sizing"))
    assert kinds(found) == {"plan": ("moved", "source")}
    assert found.changed[0].place == "vllm.sizing:plan"


def test_a_function_that_can_still_be_imported_has_not_moved(compare):
    found = compare(planning="from vllm.sizing import plan\n", sizing=PLAN)
    assert found.fits


def test_another_function_of_the_same_name_is_not_the_moved_one(compare):
    another = "def plan(route):\n    return sorted(route)\n"
    found = compare(planning="", routing=another, managing="")
    assert kinds(found)["plan"] == ("gone",)
    (line,) = found.broken_imports
    assert line.startswith("vllm.planning.plan, imported by a: ModuleNotFoundError")


def test_a_method_of_a_class_that_moved_has_moved(compare):
    found = compare(managing="", managers=MANAGER)
    assert kinds(found) == {"Manager.make": ("moved",)}


def test_a_module_that_keeps_a_function_as_a_value_is_named(compare):
    found = compare(table="from vllm.planning import plan\n\nRULES = {'plan': plan}\n")
    assert found.importers == ("new: vllm.table imports plan, keeps it as a value in line 3",)


def test_without_a_known_release_hashes_differ_and_there_are_no_diffs(known, tmp_path):
    release = write(tmp_path / "new", planning=PLAN.replace("total += size", "total -= size"))
    found = comparison.compare(MINOR, None, release)
    assert kinds(found) == {"plan": ("source",)}
    assert found.changed[0].diff == ()


def test_a_release_that_cannot_be_imported_is_one_message(known, tmp_path):
    release = write(tmp_path / "new", __init__="import torch_of_tomorrow\n")
    with pytest.raises(DriftError, match=r"vLLM 0\.90\.0 .* cannot be imported: ModuleNotFound"):
        comparison.compare(MINOR, known, release)
