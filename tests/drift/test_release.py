# SPDX-License-Identifier: Apache-2.0
"""A release is had from a folder, a wheel or pip, and what cannot be had is one message."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests.drift import release, synthetic
from tests.drift.release import DriftError, Release


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(release, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def make_wheel(folder: Path, package: str = "vllm", name: str = "vllm") -> Path:
    """Write a wheel of the small vLLM, which no platform here would be offered by pip's rules."""
    source = synthetic.write(folder / "source", "0.90.0").folder
    wheel = folder / f"{name}-0.90.0-py3-none-any.whl"
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


def test_a_folder_is_taken_as_it_is(tmp_path):
    folder = synthetic.write(tmp_path / "unpacked", "0.90.3").folder
    found = release.get(str(folder))
    assert (found.version, found.minor) == ("0.90.3", (0, 90))
    assert found.requirement("torch") == "==2.14.0"
    assert found.requirement("numba") is None
    assert found.metadata["Requires-Python"] == [">=3.11"]


def test_a_wheel_is_unpacked_beside_the_environment(tmp_path, cache):
    found = release.get(str(make_wheel(tmp_path)))
    assert found.folder.parent == cache
    assert found.version == "0.90.0"
    assert found.sources.find("vllm.planning", "plan") is not None


def test_a_version_is_downloaded_by_pip_once(tmp_path, cache):
    wheel = make_wheel(tmp_path)
    offline = ["--no-index", "--find-links", str(tmp_path)]
    found = release.get("0.90", offline)
    assert (found.folder, found.version) == (cache / "vllm-0.90.0", "0.90.0")
    wheel.unlink()
    assert release.get("0.90.0", offline).folder == found.folder


def test_a_release_of_a_minor_is_found_where_it_was_unpacked(tmp_path, cache):
    release.get("0.90.0", ["--no-index", "--find-links", str(make_wheel(tmp_path).parent)])
    found = release.at_hand((0, 90))
    assert found is not None
    assert found.folder == cache / "vllm-0.90.0"
    assert release.at_hand((0, 91)) is None


def test_the_installed_release_is_not_downloaded():
    here = release.installed()
    assert here is not None
    found = release.get(here.version.partition("+")[0], ["--no-index"])
    assert found.installed


def test_a_version_without_metadata_is_read_from_vllms_own_file(tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    with pytest.raises(DriftError, match="does not say its version"):
        assert Release(tmp_path).version
    line = '__version__ = version = "0.92.1.dev3+g1234"\n'
    (tmp_path / "vllm" / "_version.py").write_text(line)
    assert Release(tmp_path).version == "0.92.1.dev3+g1234"


def test_a_version_that_pip_does_not_have_is_one_message(tmp_path):
    with pytest.raises(
        DriftError, match=r"pip found no vllm==0\.99\.0: .*No matching dist"
    ) as error:
        release.get("0.99.0", ["--no-index", "--find-links", str(tmp_path)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wanted", ["next", "0.34.0; rm", "vllm==0.34.0", "--help", ""])
def test_what_is_no_version_is_not_given_to_pip(wanted, monkeypatch):
    monkeypatch.setattr(release.subprocess, "run", None)
    with pytest.raises(DriftError, match="neither a version such as"):
        release.get(wanted or "no/such/folder")


@pytest.mark.parametrize("damage", ["cut short", "bytes", "empty"])
def test_a_damaged_wheel_is_one_message_and_leaves_nothing(damage, tmp_path, cache):
    wheel = make_wheel(tmp_path)
    data = bytearray(wheel.read_bytes())
    if damage == "cut short":
        data = data[: len(data) // 2]
    elif damage == "bytes":
        # Of a file that comes after others: what was unpacked before it must not stay.
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


def test_a_wheel_of_something_else_is_one_message(tmp_path):
    wheel = make_wheel(tmp_path, package="vlm")
    with pytest.raises(DriftError, match="is not a wheel of vLLM"):
        release.get(str(wheel))


def test_a_wheel_or_folder_that_is_not_there_is_one_message(tmp_path):
    with pytest.raises(DriftError, match="there is no wheel"):
        release.get(str(tmp_path / "vllm-0.34.0.whl"))
    with pytest.raises(DriftError, match="there is no vLLM in"):
        release.get(str(tmp_path))
