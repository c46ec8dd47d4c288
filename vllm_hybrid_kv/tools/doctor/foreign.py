# SPDX-License-Identifier: Apache-2.0
"""Finds functions of other packages in the places that the plugin patches."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from vllm_hybrid_kv.patches.mechanism import Target, globals_among, underlying
from vllm_hybrid_kv.tools.doctor.packages import package_of

EXPECTED = ("vllm", "vllm_hybrid_kv")
"""The packages whose functions belong there."""


class Places:
    """Where vLLM's target functions are, recorded before plugins are loaded.

    These are the defining modules and classes, and every module of vLLM that imported a function
    by name. Comparing identities with our own edits misses a plugin that patches only a calling
    module, or that patches before we do.
    """

    def __init__(self, targets: Iterable[Target]) -> None:
        """Import the targets and record their places."""
        self._targets = list(targets)
        bindings = {str(target): _binding(target) for target in self._targets}
        # A function with a supported source is vLLM's, whatever module decorates it.
        self._vllms = [bindings[str(target)] for target in self._targets if not target.problems()]
        wanted = {id(value): value for value in bindings.values() if value is not None}
        self._globals = {
            f"{module}.{name}": (module, name)
            for module, name, _ in globals_among(wanted)
            if module.partition(".")[0] == "vllm"  # not where a plugin stores the original
        }

    def foreign(self) -> list[dict[str, str]]:
        """Return functions in these places that are neither vLLM's nor ours.

        Returns:
            `place`, the `module` that defines the function, and its `package` (may be empty).
        """
        found = []
        for place, value in sorted(self._current(), key=lambda item: item[0]):
            if value is None or any(value is known for known in self._vllms):
                continue
            module = module_of(value)
            if module.partition(".")[0] not in EXPECTED:
                found.append({"place": place, "module": module, "package": package_of(module)})
        return found

    def _current(self) -> Iterator[tuple[str, Any]]:
        for place, (module, name) in self._globals.items():
            yield place, getattr(sys.modules.get(module), name, None)
        for target in self._targets:
            if str(target) not in self._globals:
                yield str(target), _binding(target)


def _binding(target: Target) -> Any:
    try:
        return target.binding()
    except (ImportError, AttributeError, KeyError):
        return None


def module_of(value: Any) -> str:
    """Return the module that defines a function; `functools.wraps` does not hide it."""
    try:
        function = underlying(value)
    except TypeError:
        return str(getattr(type(value), "__module__", ""))
    return str(function.__globals__.get("__name__", ""))
