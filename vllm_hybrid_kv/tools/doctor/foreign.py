# SPDX-License-Identifier: Apache-2.0
"""Find functions of other packages in the places where the plugin patches vLLM."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from vllm_hybrid_kv.patches.mechanism import Target, globals_among, underlying

PLUGINS_GROUP = "vllm.general_plugins"
"""The entry point group of vLLM's plugins."""


class Places:
    """The places that hold vLLM's target functions, recorded before plugins are loaded.

    A place is the module or class that defines a function, or a module of vLLM that imported it by
    name. A check of our own edits would miss a plugin that patches only a calling module, or that
    patches before we do.
    """

    def __init__(self, targets: Iterable[Target]) -> None:
        targets = list(targets)
        # A function with a supported source counts as vLLM's, even if another module decorates it.
        self._vllms = [_binding(target) for target in targets if not target.problems()]
        self._places: dict[str, Callable[[], Any]] = {
            str(target): partial(_binding, target) for target in targets
        }
        wanted = {id(value): value for value in map(_binding, targets) if value is not None}
        for module, name, _ in globals_among(wanted):
            if module.partition(".")[0] == "vllm":  # not where a plugin stores the original
                self._places[f"{module}.{name}"] = partial(getattr, sys.modules[module], name, None)

    def foreign(self) -> list[dict[str, str]]:
        """Return functions in these places that are neither vLLM's nor ours.

        Each is a dict: the `place`, the `module` that defines the function, its `package` or "".
        """
        found = []
        for place, read in sorted(self._places.items()):
            value = read()
            if value is None or any(value is known for known in self._vllms):
                continue
            module = module_of(value)
            if module.partition(".")[0] not in ("vllm", "vllm_hybrid_kv"):
                found.append({"place": place, "module": module, "package": package_of(module)})
        return found


def _binding(target: Target) -> Any:
    try:
        return target.binding()
    except (ImportError, AttributeError, KeyError):
        return None


def module_of(value: Any) -> str:
    """Return the module that defines a function. After `functools.wraps`, `__module__` is wrong."""
    try:
        function = underlying(value)
    except TypeError:
        return str(getattr(type(value), "__module__", ""))
    return str(function.__globals__.get("__name__", ""))


def package_of(module: str) -> str:
    """Return the package and version that contain a module; empty if no metadata mentions it."""
    top = module.partition(".")[0]
    for point in importlib.metadata.entry_points(group=PLUGINS_GROUP):
        if point.dist and point.module.partition(".")[0] == top:
            return f"{point.dist.name} {point.dist.version}"
    for name in importlib.metadata.packages_distributions().get(top, ()):
        return f"{name} {importlib.metadata.version(name)}"
    return ""
