# SPDX-License-Identifier: Apache-2.0
"""Runs the few PTX instructions of the kernels, as the PTX ISA defines them, on numpy words."""

from __future__ import annotations

import re
from collections.abc import Sequence

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
        which = selector >> 4 * byte & 0xF
        assert which < 8, "sign replication is not emulated"
        source = a if which < 4 else b
        result |= (source >> np.uint32(8 * (which % 4)) & np.uint32(0xFF)) << np.uint32(8 * byte)
    return result


def _e4m3x2_to_f16x2(pair: np.ndarray) -> np.ndarray:
    """The lower byte of the source becomes the lower half of the result."""
    codes = torch.from_numpy(pair.astype(np.uint16).view(np.uint8).copy())
    halves = codes.view(torch.float8_e4m3fn).to(torch.float16).view(torch.int16)
    return halves.numpy().view(np.uint32).copy()


def run(assembly: str, outputs: int, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Run a block whose operands are 32-bit registers, `$0` and on: outputs, then inputs."""
    registers: dict[str, np.ndarray] = {
        f"${outputs + i}": words.copy() for i, words in enumerate(inputs)
    }

    def value(name: str) -> np.ndarray:
        if name in registers:
            return registers[name]
        number = int(name, 0)
        return np.full_like(inputs[0], number)

    body = assembly.strip().removeprefix("{").removesuffix("}")
    for statement in filter(None, (part.strip() for part in body.split(";"))):
        name, *operands = re.split(r"[\s,]+", statement)
        if name == ".reg":
            continue
        to, *sources = operands
        match name:
            case "shl.b32":
                registers[to] = value(sources[0]) << value(sources[1])
            case "shr.u32":
                registers[to] = value(sources[0]) >> value(sources[1])
            case "and.b32":
                registers[to] = value(sources[0]) & value(sources[1])
            case "lop3.b32":
                first, second, third = map(value, sources[:3])
                registers[to] = _lop3(first, second, third, int(sources[3], 0))
            case "prmt.b32":
                first, second = map(value, sources[:2])
                registers[to] = _prmt(first, second, int(sources[2], 16))
            case "cvt.u16.u32":
                registers[to] = value(sources[0]) & np.uint32(0xFFFF)
            case "cvt.rn.f16x2.e4m3x2":
                registers[to] = _e4m3x2_to_f16x2(value(sources[0]))
            case _:
                raise AssertionError(f"not emulated: {statement}")
    return [registers[f"${i}"] for i in range(outputs)]


def written_before_last_read(assembly: str, outputs: int) -> set[int]:
    """Outputs that are written before an input is read for the last time."""
    statements = [part.strip() for part in assembly.strip(" {}\n").split(";") if part.strip()]
    reads, writes = 0, {}
    for at, statement in enumerate(statements):
        name, *operands = re.split(r"[\s,]+", statement)
        if name == ".reg":
            continue
        if any(f"${i}" in operands[1:] for i in range(outputs, outputs + 4)):
            reads = at
        if operands[0].startswith("$"):
            writes[int(operands[0][1:])] = at
    return {output for output, at in writes.items() if at < reads}
