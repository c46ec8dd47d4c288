# SPDX-License-Identifier: Apache-2.0
"""Write tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]] = ()) -> list[str]:
    return [row(cells) for cells in (columns, ["---"] * len(columns), *rows)]


def machine(host: Mapping[str, Any]) -> str:
    """Return `testing.machine.host` in words."""
    return f"{host['cpu']}, {host['cpus']} CPUs; Python {host['python']}, vLLM {host['vllm']}"
