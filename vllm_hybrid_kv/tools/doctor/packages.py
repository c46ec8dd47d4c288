# SPDX-License-Identifier: Apache-2.0
"""Package metadata, read without importing any installed package."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

PLUGINS_GROUP = "vllm.general_plugins"
"""The entry point group of vLLM's plugins."""


@dataclass(frozen=True)
class Copy:
    """One set of a package's metadata.

    Attributes:
        package: Name of the package.
        version: Its version.
        folder: The folder on `sys.path` that contains the metadata.
        has_vllm: Whether the module `vllm` is one of its files.
    """

    package: str
    version: str
    folder: str
    has_vllm: bool

    def __str__(self) -> str:
        return f"{self.package} {self.version} in {self.folder}"


def copies(package: str) -> list[Copy]:
    """Return the metadata of a package in the order of `sys.path`, without duplicates."""
    found: dict[tuple[str, str], Copy] = {}
    for distribution in importlib.metadata.distributions(name=package):
        folder = str(Path(str(distribution.locate_file(""))).resolve())
        files = distribution.files or []
        has_vllm = any(file.parts[:2] == ("vllm", "__init__.py") for file in files)
        key = folder, distribution.version
        found.setdefault(key, Copy(package, distribution.version, folder, has_vllm))
    return list(found.values())


def plugins() -> list[dict[str, str]]:
    """Return `name`, `value` and `package` (with its version, may be empty) of vLLM's plugins."""
    return [
        {
            "name": point.name,
            "value": point.value,
            "package": f"{point.dist.name} {point.dist.version}" if point.dist else "",
        }
        for point in importlib.metadata.entry_points(group=PLUGINS_GROUP)
    ]


def package_of(module: str) -> str:
    """Return the package and version that contain a module; empty if no metadata mentions it."""
    top = module.partition(".")[0]
    for plugin in plugins():
        if plugin["package"] and plugin["value"].partition(":")[0].partition(".")[0] == top:
            return plugin["package"]
    for name in importlib.metadata.packages_distributions().get(top, ()):
        return f"{name} {importlib.metadata.version(name)}"
    return ""
