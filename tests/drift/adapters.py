# SPDX-License-Identifier: Apache-2.0
"""What each adapter knows of its minor, read from its file: importing it would import vLLM."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.drift import release
from tests.drift.release import DriftError, Minor, Release
from vllm_hybrid_kv.patches import ADAPTERS
from vllm_hybrid_kv.patches.base import Fingerprint, Target


@dataclass(frozen=True)
class Adapter:
    """An adapter.

    Attributes:
        minor: The minor that it is for.
        module: Its module.
        targets: What it rebinds, by the field of `Targets`.
        facts: The other fields of `Targets`.
        known: A release of that minor; None where none is at hand.
    """

    minor: Minor
    module: str
    targets: dict[str, Target]
    facts: dict[str, Any]
    known: Release | None

    @property
    def name(self) -> str:
        """The last part of the module's name."""
        return self.module.rpartition(".")[2]


def adapters() -> list[Adapter]:
    """Return the package's adapters."""
    found = []
    for minor, module in ADAPTERS.items():
        spec = importlib.util.find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        known = read_known(Path(spec.origin).read_text())
        targets = {name: value for name, value in known.items() if isinstance(value, Target)}
        facts = {name: value for name, value in known.items() if name not in targets}
        found.append(Adapter(minor, module, targets, facts, release.at_hand(minor)))
    return found


def read_known(source: str) -> dict[str, Any]:
    """Return the fields of an adapter's `TARGETS`.

    Args:
        source: Of the adapter's module.

    Raises:
        DriftError: It has none.
    """
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TARGETS":
            code = compile(ast.Expression(node.value), "TARGETS", "eval")
            names = {"Targets": dict, "Target": Target, "Fingerprint": Fingerprint}
            known: dict[str, Any] = eval(code, names)
            return known
    raise DriftError("an adapter has no TARGETS")
