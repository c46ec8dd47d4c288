# SPDX-License-Identifier: Apache-2.0
"""Patches functions of vLLM: all or none, verified by identity, and undoable.

Before the first patch is applied, the source hash of every target is compared with the hash of
the supported vLLM minor. If one differs, nothing is applied. A function is replaced in its own
module and in every module that imported it by name; modules imported later import the replacement.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import sys
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from vllm_hybrid_kv.errors import HybridKVFingerprintError, HybridKVPatchError

CHECKED = " (checked, not patched)"
"""Suffix of the name of a target that the plugin relies on but does not patch."""


@dataclass(frozen=True)
class Target:
    """A function or method of vLLM, and the hash of its supported source.

    Attributes:
        place: `module:function` or `module:Class.method`.
        source: The hash that `source_hash` returns for the supported source.
    """

    place: str
    source: str

    def __str__(self) -> str:
        return self.place.replace(":", ".")

    @property
    def module(self) -> str:
        """The module that defines the target."""
        return self.place.partition(":")[0]

    @property
    def name(self) -> str:
        """The name in the module, `Class.method` for a method."""
        return self.place.partition(":")[2]

    @property
    def attribute(self) -> str:
        """The name in `owner()`."""
        return self.name.rpartition(".")[2]

    def owner(self) -> ModuleType | type:
        """Import the module, and return the module or, for a method, the class."""
        module = importlib.import_module(self.module)
        class_name, _, _ = self.name.rpartition(".")
        return getattr(module, class_name) if class_name else module

    def binding(self) -> Any:
        """Return the value in the owner's namespace, without unwrapping a classmethod."""
        return vars(self.owner())[self.attribute]

    def problems(self) -> list[str]:
        """Return one line if the installed source is not the supported one, otherwise nothing."""
        try:
            function = underlying(self.binding())
            source = source_hash(function)
        except (ImportError, AttributeError, KeyError, TypeError, OSError) as error:
            return [f"{self} cannot be read ({type(error).__name__}: {error})"]
        if source == self.source:
            return []
        signature = inspect.signature(function, follow_wrapped=False)
        return [f"{self} has the source hash {source} instead of {self.source} ({signature})"]


def underlying(binding: Any) -> FunctionType:
    """Return the function of a binding: plain or cached, a classmethod, staticmethod or property.

    Raises:
        TypeError: The binding is something else.
    """
    function: Any = binding
    if isinstance(binding, classmethod | staticmethod):
        function = binding.__func__
    elif isinstance(binding, property):
        function = binding.fget
    if _is_cached(function):
        function = function.__wrapped__
    if not isinstance(function, FunctionType):
        raise TypeError(f"{binding!r} is not a Python function")
    return function


def source_hash(function: FunctionType) -> str:
    """Return the first 16 hex digits of the SHA-256 of `source_of`, the same in every Python.

    Raises:
        OSError: The source file cannot be read.
    """
    return hashlib.sha256(source_of(function).encode()).hexdigest()[:16]


def source_of(function: FunctionType) -> str:
    """Return a function's source with its decorators, without comment lines and blank lines.

    `inspect.getsource` is not used: it tokenises the source, which takes 30 times as long, and it
    searches all modules for the module of the function.

    Raises:
        OSError: The source file cannot be read.
    """
    code = function.__code__
    last = _last_line(code)
    lines: list[str] = []
    indentation = 0
    for number, line in enumerate(_lines(code.co_filename)[code.co_firstlineno - 1 :]):
        text = line.lstrip()
        if not text or text.startswith("#"):
            continue
        # After the last line with code come only closing brackets and the rest of a statement.
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


class Edit(ABC):
    """One change to vLLM that can be undone."""

    @abstractmethod
    def problems(self) -> list[str]:
        """Return why the edit cannot be applied to this vLLM."""

    @abstractmethod
    def apply(self) -> None:
        """Make the change. Called only if there are no problems."""

    @abstractmethod
    def failures(self) -> list[str]:
        """Return why the change is not active in this process; empty if it is active."""

    @abstractmethod
    def undo(self) -> None:
        """Undo the change."""

    @abstractmethod
    def __str__(self) -> str:
        """Return the name of what is changed."""


class Rebinding(Edit):
    """Replaces a function or a method of vLLM.

    The module's function `apply` replaces all functions in one pass, each in its own module and in
    every module that imported it by name. A method is replaced in its class, and so in every
    subclass that inherits it. The replacement of a cached function is also cached, and starts with
    an empty cache.
    """

    def __init__(
        self,
        target: Target,
        make: Callable[[Any], Any],
        used_through: Callable[[], type] | None = None,
    ) -> None:
        """Prepare the edit.

        Args:
            target: The function or method.
            make: Takes the plain original function and returns its replacement.
            used_through: Returns the subclass through which vLLM calls an inherited method.
        """
        self.target = target
        self.original: Any = None
        self.replacement: Any = None
        self.is_method = "." in target.name
        self._make = make
        self._used_through = used_through

    def problems(self) -> list[str]:
        return self.target.problems()

    def apply(self) -> None:
        self.original = self.target.binding()
        function = underlying(self.original)
        replacement: Any = functools.wraps(function)(self._make(function))
        if isinstance(self.original, classmethod | staticmethod):
            replacement = type(self.original)(replacement)
        elif _is_cached(self.original):
            replacement = functools.cache(replacement)
        self.replacement = replacement
        if self.is_method:
            setattr(self.target.owner(), self.target.attribute, replacement)

    def failures(self) -> list[str]:
        if self.target.binding() is not self.replacement:
            return [f"{self.target} is not the plugin's"]
        if self._used_through is not None:
            subclass = self._used_through()
            method = getattr(subclass, self.target.attribute)
            if getattr(method, "__func__", method) is not underlying(self.replacement):
                return [f"{subclass.__qualname__}.{self.target.attribute} is not the plugin's"]
        return []

    def undo(self) -> None:
        """Restore a method. `_undo` restores functions, in every module that has a replacement."""
        if self.is_method and self.replacement is not None:
            setattr(self.target.owner(), self.target.attribute, self.original)

    def __str__(self) -> str:
        return str(self.target)


class UnchangedTarget(Edit):
    """Changes nothing, but requires the supported source of a function that the plugin relies on.

    The plugin uses private members of vLLM. The methods that own them are such targets.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.original: Any = None

    def problems(self) -> list[str]:
        return self.target.problems()

    def apply(self) -> None:
        self.original = self.target.binding()

    def failures(self) -> list[str]:
        if self.target.binding() is not self.original:
            return [f"{self.target} is no longer vLLM's"]
        return []

    def undo(self) -> None:
        """Do nothing: nothing was changed."""

    def __str__(self) -> str:
        return f"{self.target}{CHECKED}"


@dataclass(frozen=True)
class PatchInfo:
    """Why a patch exists, one line each.

    Attributes:
        replaces: What the patch replaces.
        why: Why there is no other way.
        upstream: Where vLLM discusses or makes a change that replaces the patch.
        until: When the patch can be removed.
    """

    replaces: str
    why: str
    upstream: str
    until: str


@dataclass(frozen=True)
class Patch:
    """The edits that serve one purpose, and why the purpose needs a patch."""

    name: str
    info: PatchInfo
    edits: Sequence[Edit]


@dataclass(frozen=True)
class Row:
    """One line of the table of patches: an edit, and why it is not active (empty if it is)."""

    patch: Patch
    edit: str
    failures: list[str]


class ActivePatches:
    """The patches that are active in this process."""

    def __init__(self, patches: Sequence[Patch]) -> None:
        self.patches = list(patches)

    def verify(self) -> None:
        """Check by identity that every edit is active in every module.

        Raises:
            HybridKVPatchError: An edit is not active; the message lists all such edits.
        """
        _raise_if_inactive([failure for row in self.table() for failure in row.failures])

    def table(self) -> list[Row]:
        """Return one row for every edit of every patch."""
        edits = {id(edit.original): edit for edit in _functions(_edits(self.patches))}
        stale: dict[Edit, list[str]] = {}
        for module, name, value in globals_among(edits):
            edit = edits[id(value)]
            if f"{module}.{name}" != str(edit.target):
                stale.setdefault(edit, []).append(f"{module}.{name} still is vLLM's {edit.target}")
        return [
            Row(patch, str(edit), [*edit.failures(), *stale.get(edit, ())])
            for patch in self.patches
            for edit in patch.edits
        ]

    def undo(self) -> None:
        """Undo every edit, the last one first."""
        _undo(list(_edits(self.patches)))


def apply(patches: Sequence[Patch]) -> ActivePatches:
    """Apply all patches, or none.

    Raises:
        HybridKVFingerprintError: A target has another source than the plugin supports. Nothing
            was changed.
        HybridKVPatchError: A change had no effect. All changes were undone.
    """
    problems = [problem for edit in _edits(patches) for problem in edit.problems()]
    _lines.cache_clear()
    if problems:
        raise HybridKVFingerprintError("; ".join(problems))
    started: list[Edit] = []
    try:
        for edit in _edits(patches):
            started.append(edit)
            edit.apply()
        replacement_of = {edit.original: edit.replacement for edit in _functions(started)}
        stale = [
            f"{module}.{name} still is vLLM's"
            for module, name in _replace(replacement_of)
            if getattr(sys.modules[module], name) in replacement_of
        ]
        _raise_if_inactive([*stale, *(one for edit in started for one in edit.failures())])
    except BaseException:
        _undo(started)
        raise
    return ActivePatches(patches)


def _raise_if_inactive(failures: Sequence[str]) -> None:
    if failures:
        raise HybridKVPatchError(
            f"these functions of vLLM are not patched by hybrid_kv any more: "
            f"{'; '.join(failures)}. Another plugin may patch the same names; exclude one of the "
            "two with VLLM_PLUGINS"
        )


def _edits(patches: Iterable[Patch]) -> Iterator[Edit]:
    return (edit for patch in patches for edit in patch.edits)


def _functions(edits: Iterable[Edit]) -> list[Rebinding]:
    """Return the applied edits of functions."""
    return [
        edit
        for edit in edits
        if isinstance(edit, Rebinding) and not edit.is_method and edit.replacement is not None
    ]


def _undo(edits: Sequence[Edit]) -> None:
    _replace({edit.replacement: edit.original for edit in _functions(edits)})
    for edit in reversed(edits):
        edit.undo()


def _replace(replacement_of: Mapping[Any, Any]) -> list[tuple[str, str]]:
    """Replace functions in the globals of every module; return the modules and names."""
    by_id = {id(old): new for old, new in replacement_of.items()}
    places = list(globals_among(by_id))
    for module, name, value in places:
        setattr(sys.modules[module], name, by_id[id(value)])
    return [(module, name) for module, name, _ in places]


# Half of all globals are in these packages, and searching them took half of the time.
_NEVER_IMPORT_VLLM = ("torch.", "sympy.", "openai.", "networkx.", "numpy.")


def globals_among(wanted: Mapping[int, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield module, name and value of every module global whose id is a key of `wanted`."""
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
