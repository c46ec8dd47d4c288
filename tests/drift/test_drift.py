# SPDX-License-Identifier: Apache-2.0
"""The drift command classifies and reports changes in vLLM, and writes new hashes to the table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.drift import __main__ as command
from tests.drift import comparison, release
from tests.drift.release import DriftError, Release
from vllm_hybrid_kv.patches import targets
from vllm_hybrid_kv.patches.mechanism import source_hash

PLAN = """
def plan(config, sizes=(1, 2)):
    # The order of sizes is kept.
    total = 0
    for size in sizes:
        total += size
    return config, total
"""
CHANGED = PLAN.replace("total += size", "total -= size")
MANAGER = """
class Manager:
    @classmethod
    def make(cls, config):
        return cls(config)
"""
MINOR = "0.90"


def write(folder: Path, **files: str) -> Release:
    """Write a vLLM release. Each keyword names a module, its value is the source."""
    (folder / "vllm").mkdir(parents=True)
    for name, text in {"planning": PLAN, "managing": MANAGER, **files}.items():
        (folder / "vllm" / f"{name}.py").write_text(text)
    metadata = folder / "vllm-0.90.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.90.0\n")
    return Release(folder)


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Release:
    known = write(tmp_path / "known")
    table = {
        module: {name: (source_hash(known.code(module, name)),)}
        for module, name in (("vllm.planning", "plan"), ("vllm.managing", "Manager.make"))
    }
    monkeypatch.setattr(targets, "MINORS", (MINOR,))
    monkeypatch.setattr(targets, "PATCHED", table)
    monkeypatch.setattr(targets, "RELIED_ON", {})
    monkeypatch.setattr(targets, "OFFLOADING", {})
    monkeypatch.setattr(command, "of_minor", lambda minor: known)
    return known


OTHER = "def plan(route):\n    return sorted(route)\n"


@pytest.mark.parametrize(
    ("files", "name", "kinds", "module"),
    [
        ({"planning": PLAN.replace("# The", "# Any")}, "plan", (), "vllm.planning"),
        ({"planning": CHANGED}, "plan", ("changed",), "vllm.planning"),
        ({"planning": PLAN.replace("plan", "make_plan")}, "plan", ("gone",), None),
        ({"planning": "", "sizing": PLAN}, "plan", ("moved",), "vllm.sizing"),
        ({"planning": "", "sizing": CHANGED}, "plan", ("moved", "changed"), "vllm.sizing"),
        # The function in the other module has the same name, but its code is unrelated.
        ({"planning": "", "routing": OTHER}, "plan", ("gone",), None),
        ({"planning": "", "a": OTHER, "b": CHANGED}, "plan", ("moved", "changed"), "vllm.b"),
        ({"managing": "", "managers": MANAGER}, "Manager.make", ("moved",), "vllm.managers"),
    ],
)
def test_a_change_of_a_function_has_its_kind(files, name, kinds, module, known, tmp_path, capsys):
    new = write(tmp_path / "new", **files)
    found = {one.target.name: one for one in comparison.compare(MINOR, known, new)}
    assert (found[name].kinds, found[name].module) == (kinds, module)
    assert [one.target.name for one in found.values() if one.kinds] == ([name] if kinds else [])
    assert any("total -= size" in line for line in found[name].diff) is ("changed" in kinds)
    assert command.main([str(new.folder)]) == bool(kinds)
    assert "\n".join(found[name].diff) in capsys.readouterr().out


def test_without_a_known_release_there_are_no_diffs(known, tmp_path):
    found, _ = comparison.compare(MINOR, None, write(tmp_path / "new", planning=CHANGED))
    assert (found.kinds, found.diff) == (("changed",), [])


def test_a_version_is_downloaded_once_as_is_a_wheel(tmp_path, monkeypatch):
    monkeypatch.setattr(release, "CACHE", tmp_path)
    calls = []

    def pip(*arguments):
        calls.append(arguments[-1])
        target = Path(arguments[arguments.index("--target") + 1])
        for path in write(tmp_path / f"source{len(calls)}").folder.iterdir():
            path.rename(target / path.name)

    monkeypatch.setattr(release, "pip", pip)
    for wanted in ("0.90", "0.90.0", "vllm-0.90.0-py3-none-any.whl"):
        assert release.get(wanted).version == "0.90.0"
    assert calls == ["vllm==0.90.0", "vllm-0.90.0-py3-none-any.whl"]
    assert release.of_minor("0.90") == Release(tmp_path / "vllm-0.90.0")
    assert release.of_minor("0.91") is None


def test_the_installed_release_has_the_supported_functions_and_is_not_downloaded(monkeypatch):
    monkeypatch.setattr(release, "pip", None)
    here = release.get(release.installed().version.partition("+")[0])
    assert not [one for one in comparison.compare(here.minor, None, here) if one.kinds]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        *((text, "is neither a version such as") for text in ("next", "0.34.0; rm", "--x", "a/b")),
        ("0.99.0", r"pip install .* vllm==0\.99\.0 failed"),
        ("missing.whl", r"pip install .* missing\.whl failed"),
        (".", "no unpacked wheel of vLLM in"),
    ],
)
def test_a_missing_release_is_an_error_and_leaves_nothing(wanted, message, tmp_path, monkeypatch):
    monkeypatch.setattr(release, "CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DriftError, match=message):
        assert release.get(wanted, ["--no-index"]).version
    assert not [path for path in tmp_path.glob("cache/*") if path.is_dir()]
    assert wanted == "--x" or command.main([wanted, "--pip-args=--no-index"]) == 2


@pytest.fixture(scope="module")
def next_minor() -> list[comparison.Found]:
    known, new = release.of_minor("0.32"), release.of_minor("0.33")
    return comparison.compare("0.32", known, new)


def test_the_functions_with_other_hashes_or_places_in_0_33_have_changed(next_minor):
    def all_of(minor):
        tables = [getattr(targets, name) for name in comparison.TABLES]
        return {k: v for table in tables for k, v in targets.targets_of(minor, table).items()}

    before, after = all_of("0.32"), all_of("0.33")
    changed = {one.target.name: one.kinds for one in next_minor if one.kinds}
    assert changed.keys() == {name for name in before if before[name] != after[name]}
    assert changed["get_kv_cache_groups"] == ("moved", "changed")
    assert changed["unify_kv_cache_spec_page_size"] == ("moved",)


def test_the_written_column_is_the_one_in_the_package(next_minor):
    written = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--stdin-filename", "targets.py", "-"],
        input=comparison.source_with(next_minor, "0.33"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert written.stdout == Path(targets.__file__).read_text()


def test_the_written_file_has_the_new_minor_and_keeps_the_others(next_minor):
    namespace = {"__name__": "written"}
    exec(comparison.source_with(next_minor, "0.34"), namespace)
    assert namespace["MINORS"] == (*targets.MINORS, "0.34")
    for table in comparison.TABLES:
        for minor in (*targets.MINORS, "0.34"):
            old = targets.targets_of("0.33" if minor == "0.34" else minor, getattr(targets, table))
            assert namespace["targets_of"](minor, namespace[table]) == old
    # Without findings, every function counts as gone and gets no hash.
    exec(comparison.source_with([], "0.33"), namespace)
    assert namespace["targets_of"]("0.33") == {}
    assert namespace["targets_of"]("0.32") == targets.targets_of("0.32")
