# SPDX-License-Identifier: Apache-2.0
"""Emulate the inline PTX of the kernels on numpy words, according to the PTX ISA."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

_OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "shr.u32": np.right_shift,
    "and.b32": np.bitwise_and,
}


def _statements(assembly: str) -> Iterator[tuple[str, str, list[str]]]:
    """Yield the name, the destination and the sources of each instruction."""
    for statement in filter(None, (part.strip() for part in assembly.strip(" {}\n").split(";"))):
        name, destination, *sources = re.split(r"[\s,]+", statement)
        if name != ".reg":
            yield name, destination, sources


def run(assembly: str, outputs: int, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Run a block of PTX. Its 32-bit operands are `$0` and up: first outputs, then inputs."""
    registers = {f"${outputs + i}": words.copy() for i, words in enumerate(inputs)}

    def value(name: str) -> np.ndarray:
        return registers[name] if name in registers else np.full_like(inputs[0], int(name, 0))

    for name, destination, sources in _statements(assembly):
        registers[destination] = _OPERATIONS[name](*map(value, sources))
    return [registers[f"${i}"] for i in range(outputs)]


def written_before_last_read(assembly: str, outputs: int) -> set[int]:
    """Return the outputs that are written before an input's last read, and so need a `&`."""
    last_read, writes = 0, {}
    for at, (_, destination, sources) in enumerate(_statements(assembly)):
        if any(f"${i}" in sources for i in range(outputs, outputs + 4)):
            last_read = at
        if destination.startswith("$"):
            writes[int(destination[1:])] = at
    return {output for output, at in writes.items() if at < last_read}
