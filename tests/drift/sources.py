# SPDX-License-Identifier: Apache-2.0
"""The Python files of a release, read without importing any of them.

Names are followed through imports to where they are defined, and members of classes through their
bases, as far as that is in the release. What is made while a module runs is not seen.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
_DEFINED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class Definition:
    """Where and how something is defined.

    Attributes:
        module: The module.
        name: The name in it, `Class.member` for a member; empty for the module itself.
        node: The statement; None for a module, and for what another package defines.
        text: The source of the statement with its decorators, without indentation.
    """

    module: str
    name: str
    node: ast.stmt | None = field(compare=False, repr=False)
    text: str = field(compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.module}.{self.name}" if self.name else self.module

    @property
    def lines(self) -> list[str]:
        """What counts of the source, as in `Fingerprint`: no blank lines, no comment lines."""
        lines = self.text.splitlines()
        return [line.rstrip() for line in lines if line.strip() and line.strip()[0] != "#"]

    @property
    def abstract(self) -> bool:
        """Whether subclasses have to define it."""
        return isinstance(self.node, FunctionNode) and any(
            ast.unparse(decorator).endswith("abstractmethod")
            for decorator in self.node.decorator_list
        )


class Sources:
    """The files of one package in a folder."""

    def __init__(self, folder: Path, package: str = "vllm") -> None:
        """List the files.

        Args:
            folder: The one that has the package's folder.
            package: Its name.
        """
        self.folder = folder
        self.package = package
        self.files: dict[str, Path] = {}
        for path in sorted((folder / package).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            self.files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        self._texts: dict[str, str] = {}
        self._trees: dict[str, ast.Module] = {}
        self._nodes: dict[str, list[ast.AST]] = {}
        self._lines: dict[str, list[str]] = {}
        self._members: dict[Definition, dict[str, Definition]] = {}
        self._names: dict[str, dict[str, tuple[ast.stmt, ast.alias | None]]] = {}

    def text(self, module: str) -> str:
        """Return the source of a module."""
        if module not in self._texts:
            self._texts[module] = self.files[module].read_text("utf-8", errors="replace")
        return self._texts[module]

    def tree(self, module: str) -> ast.Module:
        """Return the syntax tree of a module; an empty one if this Python cannot read it."""
        if module not in self._trees:
            try:
                self._trees[module] = ast.parse(self.text(module))
            except SyntaxError:
                self._trees[module] = ast.Module([], [])
        return self._trees[module]

    def nodes(self, module: str) -> list[ast.AST]:
        """Return all nodes of the syntax tree of a module."""
        if module not in self._nodes:
            self._nodes[module] = list(ast.walk(self.tree(module)))
        return self._nodes[module]

    def containing(self, word: str) -> Iterator[str]:
        """Yield the modules in whose text a word stands."""
        pattern = re.compile(rf"\b{re.escape(word)}\b")
        return (
            module
            for module in self.files
            if word in self.text(module) and pattern.search(self.text(module))
        )

    def matching(self, pattern: re.Pattern[str]) -> dict[str, list[str]]:
        """Return what a pattern's first group matches, and the modules where it does."""
        found: dict[str, list[str]] = {}
        for module in self.files:
            for match in pattern.finditer(self.text(module)):
                if module not in found.setdefault(match[1], []):
                    found[match[1]].append(module)
        return found

    def find(self, module: str, name: str) -> Definition | None:
        """Follow a name from a module to its definition; None where there is no such name."""
        first, _, rest = name.partition(".")
        found = self._find_global(module, first, set())
        if found is None or not rest:
            return found
        if not found.name:
            return self.find(found.module, rest)
        return self.members(found).get(rest)

    def own_members(self, found: Definition) -> dict[str, Definition]:
        """Return the members that a class itself defines, with what its methods set on `self`."""
        if found in self._members:
            return self._members[found]
        members = self._members[found] = {}
        if not isinstance(found.node, ast.ClassDef):
            return members
        for name, (node, alias) in _names_in(found.node.body).items():
            if alias is None:
                members[name] = self._definition(found.module, f"{found.name}.{name}", node)
        for node in ast.walk(found.node):
            if isinstance(node, ast.Assign | ast.AnnAssign):
                for target in _targets(node):
                    if (
                        isinstance(target, ast.Attribute)
                        and isinstance(target.value, ast.Name)
                        and target.value.id == "self"
                        and target.attr not in members
                    ):
                        members[target.attr] = self._definition(
                            found.module, f"{found.name}.{target.attr}", node
                        )
        return members

    def lineage(self, found: Definition) -> list[Definition]:
        """Return a class and its bases in the release, nearest first."""
        classes: list[Definition] = []
        waiting = [found]
        while waiting:
            current = waiting.pop(0)
            if current in classes or not isinstance(current.node, ast.ClassDef):
                continue
            classes.append(current)
            for base in current.node.bases:
                name = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
                if (definition := self.find(current.module, name)) is not None:
                    waiting.append(definition)
        return classes

    def members(self, found: Definition) -> dict[str, Definition]:
        """Return the members of a class, with those of its bases."""
        members: dict[str, Definition] = {}
        for current in self.lineage(found):
            for name, member in self.own_members(current).items():
                members.setdefault(name, member)
        return members

    def imports_from(self, module: str) -> Iterator[tuple[ast.ImportFrom, str, ast.alias]]:
        """Yield every `from … import …` of a module, wherever it stands, with the full module."""
        for node in self.nodes(module):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    yield node, self._absolute(module, node), alias

    def _find_global(self, module: str, name: str, seen: set[tuple[str, str]]) -> Definition | None:
        if (module, name) in seen or module not in self.files:
            return None
        seen.add((module, name))
        if module not in self._names:
            self._names[module] = _names_in(self.tree(module).body)
        names = self._names[module]
        if name not in names:
            if f"{module}.{name}" in self.files:
                return Definition(f"{module}.{name}", "", None, "")
            for node, _ in names.values():
                if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                    found = self._find_global(self._absolute(module, node), name, seen)
                    if found is not None:
                        return found
            return None
        node, alias = names[name]
        if alias is None:
            return self._definition(module, name, node)
        if isinstance(node, ast.ImportFrom):
            source = self._absolute(module, node)
            if source.split(".")[0] == self.package:
                return self._find_global(source, alias.name, seen)
            return Definition(source, alias.name, None, "")
        return Definition(alias.name if alias.asname else name, "", None, "")

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        levels = node.level - (self.files[module].name == "__init__.py")
        return ".".join([*parts[: len(parts) - levels], *([node.module] if node.module else [])])

    def _definition(self, module: str, name: str, node: ast.stmt) -> Definition:
        decorators = getattr(node, "decorator_list", [])
        first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
        if module not in self._lines:
            self._lines[module] = self.text(module).split("\n")
        lines = self._lines[module][first - 1 : node.end_lineno]
        return Definition(module, name, node, textwrap.dedent("\n".join(lines)))


def _targets(node: ast.Assign | ast.AnnAssign) -> Iterator[ast.expr]:
    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
        yield from target.elts if isinstance(target, ast.Tuple | ast.List) else [target]


def _names_in(body: Iterable[ast.stmt]) -> dict[str, tuple[ast.stmt, ast.alias | None]]:
    """Return what a body binds, branches included: the last definition, else what comes first."""
    names: dict[str, tuple[ast.stmt, ast.alias | None]] = {}
    for node in _flat(body):
        if isinstance(node, _DEFINED):
            names[node.name] = node, None
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                bound = alias.asname or alias.name
                if isinstance(node, ast.Import):
                    bound = bound.partition(".")[0]
                elif alias.name == "*":
                    bound = f"* {node.level} {node.module}"
                names.setdefault(bound, (node, alias))
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in _targets(node):
                if isinstance(target, ast.Name):
                    names.setdefault(target.id, (node, None))
    return names


def _flat(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            yield from _flat(node.body)
            yield from _flat(getattr(node, "orelse", ()))
            yield from _flat(getattr(node, "finalbody", ()))
            for handler in getattr(node, "handlers", ()):
                yield from _flat(handler.body)
