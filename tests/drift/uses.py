# SPDX-License-Identifier: Apache-2.0
"""What the plugin uses of vLLM beside what it rebinds: names, and classes that it derives from."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.conformance.releases import REPOSITORY
from tests.drift.sources import Definition, FunctionNode, Sources

PLUGIN = "vllm_hybrid_kv"


@dataclass(frozen=True)
class Subclass:
    """A class of the plugin's with a base of vLLM's.

    Attributes:
        name: With its module.
        base: The base as the plugin imports it: module and name.
        defines: What it defines itself or inherits from the plugin, by name.
        asks_for: What it asks `self`, `cls` and `super()` for and does not define.
    """

    name: str
    base: tuple[str, str]
    defines: dict[str, Definition]
    asks_for: frozenset[str]


@dataclass
class Uses:
    """What the plugin uses of vLLM.

    Attributes:
        names: Module and name of what it imports, and the files that do. A name with a dot is a
            member of what was imported; an empty one is the module.
        attributes: Every attribute that it reads of anything.
        subclasses: Its classes with a base of vLLM's.
    """

    names: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    attributes: set[str] = field(default_factory=set)
    subclasses: list[Subclass] = field(default_factory=list)


def uses(root: Path = REPOSITORY, package: str = PLUGIN, of: str = "vllm") -> Uses:
    """Read what a package uses of another.

    Args:
        root: The folder that has the package's folder.
        package: Its name.
        of: The other one.
    """
    sources = Sources(root, package)
    found = Uses()
    for module in sources.files:
        places = _Names(module, of)
        places.visit(sources.tree(module))
        file = str(sources.files[module].relative_to(root))
        for name in sorted(places.names):
            found.names.setdefault(name, []).append(file)
        found.attributes |= places.attributes
        for node in sources.tree(module).body:
            if isinstance(node, ast.ClassDef):
                found.subclasses += _bases_of_theirs(sources, module, node, of)
    return found


def _bases_of_theirs(
    sources: Sources, module: str, node: ast.ClassDef, of: str
) -> Iterator[Subclass]:
    definition = sources.find(module, node.name)
    assert definition is not None
    lineage = sources.lineage(definition)
    defines = sources.members(definition)
    for ours in lineage:
        assert isinstance(ours.node, ast.ClassDef)
        for base in ours.node.bases:
            name = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
            theirs = sources.find(ours.module, name)
            if theirs is not None and theirs.module.partition(".")[0] == of:
                asked = {attribute for one in lineage for attribute in _asked_of_self(one)}
                yield Subclass(
                    str(definition),
                    (theirs.module, theirs.name),
                    defines,
                    frozenset(asked - defines.keys()),
                )


def _asked_of_self(definition: Definition) -> Iterator[str]:
    assert definition.node is not None
    for node in ast.walk(definition.node):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in (
            "self",
            "cls",
            "super()",
        ):
            yield node.attr


class _Names(ast.NodeVisitor):
    """Collects the names of one package in a module of another."""

    def __init__(self, module: str, of: str) -> None:
        self.names: set[tuple[str, str]] = set()
        self.attributes: set[str] = set()
        self._of = of
        self._bound: dict[str, tuple[str, str]] = {}

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.partition(".")[0] == self._of:
                self.names.add((alias.name, ""))
                if alias.asname:
                    self._bound[alias.asname] = (alias.name, "")
                else:
                    self._bound[self._of] = (self._of, "")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if not node.level and module.partition(".")[0] == self._of:
            for alias in node.names:
                self.names.add((module, alias.name))
                self._bound[alias.asname or alias.name] = (module, alias.name)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.attributes.add(node.attr)
        first, _, rest = ast.unparse(node).partition(".")
        if first in self._bound and all(part.isidentifier() for part in rest.split(".")):
            module, name = self._bound[first]
            self.names.add((module, f"{name}.{rest}" if name else rest))
        self.generic_visit(node)


def is_function(definition: Definition) -> bool:
    """Whether it is a function or method."""
    return isinstance(definition.node, FunctionNode)
