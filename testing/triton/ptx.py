# SPDX-License-Identifier: Apache-2.0
"""An emulator of the PTX instructions in the kernels, by the PTX ISA, on numpy words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
import torch


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    """Bit i of the result is bit `4 a_i + 2 b_i + c_i` of the table."""
    result = np.zeros_like(a)
    for entry in range(8):
        if table >> entry & 1:
            x = a if entry & 4 else ~a
            y = b if entry & 2 else ~b
            result |= x & y & (c if entry & 1 else ~c)
    return result


def _prmt(a: np.ndarray, b: np.ndarray, selector: int) -> np.ndarray:
    """Nibble i of the selector names byte i of the result: 0 to 3 of a, 4 to 7 of b."""
    result = np.zeros_like(a)
    for byte in range(4):
        index = selector >> 4 * byte & 0xF
        assert index < 8, "sign replication is not emulated"
        source = a if index < 4 else b
        result |= (source >> np.uint32(8 * (index % 4)) & np.uint32(0xFF)) << np.uint32(8 * byte)
    return result


def _e4m3x2_to_f16x2(pair: np.ndarray) -> np.ndarray:
    """The lower byte of the source becomes the lower half of the result."""
    codes = torch.from_numpy(pair.astype(np.uint16).view(np.uint8).copy())
    halves = codes.view(torch.float8_e4m3fn).to(torch.float16).view(torch.int16)
    return halves.numpy().view(np.uint32).copy()


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
        first = value(sources[0])
        match name:
            case "shl.b32":
                result = first << value(sources[1])
            case "shr.u32":
                result = first >> value(sources[1])
            case "and.b32":
                result = first & value(sources[1])
            case "lop3.b32":
                result = _lop3(first, value(sources[1]), value(sources[2]), int(sources[3], 0))
            case "prmt.b32":
                result = _prmt(first, value(sources[1]), int(sources[2], 16))
            case "cvt.u16.u32":
                result = first & np.uint32(0xFFFF)
            case "cvt.rn.f16x2.e4m3x2":
                result = _e4m3x2_to_f16x2(first)
            case _:
                raise AssertionError(f"not emulated: {name}")
        registers[destination] = result
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
