# SPDX-License-Identifier: Apache-2.0
"""A release comes from a folder, a wheel or pip, and a missing one is reported in one message."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests.drift import release
from tests.drift.release import DriftError, Release
from tests.drift.test_comparison import write


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(release, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def make_wheel(folder: Path, package: str = "vllm") -> Path:
    """Write a wheel of the small vLLM."""
    source = write(folder / "source").folder
    wheel = folder / "vllm-0.90.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(source.rglob("*")):
            inside = str(file.relative_to(source)).replace("vllm/", f"{package}/", 1)
            archive.write(file, inside)
        information = "vllm-0.90.0.dist-info"
        archive.writestr(
            f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{information}/RECORD", "")
    return wheel


def test_a_folder_is_used_unchanged(tmp_path):
    found = release.get(str(write(tmp_path / "unpacked").folder))
    assert (found.version, found.minor) == ("0.90.0", "0.90")
    assert found.requirement("torch") == "==2.14"
    assert found.requirement("numba") is None


def test_a_version_is_downloaded_by_pip_once(tmp_path, cache):
    wheel = make_wheel(tmp_path)
    offline = ["--no-index", "--find-links", str(tmp_path)]
    found = release.get("0.90", offline)
    assert (found.folder, found.version) == (cache / "vllm-0.90.0", "0.90.0")
    wheel.unlink()
    assert release.get("0.90.0", offline).folder == found.folder
    of_minor = release.of_minor("0.90")
    assert of_minor is not None
    assert of_minor.folder == found.folder
    assert release.of_minor("0.91") is None


def test_the_installed_release_is_not_downloaded():
    here = release.installed()
    assert here is not None
    assert release.get(here.version.partition("+")[0], ["--no-index"]).installed


def test_a_version_without_metadata_is_read_from_vllms_own_file(tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    with pytest.raises(DriftError, match="does not say its version"):
        assert Release(tmp_path).version
    line = '__version__ = version = "0.92.1.dev3+g1234"\n'
    (tmp_path / "vllm" / "_version.py").write_text(line)
    assert Release(tmp_path).version == "0.92.1.dev3+g1234"


@pytest.mark.parametrize("wanted", ["next", "0.34.0; rm", "vllm==0.34.0", "--help", "no/folder"])
def test_text_that_is_not_a_version_is_not_passed_to_pip(wanted, monkeypatch):
    monkeypatch.setattr(release.subprocess, "run", None)
    with pytest.raises(DriftError, match="neither a version such as"):
        release.get(wanted)


@pytest.mark.parametrize("damage", ["cut short", "bytes", "empty"])
def test_a_damaged_wheel_is_one_message_and_leaves_nothing(damage, tmp_path, cache):
    wheel = make_wheel(tmp_path)
    data = bytearray(wheel.read_bytes())
    if damage == "cut short":
        data = data[: len(data) // 2]
    elif damage == "bytes":
        # In a file after others: what was unpacked before it must not stay.
        with zipfile.ZipFile(wheel) as archive:
            file = archive.getinfo("vllm/planning.py")
        begin = file.header_offset + 30 + len(file.filename)
        data[begin : begin + 20] = bytes(20)
    else:
        data = bytearray()
    wheel.write_bytes(data)
    with pytest.raises(DriftError, match=r"the wheel .* is damaged \(.*\): download it again"):
        release.get(str(wheel))
    assert not [path for path in cache.glob("*") if (path / "vllm" / "__init__.py").is_file()]


def test_a_wheel_of_another_package_and_an_empty_folder_are_one_message_each(tmp_path):
    with pytest.raises(DriftError, match="is not a wheel of vLLM"):
        release.get(str(make_wheel(tmp_path, package="vlm")))
    with pytest.raises(DriftError, match="there is no vLLM in"):
        release.get(str(tmp_path))
