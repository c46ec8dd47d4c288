# SPDX-License-Identifier: Apache-2.0
"""Whose functions stand where the plugin rebinds vLLM's names. Runs in the probe's process."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vllm_hybrid_kv.patches.base import Target, globals_among, underlying
from vllm_hybrid_kv.tools.doctor.installation import PLUGINS_GROUP

OF_THE_PAIR = ("vllm", "vllm_hybrid_kv")
"""The packages whose functions are meant to stand there."""


@dataclass(frozen=True)
class Foreign:
    """A function that is neither vLLM's nor ours.

    Attributes:
        place: Where it stands.
        module: The module that it was defined in.
        package: The package and version that the module belongs to, or empty.
    """

    place: str
    module: str
    package: str


class Places:
    """Where vLLM's functions stand, remembered before plugins are loaded.

    A name that was imported by another module stands there as well. A plugin that rebinds it only
    there, or before we do, is not seen by comparing identities with our own edits alone.
    """

    def __init__(self, known: Any) -> None:
        """Import what an adapter knows and remember where it stands.

        Args:
            known: A dataclass of `Target`s among other things.
        """
        self._owned: list[Target] = []
        self._globals: dict[str, tuple[str, str]] = {}
        # Functions that are what the adapter knows are vLLM's, whatever module decorates them.
        self._vllms: list[Any] = []
        functions: dict[int, Any] = {}
        for field in dataclasses.fields(known):
            target = getattr(known, field.name)
            if isinstance(target, Target):
                self._owned.append(target)
                binding = _binding(target)
                functions[id(binding)] = binding
                if not target.problems():
                    self._vllms.append(binding)
        for module, name, _ in globals_among(functions):
            # Not where whoever rebinds it keeps it.
            if module.partition(".")[0] != "vllm":
                continue
            self._globals[f"{module}.{name}"] = (module, name)

    def foreign(self) -> list[Foreign]:
        """Return what stands there now and belongs to neither vLLM nor us."""
        found = []
        for place, value in self._standing():
            if value is None or any(value is known for known in self._vllms):
                continue
            module = module_of(value)
            if module.partition(".")[0] not in OF_THE_PAIR:
                found.append(Foreign(place, module, package_of(module)))
        return sorted(found, key=lambda foreign: foreign.place)

    def _standing(self) -> Iterator[tuple[str, Any]]:
        for place, (module, name) in self._globals.items():
            yield place, getattr(sys.modules.get(module), name, None)
        for target in self._owned:
            if str(target) not in self._globals:
                yield str(target), _binding(target)


def _binding(target: Target) -> Any:
    try:
        return target.binding()
    except (ImportError, AttributeError, KeyError):
        return None


def module_of(value: Any) -> str:
    """Return the module in which a function was defined, whatever it says that it wraps."""
    try:
        function = underlying(value)
    except TypeError:
        return str(getattr(type(value), "__module__", ""))
    return str(function.__globals__.get("__name__", ""))


def package_of(module: str) -> str:
    """Return the package and version that a module came with; empty where metadata has none."""
    top = module.partition(".")[0]
    for point in importlib.metadata.entry_points(group=PLUGINS_GROUP):
        if point.dist is not None and point.value.partition(":")[0].partition(".")[0] == top:
            return f"{point.dist.name} {point.dist.version}"
    for name in importlib.metadata.packages_distributions().get(top, ()):
        return f"{name} {importlib.metadata.version(name)}"
    return ""
