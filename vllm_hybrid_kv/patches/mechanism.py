# SPDX-License-Identifier: Apache-2.0
"""Patches functions of vLLM: all or none, verified by identity, and undoable.

Before the first patch is applied, the source hash of every target is compared with the hash in
`targets` for this vLLM minor. If one differs, nothing is applied. A function is replaced in its own
module and in every module that imported it by name; modules imported later import the replacement.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import pkgutil
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from vllm_hybrid_kv.errors import HybridKVFingerprintError, HybridKVPatchError
from vllm_hybrid_kv.version import __version__

CHECKED = " (checked, not patched)"
"""Added to the name of a function that the plugin relies on but does not patch."""


@dataclass(frozen=True)
class Target:
    """A function or method of vLLM, and the hash of its supported source.

    Attributes:
        module: The module that defines the target.
        name: The name in the module, `Class.method` for a method.
        source: The hash that `source_hash` returns for the supported source.
    """

    module: str
    name: str
    source: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    def owner(self) -> Any:
        """Import the module, and return the module or, for a method, the class."""
        return pkgutil.resolve_name(f"{self.module}:{self.name.rpartition('.')[0]}")

    def binding(self) -> Any:
        """Return what the owner's namespace holds: for a class method, the `classmethod` object."""
        return vars(self.owner())[self.name.rpartition(".")[2]]

    def bind(self, value: Any) -> None:
        """Replace the target in its owner's namespace."""
        setattr(self.owner(), self.name.rpartition(".")[2], value)

    def problems(self) -> list[str]:
        """Return one line if the installed source is not the supported one, otherwise nothing."""
        try:
            function = underlying(self.binding())
            source = source_hash(function.__code__)
        except (ImportError, AttributeError, KeyError, TypeError, OSError) as error:
            return [f"{self} cannot be read ({type(error).__name__}: {error})"]
        if source == self.source:
            return []
        signature = inspect.signature(function, follow_wrapped=False)
        return [f"{self} has the source hash {source} instead of {self.source} ({signature})"]


def underlying(binding: Any) -> FunctionType:
    """Return the plain function inside a classmethod, staticmethod, property or cached function.

    Raises:
        TypeError: The binding contains no Python function.
    """
    function: Any = binding.fget if isinstance(binding, property) else binding
    if isinstance(binding, classmethod | staticmethod) or _is_cached(function):
        function = function.__wrapped__
    if not isinstance(function, FunctionType):
        raise TypeError(f"{binding!r} is not a Python function")
    return function


def source_hash(code: CodeType) -> str:
    """Return a hash of `source_of(code)`: 16 hex digits, the same in all versions of Python."""
    return hashlib.sha256(source_of(code).encode()).hexdigest()[:16]


def source_of(code: CodeType) -> str:
    """Return the source of a function with its decorators, without comments and blank lines.

    `inspect.getsource` is not used: it tokenises the source, which takes 30 times as long, and it
    searches all modules for the module of the function.

    Raises:
        OSError: The source file cannot be read.
    """
    last = _last_line(code)
    lines: list[str] = []
    indentation = 0
    for number, line in enumerate(_lines(code.co_filename)[code.co_firstlineno - 1 :]):
        text = line.lstrip()
        if not text or text.startswith("#"):
            continue
        # After the last line with code, only lines with deeper indentation can be the function's.
        if code.co_firstlineno + number > last and len(line) - len(text) <= indentation:
            break
        if not lines:
            indentation = len(line) - len(text)
        lines.append(line.rstrip())
    return textwrap.dedent("\n".join(lines))


def _last_line(code: CodeType) -> int:
    """Return the last line that has code, in the function or in a nested function."""
    inner = [_last_line(const) for const in code.co_consts if isinstance(const, CodeType)]
    return max([*inner, *(line for *_, line in code.co_lines() if line is not None)])


@functools.lru_cache(maxsize=64)
def _lines(file: str) -> list[str]:
    return Path(file).read_text(encoding="utf-8").split("\n")


def _is_cached(function: Any) -> bool:
    return hasattr(function, "cache_clear") and hasattr(function, "__wrapped__")


class Edit:
    """One change to vLLM that can be undone. `str()` names the changed object."""

    def problems(self) -> list[str]:
        """Return why the edit cannot be applied to this vLLM."""
        return []

    def apply(self) -> None:
        """Make the change. Called only if there are no problems."""

    def failures(self) -> list[str]:
        """Return why the change is not active in this process; empty if it is active."""
        return []

    def undo(self) -> None:
        """Undo the change, if it was made."""


class UnchangedTarget(Edit):
    """Changes nothing, but checks that a function which the plugin relies on is a supported one.

    Most of these targets define private members of vLLM that the plugin uses.
    """

    suffix = CHECKED

    def __init__(self, target: Target) -> None:
        self.target = target
        self.original: Any = None

    def problems(self) -> list[str]:
        return self.target.problems()

    def apply(self) -> None:
        self.original = self.target.binding()

    def failures(self) -> list[str]:
        return self._unless_bound_to(self.original, "vLLM's")

    def _unless_bound_to(self, expected: Any, whose: str) -> list[str]:
        binding = self.target.binding()
        if binding is expected:
            return []
        code = getattr(getattr(binding, "__func__", binding), "__code__", None)
        place = f"{code.co_filename}:{code.co_firstlineno}" if code else repr(binding)
        return [f"{self.target} is not {whose}, but that of {place}"]

    def __str__(self) -> str:
        return f"{self.target}{self.suffix}"


class Rebinding(UnchangedTarget):
    """Replaces a function or a method of vLLM.

    `apply` replaces it in its own module or class. `ActivePatches` replaces functions in the
    modules that imported them by name. The replacement of a cached function is also cached, and
    starts with an empty cache.
    """

    suffix = ""

    def __init__(self, target: Target, around: Callable[..., Any]) -> None:
        """Make each call of the target call `around(original, *args, **kwargs)`."""
        super().__init__(target)
        self.replacement: Any = None
        self.around = around

    def apply(self) -> None:
        super().apply()
        function, around = underlying(self.original), self.around

        @functools.wraps(function)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            return around(function, *args, **kwargs)

        self.replacement = replacement
        if isinstance(self.original, classmethod | staticmethod):
            self.replacement = type(self.original)(replacement)
        elif _is_cached(self.original):
            self.replacement = functools.cache(replacement)
        self.target.bind(self.replacement)

    def failures(self) -> list[str]:
        return self._unless_bound_to(self.replacement, "the plugin's")

    def undo(self) -> None:
        if self.replacement is not None:
            self.target.bind(self.original)


@dataclass(frozen=True)
class Patch:
    """The edits that serve one purpose, and why the purpose needs a patch.

    Attributes:
        name: A short name, which `doctor` prints.
        replaces: What the patch replaces.
        why: Why there is no other way.
        until: When the patch can be removed.
        edits: The changes to vLLM, in the order in which they are made.
        upstream: Where vLLM discusses or makes a change that replaces the patch.
    """

    name: str
    replaces: str
    why: str
    until: str
    edits: Sequence[Edit]
    upstream: str = "none known"


class ActivePatches:
    def __init__(self, patches: Iterable[Patch]) -> None:
        """Apply all patches, or none.

        Raises:
            HybridKVFingerprintError: A target has another source than the plugin supports. Nothing
                was changed.
            HybridKVPatchError: A change had no effect. All changes were undone.
        """
        self.patches = list(patches)
        self._edits = [edit for patch in self.patches for edit in patch.edits]
        check_sources(self._edits)
        try:
            for edit in self._edits:
                edit.apply()
            _replace({id(edit.original): edit.replacement for edit in self._rebindings()})
            _raise_if_any(failure for edit in self._edits for failure in edit.failures())
        except BaseException:
            self.undo()
            raise

    def verify(self) -> None:
        """Check by identity that every edit is active in every module.

        Raises:
            HybridKVPatchError: An edit is not active; the message lists all such edits.
        """
        _raise_if_any(failure for *_, failures in self.table() for failure in failures)

    def table(self) -> list[tuple[Patch, str, list[str]]]:
        """Return each edit's patch, name and failures. An edit that is active has no failures."""
        edits = {id(edit.original): edit for edit in self._rebindings()}
        stale: dict[Edit, list[str]] = defaultdict(list)
        for module, name, value in globals_among(edits):
            edit = edits[id(value)]
            if f"{module}.{name}" != str(edit):
                stale[edit].append(f"{module}.{name} still is vLLM's {edit}")
        return [
            (patch, str(edit), [*edit.failures(), *stale[edit]])
            for patch in self.patches
            for edit in patch.edits
        ]

    def undo(self) -> None:
        """Undo every edit, the last one first."""
        _replace({id(edit.replacement): edit.original for edit in self._rebindings()})
        for edit in reversed(self._edits):
            edit.undo()

    def _rebindings(self) -> list[Rebinding]:
        rebindings = [edit for edit in self._edits if isinstance(edit, Rebinding)]
        return [edit for edit in rebindings if edit.replacement is not None]


def check_sources(targets: Iterable[Edit | Target]) -> None:
    """Check that the sources of functions, or of the functions that edits change, are supported.

    Raises:
        HybridKVFingerprintError: A function has another source, or does not exist.
    """
    problems = [problem for target in targets for problem in target.problems()]
    _lines.cache_clear()
    if problems:
        raise HybridKVFingerprintError(
            f"hybrid_kv {__version__} does not support this vLLM: {'; '.join(problems)}. If "
            "another plugin or a manual change patches vLLM, undo that patch; otherwise "
            "reinstall vLLM"
        )


def _raise_if_any(failures: Iterable[str]) -> None:
    if listed := "; ".join(failures):
        raise HybridKVPatchError(
            f"these functions of vLLM are not patched by hybrid_kv any more: {listed}. Another "
            "plugin may patch the same names; set VLLM_PLUGINS to the plugins to load, without it"
        )


def _replace(new_by_id: Mapping[int, Any]) -> None:
    """Replace the objects with these ids in the globals of every module."""
    for module, name, value in list(globals_among(new_by_id)):
        setattr(sys.modules[module], name, new_by_id[id(value)])


# Packages to skip, because they hold half of all globals and never import vLLM by name.
_NEVER_IMPORT_VLLM = ("torch.", "sympy.", "openai.", "networkx.", "numpy.")


def globals_among(wanted: Iterable[int]) -> Iterator[tuple[str, str, Any]]:
    """Yield module, name and value of every module global whose id is wanted."""
    ids = frozenset(wanted)
    for module_name in list(sys.modules):
        if module_name.startswith(_NEVER_IMPORT_VLLM):
            continue
        try:
            # Plain attribute access would import a lazy module.
            namespace = object.__getattribute__(sys.modules[module_name], "__dict__")
        except (AttributeError, KeyError):
            continue
        # Fast path: few of the thousands of modules hold a wanted object.
        if ids.isdisjoint(map(id, list(namespace.values()))):
            continue
        for name, value in list(namespace.items()):
            if id(value) in ids:
                yield module_name, name, value
