# SPDX-License-Identifier: Apache-2.0
"""Translate operands of instructions into functions that read them from a `Machine`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from testing.ptx.arithmetic import Array
from testing.ptx.errors import UnknownInstruction
from testing.ptx.machine import Machine, Mask
from testing.ptx.operations import DTYPES
from testing.ptx.parser import (
    Address,
    Group,
    Immediate,
    Instruction,
    Kernel,
    Operand,
    Register,
    Symbol,
)

Reader = Callable[[Machine, Mask], Array]


class Operands:
    """Reads the operands of a kernel.

    Args:
        symbols: Addresses of the variables in shared memory.
    """

    def __init__(self, kernel: Kernel, symbols: dict[str, int]) -> None:
        self.kernel, self.symbols = kernel, symbols

    @staticmethod
    def refuse(one: Instruction, what: str | None = None) -> UnknownInstruction:
        what = f"unknown opcode {one.opcode!r}" if what is None else f"{what} is not supported"
        return UnknownInstruction(f"line {one.line}: {what}: {one.text}")

    def reader(self, one: Instruction, operand: Operand, kind: str) -> Reader:
        """Return a function that reads an operand as an array of a PTX type."""
        dtype = np.dtype(DTYPES[kind])
        if isinstance(operand, Register):
            name = operand.name
            guarded = dtype if name in self.kernel.guarded else None

            def read(m: Machine, mask: Mask) -> Array:
                value = m.read(name, mask, guarded)
                if value.dtype is dtype:
                    return value
                if value.dtype.itemsize != dtype.itemsize:
                    raise self.refuse(one, f"register {name} of another size than {kind}")
                return value.view(dtype)

            return read
        constant = self.constant(one, operand, kind)
        return lambda m, mask: constant

    def constant(self, one: Instruction, operand: Operand, kind: str) -> Array:
        """Return an immediate operand or the address of a symbol, [1, 1]."""
        dtype = np.dtype(DTYPES[kind])
        if isinstance(operand, Symbol) and operand.name in self.symbols:
            value = self.symbols[operand.name]
        elif isinstance(operand, Immediate) and (
            kind in ("f32", "b32") if operand.bits else kind != "f32"
        ):
            value = operand.value
        else:
            raise self.refuse(one, f"operand {operand} as {kind}")
        if kind == "pred":
            return np.full((1, 1), value != 0)
        width = dtype.itemsize
        raw = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
        return np.frombuffer(raw, dtype).reshape(1, 1)

    def destination(self, one: Instruction, operand: Operand) -> str:
        if not isinstance(operand, Register) or operand.name.startswith("%tid"):
            raise self.refuse(one, f"destination {operand}")
        return operand.name

    def operands(self, one: Instruction, count: int) -> tuple[Operand, ...]:
        """Return the operands of an instruction that has so many."""
        if len(one.operands) != count:
            raise self.refuse(one, f"{len(one.operands)} operands instead of {count}")
        return one.operands

    def group(self, one: Instruction, operand: Operand, count: int) -> tuple[Operand, ...]:
        """Return the `count` operands in braces, or the operand itself if it has no braces."""
        items = operand.items if isinstance(operand, Group) else (operand,)
        if len(items) != count:
            raise self.refuse(one, f"{len(items)} registers instead of {count}")
        return items

    def address(self, one: Instruction, operand: Operand, shared: bool) -> Reader:
        """Return a function that reads an address as int64."""
        if not isinstance(operand, Address):
            raise self.refuse(one, f"operand {operand} as an address")
        offset = np.int64(operand.offset)
        if operand.base is None or operand.base in self.symbols:
            base = 0 if operand.base is None else self.symbols[operand.base]
            constant = np.full((1, 1), base + operand.offset, np.int64)
            return lambda m, mask: constant
        read = self.reader(one, Register(operand.base), "u32" if shared else "s64")
        if shared:
            return lambda m, mask: read(m, mask).astype(np.int64) + offset
        return lambda m, mask: read(m, mask) + offset

    def whole(self, one: Instruction, kinds: str, operands: tuple[Operand, ...]) -> list[Reader]:
        """Return readers of an instruction that whole warps execute; they give [warps, 32]."""
        if one.guard is not None:
            raise self.refuse(one, "a guarded instruction of a warp")

        def broadcast(read: Reader) -> Reader:
            return lambda m, mask: np.broadcast_to(read(m, mask), (m.warps, 32))

        return [broadcast(self.reader(one, operand, kinds)) for operand in operands]
