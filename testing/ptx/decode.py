# SPDX-License-Identifier: Apache-2.0
"""Parsed instructions to functions that execute them on a `Machine`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from testing.ptx import warp
from testing.ptx.arithmetic import Array
from testing.ptx.errors import UndefinedResult, UnknownInstruction
from testing.ptx.machine import Block, Machine, Mask, Step
from testing.ptx.operations import DTYPES, OPERATIONS
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

_SPACES = r"(?:\.(?:global|shared|shared::cta|param))"
_LOAD = re.compile(
    r"ld(?:\.volatile|\.relaxed\.gpu)?\.(global|shared|shared::cta|param)"
    r"(?:\.L1::\w+|\.L2::\w+)*(?:\.v([24]))?\.([bsuf]\d+)$"
)
_STORE = re.compile(
    r"st(?:\.volatile)?\.(global|shared|shared::cta)"
    r"(?:\.L1::\w+|\.L2::\w+)*(?:\.v([24]))?\.([bsuf]\d+)$"
)
_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global(?:\.L2::\w+)*$")
_MATRIX = re.compile(
    r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16$"
)
_SHUFFLE = re.compile(r"shfl\.sync\.(up|down|bfly|idx)\.b32$")


class Decoder:
    """Makes steps of the instructions of a kernel."""

    def __init__(self, kernel: Kernel, symbols: dict[str, int]) -> None:
        self.kernel, self.symbols = kernel, symbols

    def blocks(self) -> dict[int, Block]:
        """Return the kernel as blocks."""
        instructions, labels = self.kernel.instructions, self.kernel.labels
        ends = ("bra", "bra.uni", "ret", "exit", "bar.sync", "barrier.sync")
        starts = {0, *(i + 1 for i, one in enumerate(instructions) if one.opcode in ends)}
        targets = {
            operand.name for one in instructions for operand in one.operands
            if one.opcode.startswith("bra") and isinstance(operand, Symbol)
        }  # fmt: skip
        starts |= {labels[name] for name in targets}
        order = sorted(start for start in starts if start < len(instructions))
        blocks = {}
        for start, stop in zip(order, [*order[1:], len(instructions)], strict=True):
            part = instructions[start:stop]
            last = part[-1] if part[-1].opcode in ends else None
            steps = tuple(self.step(one) for one in (part[:-1] if last else part))
            blocks[start] = Block(steps, (*part, part[-1]), self.end(last, stop))
        return blocks

    def end(self, last: Instruction | None, following: int) -> Step:
        """Return the step after the last one of a block."""
        if last is None:
            return lambda m: m.go(following)
        guard, negated = last.guard, last.negated
        if last.opcode in ("bra", "bra.uni"):
            (target,) = last.operands
            assert isinstance(target, Symbol)
            to = self.kernel.labels[target.name]
            if guard is None:
                return lambda m: m.go(to)
            return lambda m: m.branch(guard, negated, to, following)
        if last.opcode in ("ret", "exit"):
            if guard is not None:
                raise self.refuse(last, "a guarded return")
            return lambda m: m.finish(m.mask)
        if guard is not None or last.operands != (Immediate(0),):
            raise self.refuse(last, "a barrier other than 0, or a guarded one")
        return lambda m: m.barrier(following)

    @staticmethod
    def refuse(one: Instruction, what: str | None = None) -> UnknownInstruction:
        what = f"unknown opcode {one.opcode!r}" if what is None else f"{what} is not supported"
        return UnknownInstruction(f"line {one.line}: {what}: {one.text}")

    def smallest_shared_access(self) -> int:
        """Return the bytes of the smallest access to shared memory."""
        sizes = [16]
        for one in self.kernel.instructions:
            match = _LOAD.match(one.opcode) or _STORE.match(one.opcode)
            if match and match[1] != "global":
                element = int(match[3][1:]) // 8
                sizes.append(element if one.used_bytes != -1 else element * int(match[2] or 1))
            elif _COPY.match(one.opcode) and isinstance(one.operands[2], Immediate):
                sizes.append(one.operands[2].value)
        return min(sizes)

    # Operands

    def reader(self, one: Instruction, operand: Operand, kind: str) -> Reader:
        """Return a function that reads an operand as an array of a PTX type."""
        dtype = np.dtype(DTYPES[kind])
        if isinstance(operand, Register):
            name = operand.name

            def read(m: Machine, mask: Mask) -> Array:
                value = m.read(name, mask)
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

    def group(self, one: Instruction, operand: Operand, count: int) -> tuple[Operand, ...]:
        """Return the `count` operands in braces, or the only one without."""
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

    # Instructions

    def step(self, one: Instruction) -> Step:
        """Return the step of an instruction that does not end a block."""
        opcode = one.opcode
        if opcode.startswith("mov.b") and any(isinstance(x, Group) for x in one.operands):
            return self.pack(one)
        if opcode in OPERATIONS:
            return self.lane_wise(one)
        for pattern, make in (
            (_LOAD, self.load), (_STORE, self.store), (_MATRIX, self.matrix),
            (_SHUFFLE, self.shuffle),
        ):  # fmt: skip
            if match := pattern.match(opcode):
                return make(one, match)
        if _COPY.match(opcode):
            return self.copy(one)
        if opcode in warp.MMA:
            return self.mma(one)
        if opcode.startswith("redux.sync.") and opcode[11:] in warp.REDUCTIONS:
            return self.reduce(one)
        simple: dict[str, Step] = {
            "cp.async.commit_group": _commit,
            "cp.async.wait_all": _wait_for_all,
            "bar.warp.sync": lambda m: None,
        }
        if opcode == "cp.async.wait_group":
            (count,) = one.operands
            assert isinstance(count, Immediate)
            allowed = count.value
            return lambda m: _wait(m, m.committed - allowed)
        if opcode in simple and one.guard is None:
            return simple[opcode]
        raise self.refuse(one)

    def lane_wise(self, one: Instruction) -> Step:
        operation = OPERATIONS[one.opcode]
        if len(one.operands) == 4:
            operation = OPERATIONS.get(f"{one.opcode}/3", operation)
        if len(one.operands) != 1 + len(operation.sources):
            raise self.refuse(one, f"{len(one.operands)} operands")
        name = self.destination(one, one.operands[0])
        held = 8 * np.dtype(DTYPES[operation.result]).itemsize
        kind = self.kernel.type_of(name) if name != "_" else f"b{held}"
        if operation.result != "pred" and int(kind[1:]) != held:
            raise self.refuse(one, f"a result of {held} bits in a register of type {kind}")
        readers = [
            self.reader(one, operand, kind)
            for operand, kind in zip(one.operands[1:], operation.sources, strict=True)
        ]
        function, defined, guard, negated = (
            operation.function, operation.defined, one.guard, one.negated,
        )  # fmt: skip

        def step(m: Machine) -> None:
            mask = m.mask if guard is None else m.guarded(guard, negated)
            if mask is False:
                return
            values = [read(m, mask) for read in readers]
            if defined is not None:
                bad = ~defined(*values)
                if (bad if mask is None else bad & mask).any():
                    raise UndefinedResult("the result is undefined for these operands")
            m.write(name, function(*values), mask)

        return step

    def pack(self, one: Instruction) -> Step:
        """A move between a register and the parts of it in braces."""
        target, source = one.operands
        whole = f"u{one.opcode[5:]}"
        bits = int(whole[1:])
        if isinstance(target, Group):
            count = len(target.items)
            part = DTYPES[f"u{bits // count}"]
            names = [self.destination(one, item) for item in target.items]
            read = self.reader(one, source, whole)

            def unpack(m: Machine) -> None:
                value = read(m, m.mask)
                for i, name in enumerate(names):
                    m.write(
                        name, (value >> value.dtype.type(i * bits // count)).astype(part), m.mask
                    )

            step: Step = unpack
        else:
            assert isinstance(source, Group)
            count = len(source.items)
            readers = [self.reader(one, item, f"u{bits // count}") for item in source.items]
            name, dtype = self.destination(one, target), DTYPES[whole]

            def join(m: Machine) -> None:
                value = readers[0](m, m.mask).astype(dtype)
                for i, read in enumerate(readers[1:], 1):
                    value = value | (read(m, m.mask).astype(dtype) << dtype(i * bits // count))
                m.write(name, value, m.mask)

            step = join
        if one.guard is not None:
            raise self.refuse(one, "a guarded move of several registers")
        return step

    def load(self, one: Instruction, match: re.Match[str]) -> Step:
        space, vector, kind = match.groups()
        count = int(vector or 1)
        dtype = np.dtype(DTYPES[kind])
        width = count * dtype.itemsize
        names = [
            self.destination(one, item) for item in self.group(one, one.operands[0], count)
        ]  # fmt: skip
        held = [
            DTYPES[f"{kind[0] if kind[0] in 'su' else 'u'}{self.kernel.type_of(n)[1:]}"]
            for n in names
        ]
        if space == "param":
            return self.load_parameter(one, names[0], held[0], kind)
        read = self.address(one, one.operands[1], space != "global")
        guard, negated, where = one.guard, one.negated, str(one)
        mask_of_bytes = one.used_bytes & ((1 << width) - 1)
        used = [bool(mask_of_bytes >> (i * dtype.itemsize) & 1) for i in range(count)]

        def step(m: Machine) -> None:
            mask = m.mask if guard is None else m.guarded(guard, negated)
            if mask is False:
                return
            (address, slot, keys), shape = _spread(mask, read(m, mask), m.slot, m.keys)
            if space == "global":
                data = m.memory.read(address, width, keys, where)
            else:
                cells = None
                if not all(used):
                    cells = np.repeat(used, width // count // m.shared.granule)
                data = m.shared.read(address, width, slot, keys, cells)
            values = np.ascontiguousarray(data.view(dtype).T)
            for name, value, kept, holds in zip(names, values, used, held, strict=True):
                m.write(name, _gathered(value.astype(holds, copy=False), mask, shape), mask)
                if not kept:
                    m.partial[name] = np.zeros((1, 1), np.bool_)

        return step

    def load_parameter(self, one: Instruction, name: str, held: Any, kind: str) -> Step:
        source = one.operands[1]
        if not isinstance(source, Address) or source.base is None or source.offset:
            raise self.refuse(one, "such a parameter")
        parameter = source.base
        declared = dict(self.kernel.parameters).get(parameter)
        if declared is None or declared[1:] != kind[1:]:
            raise self.refuse(one, f"parameter {parameter} as {kind}")
        dtype = DTYPES[kind]
        return lambda m: m.write(
            name, m.registers[parameter].view(dtype).astype(held, copy=False), m.mask
        )

    def store(self, one: Instruction, match: re.Match[str]) -> Step:
        space, vector, kind = match.groups()
        count = int(vector or 1)
        dtype = np.dtype(DTYPES[kind])
        read = self.address(one, one.operands[0], space != "global")
        items = self.group(one, one.operands[1], count)
        wide = [
            isinstance(x, Register) and dtype.itemsize == 1 and self.kernel.type_of(x.name)[1:]
            for x in items
        ]  # fmt: skip
        readers = [
            self.reader(one, item, f"u{bits}" if bits else kind)
            for item, bits in zip(items, wide, strict=True)
        ]
        guard, negated, where = one.guard, one.negated, str(one)

        def step(m: Machine) -> None:
            mask = m.mask if guard is None else m.guarded(guard, negated)
            if mask is False:
                return
            values = [reader(m, mask).astype(dtype, copy=False) for reader in readers]
            (address, slot, keys, *values), _ = _spread(
                mask, read(m, mask), m.slot, m.keys, *values
            )  # fmt: skip
            data = np.stack(values, axis=1).view(np.uint8)
            if space == "global":
                m.memory.write(address, data, keys, where)
            else:
                m.shared.write(address, data, slot, keys)

        return step

    def copy(self, one: Instruction) -> Step:
        target, source, size, *rest = one.operands
        if not isinstance(size, Immediate) or len(rest) > 1:
            raise self.refuse(one, "a cache policy")
        width = size.value
        write, read = self.address(one, target, True), self.address(one, source, False)
        read_size = self.reader(one, rest[0] if rest else size, "u32")
        guard, negated, where = one.guard, one.negated, str(one)

        def step(m: Machine) -> None:
            mask = m.mask if guard is None else m.guarded(guard, negated)
            if mask is False:
                return
            (to, origin, sizes, slot, keys, threads), _ = _spread(
                mask, write(m, mask), read(m, mask), read_size(m, mask), m.slot, m.keys, m.threads
            )
            data = np.zeros((len(to), width), np.uint8)
            for bytes_read in np.unique(sizes).tolist():
                if bytes_read:
                    if bytes_read & (bytes_read - 1) or bytes_read > width:
                        raise self.refuse(one, f"a copy of {bytes_read} bytes")
                    some = sizes == bytes_read
                    data[some, :bytes_read] = m.memory.read(
                        origin[some], bytes_read, keys[some], where
                    )
            m.shared.copy(to, data, slot, keys, threads, m.committed[threads])

        return step

    def matrix(self, one: Instruction, match: re.Match[str]) -> Step:
        loads, count, transposed = match[1] == "ld", int(match[2]), match[3] is not None
        registers, place = one.operands if loads else one.operands[::-1]
        items = self.group(one, registers, count)
        read = self.address(one, place, True)
        names = [self.destination(one, item) for item in items] if loads else []
        readers = [] if loads else [self.reader(one, item, "u32") for item in items]
        if one.guard is not None:
            raise self.refuse(one, "a guarded instruction of a warp")
        rows = 8 * count

        def step(m: Machine) -> None:
            mask = m.whole_warps(m.mask)
            address = np.broadcast_to(read(m, m.mask), (m.warps, 32))[:, :rows]
            (address, slot, keys), _ = _spread(mask, address, m.slot, m.keys)
            if loads:
                data = m.shared.read(address, 16, slot, keys)
                data = data.view(np.uint16).reshape(-1, count, 8, 8)
                fragments = warp.matrix_rows_to_fragments(data, transposed)
                for name, value in zip(names, fragments, strict=True):
                    if mask is not None:
                        full = np.zeros((m.warps, 32), np.uint32)
                        full[mask[:, 0]] = value
                        value = full
                    m.write(name, value, mask)
            else:
                values = [np.broadcast_to(reader(m, m.mask), (m.warps, 32)) for reader in readers]
                if mask is not None:
                    values = [value[mask[:, 0]] for value in values]
                data = warp.fragments_to_matrix_rows(values, transposed)
                m.shared.write(address, data.reshape(-1, 8).view(np.uint8), slot, keys)

        return step

    def _whole(self, one: Instruction, kinds: str, operands: tuple[Operand, ...]) -> list[Reader]:
        """Return readers that broadcast to [warps, 32], of an instruction of whole warps."""
        if one.guard is not None:
            raise self.refuse(one, "a guarded instruction of a warp")

        def broadcast(read: Reader) -> Reader:
            return lambda m, mask: np.broadcast_to(read(m, mask), (m.warps, 32))

        return [broadcast(self.reader(one, operand, kinds)) for operand in operands]

    def mma(self, one: Instruction) -> Step:
        kind = warp.MMA[one.opcode]
        target, *sources = one.operands
        names = [self.destination(one, item) for item in self.group(one, target, 4)]
        a, b, c = (
            self._whole(one, "u32", self.group(one, source, count))
            for source, count in zip(sources, (4, 2, 4), strict=True)
        )

        def step(m: Machine) -> None:
            mask = m.whole_warps(m.mask)
            parts = ([read(m, mask) for read in part] for part in (a, b, c))
            for name, value in zip(names, warp.mma(kind, *parts), strict=True):
                m.write(name, value, mask)

        return step

    def shuffle(self, one: Instruction, match: re.Match[str]) -> Step:
        target, source, lane, clamp, members = one.operands
        if members != Immediate(-1):
            raise self.refuse(one, "a member mask other than -1")
        name = self.destination(one, target)
        (read,) = self._whole(one, "u32", (source,))
        read_lane, read_clamp = (self.reader(one, x, "u32") for x in (lane, clamp))
        mode = match[1]

        def step(m: Machine) -> None:
            mask = m.whole_warps(m.mask)
            origin = warp.shuffle_source(mode, read_lane(m, mask), read_clamp(m, mask))
            m.write(name, warp.shuffle(read(m, mask), origin), mask)

        return step

    def reduce(self, one: Instruction) -> Step:
        target, source, members = one.operands
        name = self.destination(one, target)
        (read,) = self._whole(one, "u32", (source,))
        read_members = self.reader(one, members, "u32")
        function = warp.REDUCTIONS[one.opcode[11:]]

        def step(m: Machine) -> None:
            mask = m.whole_warps(m.mask)
            if (read_members(m, mask) != 0xFFFFFFFF).any():
                raise self.refuse(one, "a member mask other than -1")
            m.write(name, function(read(m, mask)), mask)

        return step


def _spread(mask: Mask, *arrays: Array) -> tuple[list[Array], tuple[int, ...]]:
    """Return arrays of the same shape as the elements of the lanes of a mask, and that shape."""
    shapes = [array.shape for array in arrays]
    shape = np.broadcast_shapes(*shapes, (1, 1) if mask is None else mask.shape)
    spread = [np.broadcast_to(array, shape) for array in arrays]
    if mask is None:
        return [array.reshape(-1) for array in spread], shape
    where = np.broadcast_to(mask, shape)
    return [array[where] for array in spread], shape


def _gathered(values: Array, mask: Mask, shape: tuple[int, ...]) -> Array:
    """Undo `_spread`; other lanes get zeros."""
    if mask is None:
        return values.reshape(shape)
    full = np.zeros(shape, values.dtype)
    full[np.broadcast_to(mask, shape)] = values
    return full


def _running(m: Machine) -> Array:
    """Return the numbers of the lanes that run."""
    return m.threads[np.broadcast_to(True if m.mask is None else m.mask, m.threads.shape)]


def _commit(m: Machine) -> None:
    m.committed[_running(m)] += 1


def _wait(m: Machine, allowed: Array) -> None:
    limit = np.zeros_like(allowed)
    running = _running(m)
    limit[running] = allowed[running]
    m.shared.wait(limit, m.all_keys)


def _wait_for_all(m: Machine) -> None:
    _wait(m, m.committed + 1)
