# SPDX-License-Identifier: Apache-2.0
"""The Python files of a package, read without importing any of them."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path


class Sources:
    """The files of one package in a folder, by module."""

    def __init__(self, folder: Path, package: str = "vllm") -> None:
        self.files: dict[str, Path] = {}
        for path in sorted((folder / package).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            self.files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        self.text = functools.cache(self._text)
        self.tree = functools.cache(self._tree)

    def _text(self, module: str) -> str:
        return self.files[module].read_text("utf-8", errors="replace")

    def _tree(self, module: str) -> ast.Module:
        try:
            return ast.parse(self.text(module))
        except SyntaxError:  # Source for another version of Python, or a template.
            return ast.Module([], [])

    def defining(self, name: str) -> list[str]:
        """Return the modules that define a function or a class at their top level."""
        pattern = re.compile(rf"^(?:(?:async )?def|class) {re.escape(name)}\b", re.MULTILINE)
        return [module for module in self.files if pattern.search(self.text(module))]

    def importers(self, name: str) -> dict[str, str]:
        """Return the modules that import a function by name, and how each of them does.

        A function that a module keeps as a value, such as in a table, may escape a patch.
        """
        found = {}
        for module in self.files:
            if name not in self.text(module):
                continue
            nodes = list(ast.walk(self.tree(module)))
            for node in nodes:
                if isinstance(node, ast.ImportFrom):
                    for alias in node.names:
                        if alias.name == name:
                            how = "at the top" if node.col_offset == 0 else "inside a function"
                            lines = [*_kept_as_value(nodes, alias.asname or name)]
                            if lines:
                                how = f"keeps it as a value in line {', '.join(map(str, lines))}"
                            found[module] = how
        return found

    def imports_of(self, package: str) -> dict[tuple[str, str], str]:
        """Return each (module, name) that is imported from a package, and one importing module."""
        found: dict[tuple[str, str], str] = {}
        for module in self.files:
            for node in ast.walk(self.tree(module)):
                if (
                    isinstance(node, ast.ImportFrom)
                    and not node.level
                    and (node.module or "").partition(".")[0] == package
                ):
                    for alias in node.names:
                        found.setdefault((node.module or "", alias.name), module)
        return found


def _kept_as_value(nodes: Iterable[ast.AST], name: str) -> Iterator[int]:
    nodes = list(nodes)
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    for node in nodes:
        if isinstance(node, ast.Name) and node.id == name and id(node) not in called:
            yield node.lineno
