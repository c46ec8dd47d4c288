# SPDX-License-Identifier: Apache-2.0
"""How a name of vLLM's is rebound: fingerprints first, all or nothing, verified, undone.

A patch is one purpose with the edits it takes. Before the first edit is applied every edit of every
patch compares what it replaces with what is known of that vLLM minor; one mismatch and nothing is
applied. A function is rebound in its own module and in every module that imported it by name.
Modules imported later get the new one from there.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import sys
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

from vllm_hybrid_kv.errors import HybridKVFingerprintError, HybridKVPatchError


@dataclass(frozen=True)
class PatchInfo:
    """What a reader of a patch wants to know, one line each.

    Attributes:
        replaces: What it replaces.
        why: Why there is no other way.
        upstream: Where vLLM is discussing or changing it.
        until: When the patch can go.
    """

    replaces: str
    why: str
    upstream: str
    until: str


@dataclass(frozen=True)
class Fingerprint:
    """What a function is known by.

    Attributes:
        signature: Its parameters and defaults, without annotations.
        source: The first 16 hex digits of the SHA-256 of its source without indentation, blank
            lines and comment lines; the same under every version of Python.
    """

    signature: str
    source: str

    @classmethod
    def of(cls, function: FunctionType) -> Fingerprint:
        """Take the fingerprint of the function itself, not of what it may wrap.

        Raises:
            OSError: Its source is not there.
        """
        signature = inspect.signature(function, follow_wrapped=False)
        bare = signature.replace(
            parameters=[
                parameter.replace(annotation=inspect.Parameter.empty)
                for parameter in signature.parameters.values()
            ],
            return_annotation=inspect.Signature.empty,
        )
        lines = textwrap.dedent(inspect.getsource(function.__code__)).splitlines()
        kept = [line.rstrip() for line in lines if line.strip() and line.strip()[0] != "#"]
        return cls(str(bare), hashlib.sha256("\n".join(kept).encode()).hexdigest()[:16])


@dataclass(frozen=True)
class Target:
    """A function or method of vLLM's and what it must look like.

    Attributes:
        module: The module that defines it.
        name: Its name there, `Class.method` for a method.
        fingerprint: What is known of it.
    """

    module: str
    name: str
    fingerprint: Fingerprint

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    def owner(self) -> ModuleType | type:
        """Return the module or class in whose namespace the name stands, importing the module."""
        module = importlib.import_module(self.module)
        class_name, _, _ = self.name.rpartition(".")
        return getattr(module, class_name) if class_name else module

    @property
    def attribute(self) -> str:
        """The name inside `owner()`."""
        return self.name.rpartition(".")[2]

    def binding(self) -> Any:
        """Return what the owner's namespace holds, a classmethod or staticmethod as such."""
        return vars(self.owner())[self.attribute]

    def problems(self) -> list[str]:
        """Say how what is there differs from what is known, in no or one line."""
        try:
            function = underlying(self.binding())
            found = Fingerprint.of(function)
        except (ImportError, AttributeError, KeyError, TypeError, OSError) as error:
            return [f"{self} cannot be read ({type(error).__name__}: {error})"]
        if found.signature != self.fingerprint.signature:
            return [
                f"{self} has the signature {found.signature}, known is {self.fingerprint.signature}"
            ]
        if found.source != self.fingerprint.source:
            return [f"{self} has the source {found.source}, known is {self.fingerprint.source}"]
        return []


def underlying(binding: Any) -> FunctionType:
    """Return the function of a binding: a function, cached or not, a classmethod, a staticmethod.

    Raises:
        TypeError: It is none of them.
    """
    function: Any = binding
    if isinstance(binding, classmethod | staticmethod):
        function = binding.__func__
    if _is_cached(function):
        function = function.__wrapped__
    if not isinstance(function, FunctionType):
        raise TypeError(f"{binding!r} is not a Python function")
    return function


def _is_cached(function: Any) -> bool:
    return hasattr(function, "cache_clear") and hasattr(function, "__wrapped__")


class Edit(ABC):
    """One change to vLLM that can be taken back."""

    @abstractmethod
    def problems(self) -> list[str]:
        """Say why the edit cannot be applied to this vLLM; empty where it can."""

    @abstractmethod
    def apply(self) -> None:
        """Make the change. Only called where there are no problems."""

    @abstractmethod
    def failures(self) -> list[str]:
        """Say how the change is not in force in this process; empty where it is."""

    @abstractmethod
    def undo(self) -> None:
        """Take the change back."""

    @abstractmethod
    def __str__(self) -> str:
        """Name what is changed."""


class FunctionRebinding(Edit):
    """Rebinds a module's function, there and in every module that imported it by name.

    The replacement of a cached function is cached, too, and starts with an empty cache. `Applied`
    searches all modules once for all functions.
    """

    def __init__(self, target: Target, make: Callable[[Any], Any]) -> None:
        """Remember what to do.

        Args:
            target: The function.
            make: Gets the original and returns the replacement.
        """
        self.target = target
        self.original: Any = None
        self.replacement: Any = None
        self._make = make

    def problems(self) -> list[str]:
        """See `Target.problems`."""
        return self.target.problems()

    def apply(self) -> None:
        """Make the replacement."""
        self.original = self.target.binding()
        function = underlying(self.original)
        replacement = functools.wraps(function)(self._make(function))
        cached = _is_cached(self.original)
        self.replacement = functools.cache(replacement) if cached else replacement

    def failures(self) -> list[str]:
        """Check the defining module; `Applied` looks through the others."""
        if self.target.binding() is not self.replacement:
            return [f"{self.target} is not the plugin's"]
        return []

    def undo(self) -> None:
        """Nothing: `Applied` puts the original back wherever the replacement is."""

    def __str__(self) -> str:
        return str(self.target)


class MethodRebinding(Edit):
    """Rebinds a method of any kind in its class, and so for every subclass that inherits it."""

    def __init__(
        self,
        target: Target,
        make: Callable[[Any], Any],
        seen_from: Callable[[], type] | None = None,
    ) -> None:
        """Remember what to do.

        Args:
            target: The method.
            make: Gets the plain function and returns its replacement.
            seen_from: Returns the subclass whose method must come out as the replacement.
        """
        self.target = target
        self._make = make
        self._seen_from = seen_from
        self._original: Any = None
        self._replacement: Any = None

    def problems(self) -> list[str]:
        """See `Target.problems`."""
        return self.target.problems()

    def apply(self) -> None:
        """Set the replacement on the class."""
        self._original = self.target.binding()
        function = underlying(self._original)
        self._replacement = functools.wraps(function)(self._make(function))
        dressed = self._replacement
        if isinstance(self._original, classmethod | staticmethod):
            dressed = type(self._original)(self._replacement)
        setattr(self.target.owner(), self.target.attribute, dressed)

    def failures(self) -> list[str]:
        """Check the class, and the subclass that vLLM uses it through."""
        if underlying(self.target.binding()) is not self._replacement:
            return [f"{self.target} is not the plugin's"]
        if self._seen_from is not None:
            seen = self._seen_from()
            method = getattr(seen, self.target.attribute)
            if getattr(method, "__func__", method) is not self._replacement:
                return [f"{seen.__qualname__}.{self.target.attribute} is not the plugin's"]
        return []

    def undo(self) -> None:
        """Put the original back."""
        if self._replacement is not None:
            setattr(self.target.owner(), self.target.attribute, self._original)

    def __str__(self) -> str:
        return str(self.target)


class UnchangedTarget(Edit):
    """Changes nothing. Checks the fingerprint of a function whose behaviour the plugin needs."""

    def __init__(self, target: Target) -> None:
        """Remember the function.

        Args:
            target: The function or method.
        """
        self.target = target
        self._binding: Any = None

    def problems(self) -> list[str]:
        """See `Target.problems`."""
        return self.target.problems()

    def apply(self) -> None:
        """Remember the function that was checked."""
        self._binding = self.target.binding()

    def failures(self) -> list[str]:
        """Check that nothing has replaced the function."""
        if self.target.binding() is not self._binding:
            return [f"{self.target} is no longer vLLM's"]
        return []

    def undo(self) -> None:
        """Nothing was changed."""

    def __str__(self) -> str:
        return f"{self.target} (checked, not patched)"


@dataclass(frozen=True)
class Patch:
    """One purpose, why it needs a patch, and its edits."""

    name: str
    notice: PatchInfo
    edits: Sequence[Edit]


@dataclass(frozen=True)
class Row:
    """One line of the table of patches: an edit and whether it is in force here."""

    patch: Patch
    edit: str
    failures: list[str]


class Applied:
    """Patches that are in force in this process."""

    def __init__(self, patches: Sequence[Patch]) -> None:
        self.patches = list(patches)

    def verify(self) -> None:
        """Check by identity that every edit is in force in every module.

        Raises:
            HybridKVPatchError: One is not; the message lists all.
        """
        if failures := [failure for row in self.table() for failure in row.failures]:
            raise HybridKVPatchError(
                f"vLLM was changed behind the plugin's back: {'; '.join(failures)}. Another "
                "plugin may patch the same names; keep one of them out with VLLM_PLUGINS"
            )

    def table(self) -> list[Row]:
        """Return what `doctor` shows: every edit and how it fails, if it does."""
        originals = {id(edit.original): edit for edit in _functions(self.patches)}
        stale: dict[Edit, list[str]] = {}
        for module, name, value in globals_among(originals):
            edit = originals[id(value)]
            if f"{module}.{name}" != str(edit.target):
                stale.setdefault(edit, []).append(f"{module}.{name} still is vLLM's {edit.target}")
        return [
            Row(patch, str(edit), [*edit.failures(), *stale.get(edit, ())])
            for patch in self.patches
            for edit in patch.edits
        ]

    def undo(self) -> None:
        """Take every edit back, the last one first."""
        _swap({edit.replacement: edit.original for edit in _functions(self.patches)})
        for edit in reversed(list(_edits(self.patches))):
            edit.undo()


def apply(patches: Sequence[Patch]) -> Applied:
    """Apply all patches, or none.

    Raises:
        HybridKVFingerprintError: Something is not what the plugin knows; nothing was changed.
        HybridKVPatchError: The changes did not take; all were taken back.
    """
    problems = [problem for edit in _edits(patches) for problem in edit.problems()]
    if problems:
        raise HybridKVFingerprintError("; ".join(problems))
    applied = Applied([])
    try:
        for patch in patches:
            started: list[Edit] = []
            applied.patches.append(Patch(patch.name, patch.notice, started))
            for edit in patch.edits:
                started.append(edit)
                edit.apply()
        _swap({edit.original: edit.replacement for edit in _functions(patches)})
        applied.verify()
    except BaseException:
        applied.undo()
        raise
    return Applied(patches)


def _edits(patches: Sequence[Patch]) -> Iterator[Edit]:
    return (edit for patch in patches for edit in patch.edits)


def _functions(patches: Sequence[Patch]) -> Iterator[FunctionRebinding]:
    return (
        edit
        for edit in _edits(patches)
        if isinstance(edit, FunctionRebinding) and edit.replacement is not None
    )


def _swap(replacement_of: Mapping[Any, Any]) -> None:
    """Replace functions by others in the globals of every module."""
    by_id = {id(old): new for old, new in replacement_of.items()}
    for module, name, value in list(globals_among(by_id)):
        setattr(sys.modules[module], name, by_id[id(value)])


def globals_among(wanted: Mapping[int, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield module, name and value of every module global whose id is wanted."""
    ids = frozenset(wanted)
    for module_name in list(sys.modules):
        try:
            # The plain attribute, for a lazy module would be imported by asking for it.
            namespace = object.__getattribute__(sys.modules[module_name], "__dict__")
        except (AttributeError, KeyError):
            continue
        # Almost no module holds one, and there are thousands of modules.
        if ids.isdisjoint(map(id, list(namespace.values()))):
            continue
        for name, value in list(namespace.items()):
            if id(value) in ids:
                yield module_name, name, value
