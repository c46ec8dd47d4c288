# SPDX-License-Identifier: Apache-2.0
"""Translate instructions that access memory into functions that execute them on a `Machine`."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from testing.ptx import warp
from testing.ptx.arithmetic import Array
from testing.ptx.machine import Machine, Mask, Step
from testing.ptx.operands import Operands
from testing.ptx.operations import DTYPES
from testing.ptx.parser import Address, Immediate, Instruction, Register

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

_ATOMIC = re.compile(r"atom\.global\.gpu\.acq_rel\.(min|max)\.(s32)$")


class Accesses(Operands):
    """Translates a kernel's memory instructions into steps."""

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
            elif one.opcode.startswith("wgmma.mma"):
                sizes.append(2)
        return min(sizes)

    def access(self, one: Instruction) -> Step | None:
        """Return the step of an instruction that accesses memory, or None if it accesses none."""
        for pattern, make in (
            (_LOAD, self.load), (_STORE, self.store), (_MATRIX, self.matrix),
            (_ATOMIC, self.update),
        ):  # fmt: skip
            if match := pattern.match(one.opcode):
                return make(one, match)
        if _COPY.match(one.opcode):
            return self.copy(one)
        if one.opcode in ("cp.async.commit_group", "cp.async.wait_all") and one.guard is None:
            return _commit if one.opcode == "cp.async.commit_group" else _wait_for_all
        if one.opcode == "cp.async.wait_group" and one.guard is None:
            (count,) = one.operands
            if isinstance(count, Immediate):
                allowed = count.value
                return lambda m: _wait(m, m.committed - allowed)
        return None

    def load(self, one: Instruction, match: re.Match[str]) -> Step:
        space, vector, kind = match.groups()
        count = int(vector or 1)
        dtype = np.dtype(DTYPES[kind])
        width = count * dtype.itemsize
        target, source = self.operands(one, 2)
        names = [
            self.destination(one, item) for item in self.group(one, target, count)
        ]  # fmt: skip
        held = [
            DTYPES[f"{kind[0] if kind[0] in 'su' else 'u'}{self.kernel.type_of(n)[1:]}"]
            for n in names
        ]
        if space == "param":
            return self.load_parameter(one, names[0], held[0], kind)
        read = self.address(one, source, space != "global")
        guard, negated, where = one.guard, one.negated, str(one)
        mask_of_bytes = one.used_bytes & ((1 << width) - 1)
        used = [bool(mask_of_bytes >> (i * dtype.itemsize) & 1) for i in range(count)]

        def step(m: Machine) -> None:
            mask = m.mask if guard is None else m.guarded(guard, negated)
            if mask is False:
                return
            (address, slot, keys), shape = spread(mask, read(m, mask), m.slot, m.keys)
            if space == "global":
                data = m.memory.read(address, width, keys, where)
            else:
                cells = None
                if not all(used):
                    cells = np.repeat(used, width // count // m.shared.granule)
                data = m.shared.read(address, width, slot, keys, cells)
            values = np.ascontiguousarray(data.view(dtype).T)
            for name, value, kept, holds in zip(names, values, used, held, strict=True):
                m.write(name, gathered(value.astype(holds, copy=False), mask, shape), mask)
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
        place, data_operand = self.operands(one, 2)
        read = self.address(one, place, space != "global")
        items = self.group(one, data_operand, count)
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
            (address, slot, keys, *values), _ = spread(
                mask, read(m, mask), m.slot, m.keys, *values
            )  # fmt: skip
            data = np.stack(values, axis=1).view(np.uint8)
            if space == "global":
                m.memory.write(address, data, keys, where)
            else:
                m.shared.write(address, data, slot, keys)

        return step

    def update(self, one: Instruction, match: re.Match[str]) -> Step:
        target, place, operand = self.operands(one, 3)
        name, kind = self.destination(one, target), match[2]
        read, read_value = self.address(one, place, False), self.reader(one, operand, kind)
        function = {"min": np.minimum, "max": np.maximum}[match[1]]
        guard, negated, where = one.guard, one.negated, str(one)

        def step(m: Machine) -> None:
            mask = m.mask if guard is None else m.guarded(guard, negated)
            if mask is False:
                return
            (address, value, keys), shape = spread(
                mask, read(m, mask), read_value(m, mask), m.keys
            )  # fmt: skip
            before = m.memory.update(address, value, function, keys, where)
            m.write(name, gathered(before, mask, shape), mask)

        return step

    def copy(self, one: Instruction) -> Step:
        target, source, size, *rest = one.operands
        if len(rest) > 1 or not isinstance(size, Immediate):
            raise self.refuse(one, "a cache policy")
        width = size.value
        write, read = self.address(one, target, True), self.address(one, source, False)
        read_size = self.reader(one, rest[0] if rest else size, "u32")
        guard, negated, where = one.guard, one.negated, str(one)

        def step(m: Machine) -> None:
            mask = m.mask if guard is None else m.guarded(guard, negated)
            if mask is False:
                return
            (to, origin, sizes, slot, keys, threads), _ = spread(
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
        registers, place = self.operands(one, 2)[:: 1 if loads else -1]
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
            (address, slot, keys), _ = spread(mask, address, m.slot, m.keys)
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


def spread(mask: Mask, *arrays: Array) -> tuple[list[Array], tuple[int, ...]]:
    """Broadcast arrays to one shape. Returns their elements of the mask's lanes, and the shape."""
    shapes = [array.shape for array in arrays]
    shape = np.broadcast_shapes(*shapes, (1, 1) if mask is None else mask.shape)
    spread = [np.broadcast_to(array, shape) for array in arrays]
    if mask is None:
        return [array.reshape(-1) for array in spread], shape
    where = np.broadcast_to(mask, shape)
    return [array[where] for array in spread], shape


def gathered(values: Array, mask: Mask, shape: tuple[int, ...]) -> Array:
    """Undo `spread`; other lanes get zeros."""
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
