# SPDX-License-Identifier: Apache-2.0
"""An emulator of the PTX instructions in the kernels, by the PTX ISA, on numpy words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Bit i of the result is bit `4 a_i + 2 b_i + c_i` of the table."""
    result = np.zeros_like(a)
    for entry in range(8):
        x, y, z = (word if entry & bit else ~word for word, bit in ((a, 4), (b, 2), (c, 1)))
        if int(table[0]) >> entry & 1:
            result |= x & y & z
    return result


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Nibble i of the selector names byte i of the result: 0 to 3 of a, 4 to 7 of b."""
    octets = np.stack([a, b], axis=-1).view(np.uint8)
    nibbles = np.right_shift(selector[:, None], np.array([0, 4, 8, 12], np.uint32)) & 15
    assert nibbles.max() < 8, "sign replication is not emulated"
    return np.take_along_axis(octets, nibbles.astype(np.int64), axis=-1).view(np.uint32)[:, 0]


def _e4m3x2_to_f16x2(pair: np.ndarray) -> np.ndarray:
    """The lower byte of the source becomes the lower half of the result."""
    codes = torch.from_numpy(pair.astype(np.uint16).view(np.uint8).copy())
    halves = codes.view(torch.float8_e4m3fn).to(torch.float16).view(torch.int16)
    return halves.numpy().view(np.uint32).copy()


_OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "shl.b32": np.left_shift,
    "shr.u32": np.right_shift,
    "and.b32": np.bitwise_and,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "cvt.u16.u32": lambda word: word & np.uint32(0xFFFF),
    "cvt.rn.f16x2.e4m3x2": _e4m3x2_to_f16x2,
}


def _statements(assembly: str) -> Iterator[tuple[str, str, list[str]]]:
    """Yield instruction, destination and sources."""
    for statement in filter(None, (part.strip() for part in assembly.strip(" {}\n").split(";"))):
        name, destination, *sources = re.split(r"[\s,]+", statement)
        if name != ".reg":
            yield name, destination, sources


def run(assembly: str, outputs: int, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Run a block whose operands are 32-bit registers from `$0` on: outputs, then inputs."""
    registers = {f"${outputs + i}": words.copy() for i, words in enumerate(inputs)}

    def value(name: str) -> np.ndarray:
        return registers[name] if name in registers else np.full_like(inputs[0], int(name, 0))

    for name, destination, sources in _statements(assembly):
        registers[destination] = _OPERATIONS[name](*map(value, sources))
    return [registers[f"${i}"] for i in range(outputs)]


def written_before_last_read(assembly: str, outputs: int) -> set[int]:
    """Return the outputs that are written before the last read of an input."""
    last_read, writes = 0, {}
    for at, (_, destination, sources) in enumerate(_statements(assembly)):
        if any(f"${i}" in sources for i in range(outputs, outputs + 4)):
            last_read = at
        if destination.startswith("$"):
            writes[int(destination[1:])] = at
    return {output for output, at in writes.items() if at < last_read}
