# SPDX-License-Identifier: Apache-2.0
"""List the architectures that generate text, from the registries of the supported vLLM releases.

The module parses the registries' source, because one process cannot import two releases.
"""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.conformance.releases import unpacked_wheel

MINORS = ("0.32", "0.33")

REGISTRY = Path("model_executor/models/registry.py")

TEXT = ("_TEXT_GENERATION_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS")
MULTIMODAL = "_MULTIMODAL_MODELS"


@dataclass(frozen=True)
class Architecture:
    """An entry of vLLM's registry.

    Attributes:
        name: As in the field `architectures` of a config.json.
        table: The name of the registry's table.
        minors: The vLLM minors whose registry has this entry.
    """

    name: str
    table: str
    minors: tuple[str, ...]

    @property
    def multimodal(self) -> bool:
        return self.table == MULTIMODAL or "ForConditional" in self.name


def sources() -> dict[str, Path]:
    """Return the folder of the package `vllm` for each supported minor."""
    installed = importlib.util.find_spec("vllm")
    assert installed is not None
    assert installed.origin is not None
    return {"0.32": Path(installed.origin).parent, "0.33": unpacked_wheel("0.33") / "vllm"}


def table(source: Path, name: str) -> set[str]:
    """Return the keys of the table `name` in the registry of the package at `source`."""
    for node in ast.parse((source / REGISTRY).read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            assert isinstance(node.value, ast.Dict)
            return {ast.literal_eval(key) for key in node.value.keys if key is not None}
    raise LookupError(f"{source / REGISTRY} has no table {name}")


@cache
def architectures() -> dict[str, Architecture]:
    """Return every architecture that generates text, by name."""
    found: dict[str, tuple[str, list[str]]] = {}
    for minor, source in sources().items():
        for name in (*TEXT, MULTIMODAL):
            for key in table(source, name):
                found.setdefault(key, (name, []))[1].append(minor)
    return {
        key: Architecture(key, table_name, tuple(minors))
        for key, (table_name, minors) in sorted(found.items())
    }
