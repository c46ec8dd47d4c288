# SPDX-License-Identifier: Apache-2.0
"""Translate parsed instructions into functions that execute them on a `Machine`."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from testing.ptx import warp
from testing.ptx.accesses import gathered, spread
from testing.ptx.errors import UndefinedResult
from testing.ptx.machine import Block, Machine, Step
from testing.ptx.operands import Reader
from testing.ptx.operations import DTYPES, OPERATIONS
from testing.ptx.parser import (
    Group,
    Immediate,
    Instruction,
    Register,
    Symbol,
)
from testing.ptx.tensor_memory import TRY_WAIT, TensorMemoryAccesses

_SHUFFLE = re.compile(r"shfl\.sync\.(up|down|bfly|idx)\.b32$")
_BY_HALVES = re.compile(r"(mov\.b64|selp\.b64|(add|sub|mul|fma\.rn)\.f32x2)$")
"""Instructions that treat the halves of a 64-bit register alike."""

_FROM_BYTE = re.compile(r"cvt\.[su]\d+\.[su]8$")
"""Conversions of the lowest byte of a register, which may be wider."""

_WARP_GROUP = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(f16|bf16)\.\2$")
_WITHOUT_EFFECT = (
    "bar.warp.sync", "fence.proxy.async.shared::cta", "wgmma.fence.sync.aligned",
    "wgmma.commit_group.sync.aligned",
)  # fmt: skip
"""Instructions that order accesses that this machine orders anyway."""
_RELINQUISH = "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned"


class Decoder(TensorMemoryAccesses):
    """Translates a kernel's instructions into steps."""

    def blocks(self) -> dict[int, Block]:
        """Return the kernel as blocks."""
        instructions, labels = self.kernel.instructions, self.kernel.labels
        ends = ("bra", "bra.uni", "ret", "exit", "bar.sync", "barrier.sync", *TRY_WAIT)
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
            if last is not None and last.opcode in TRY_WAIT and len(part) > 1:
                # The wait is repeated alone.
                blocks[stop - 1] = Block((), (last, last), self.end(last, stop))
        return blocks

    def end(self, last: Instruction | None, following: int) -> Step:
        """Return the step that ends a block and says what runs next."""
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
        if last.opcode in TRY_WAIT:
            return self.try_wait(last, following - 1, following)
        if guard is not None or last.operands != (Immediate(0),):
            raise self.refuse(last, "a barrier other than 0, or a guarded one")
        return lambda m: m.barrier(following)

    # Instructions

    def step(self, one: Instruction) -> Step:
        """Return the step of an instruction that does not end a block."""
        opcode = one.opcode
        if opcode.startswith("mov.b") and any(isinstance(x, Group) for x in one.operands):
            return self.pack(one)
        if opcode in OPERATIONS:
            return self.lane_wise(one)
        if opcode.startswith("setp.") and opcode.endswith(".f16x2"):
            return self.compare_halves(one)
        if step := self.access(one) or self.tensor_memory_access(one):
            return step
        if match := _SHUFFLE.match(opcode):
            return self.shuffle(one, match)
        if opcode in warp.MMA:
            return self.mma(one)
        if opcode.startswith("redux.sync.") and opcode[11:] in warp.REDUCTIONS:
            return self.reduce(one)
        if match := _WARP_GROUP.match(opcode):
            return self.warp_group(one, int(match[1]), match[2])
        if opcode == "wgmma.wait_group.sync.aligned" and one.operands == (Immediate(0),):
            return lambda m: m.settle(set(m.in_flight), m.whole_warps(m.mask))
        if (opcode in _WITHOUT_EFFECT and one.guard is None) or opcode == _RELINQUISH:
            return lambda m: None
        raise self.refuse(one)

    def lane_wise(self, one: Instruction) -> Step:
        operation = OPERATIONS[one.opcode]
        if len(one.operands) == 4:
            operation = OPERATIONS.get(f"{one.opcode}/3", operation)
        target, *sources = self.operands(one, 1 + len(operation.sources))
        name = self.destination(one, target)
        held = 8 * np.dtype(DTYPES[operation.result]).itemsize
        kind = self.kernel.type_of(name) if name != "_" else f"b{held}"
        if operation.result != "pred" and int(kind[1:]) != held:
            raise self.refuse(one, f"a result of {held} bits in a register of type {kind}")
        kinds = operation.sources
        if _FROM_BYTE.match(one.opcode) and isinstance(sources[0], Register):
            kinds = (self.kernel.type_of(sources[0].name),)
        readers = [
            self.reader(one, operand, kind) for operand, kind in zip(sources, kinds, strict=True)
        ]
        function, defined, guard, negated = (
            operation.function, operation.defined, one.guard, one.negated,
        )  # fmt: skip
        if _BY_HALVES.match(one.opcode):
            registers = [x.name for x in sources if isinstance(x, Register)]
            return self.by_halves(one, name, registers, readers, function)

        def step(m: Machine) -> None:
            mask = m.mask if guard is None else m.guarded(guard, negated)
            if mask is False:
                return
            values, missing = m.read_for_itself(readers, mask)
            if defined is not None:
                bad = ~defined(*values)
                if (bad if mask is None else bad & mask).any():
                    raise UndefinedResult("the result is undefined for these operands")
            m.write(name, function(*values), mask)
            for lanes in missing:
                m.undefine(name, lanes, mask)

        return step

    def compare_halves(self, one: Instruction) -> Step:
        """Make a comparison of both halves of registers, with a predicate for each half."""
        *targets, first, second = self.operands(one, 4)
        names = [self.destination(one, target) for target in targets]
        operation = OPERATIONS.get(one.opcode.removesuffix("x2"))
        if operation is None or one.guard is not None:
            raise self.refuse(one)
        readers = [self.reader(one, operand, "b32") for operand in (first, second)]

        def step(m: Machine) -> None:
            values, missing = m.read_for_itself(readers, m.mask)
            for shift, name in zip((0, 16), names, strict=True):
                halves = [(x >> np.uint32(shift)).astype(np.uint16) for x in values]
                m.write(name, operation.function(*halves), m.mask)
                for lanes in missing:
                    m.undefine(name, lanes, m.mask)

        return step

    def by_halves(
        self, one: Instruction, name: str, sources: list[str], readers: list[Reader], function: Any
    ) -> Step:
        """Make a step that allows sources with an undefined half, and leaves this half undefined.

        LLVM leaves half of a register undefined if only the other half of the result is used.
        """
        guard, negated = one.guard, one.negated

        def step(m: Machine) -> None:
            mask = m.mask if guard is None else m.guarded(guard, negated)
            if mask is False:
                return
            # Elsewhere, reading a register with an undefined half is an error.
            before = {x: m.undefined_halves.pop(x) for x in sources if x in m.undefined_halves}
            values = [read(m, mask) for read in readers]
            m.undefined_halves |= before
            m.write(name, function(*values), mask)
            if before:
                m.undefined_halves[name] = frozenset().union(*before.values())

        return step

    def pack(self, one: Instruction) -> Step:
        """Make a move between a register and its parts, which are in braces."""
        target, source = self.operands(one, 2)
        whole = f"u{one.opcode[5:]}"
        bits = int(whole[1:])
        if isinstance(target, Group):
            count = len(target.items)
            part = DTYPES[f"u{bits // count}"]
            names = [self.destination(one, item) for item in target.items]
            read = self.reader(one, source, whole)
            origin = source.name if isinstance(source, Register) else ""

            def unpack(m: Machine) -> None:
                undefined = m.undefined_halves.pop(origin, frozenset())
                value = read(m, m.mask)
                for i, name in enumerate(names):
                    if i in undefined:
                        m.registers.pop(name, None)
                    else:
                        shifted = value >> value.dtype.type(i * bits // count)
                        m.write(name, shifted.astype(part), m.mask)
                if undefined:
                    m.undefined_halves[origin] = undefined

            step: Step = unpack
        else:
            assert isinstance(source, Group)
            count = len(source.items)
            readers = [self.reader(one, item, f"u{bits // count}") for item in source.items]
            name, dtype = self.destination(one, target), DTYPES[whole]

            def join(m: Machine) -> None:
                value, undefined = np.zeros((1, 1), dtype), set[int]()
                for i, (read, item) in enumerate(zip(readers, source.items, strict=True)):
                    if isinstance(item, Register) and item.name not in m.registers:
                        undefined.add(i)
                    else:
                        value = value | (read(m, m.mask).astype(dtype) << dtype(i * bits // count))
                m.write(name, value, m.mask)
                if undefined:
                    m.undefined_halves[name] = frozenset(undefined)

            step = join
        if one.guard is not None:
            raise self.refuse(one, "a guarded move of several registers")
        return step

    def mma(self, one: Instruction) -> Step:
        kind = warp.MMA[one.opcode]
        target, *sources = self.operands(one, 4)
        names = [self.destination(one, item) for item in self.group(one, target, 4)]
        a, b, c = (
            self.whole(one, "u32", self.group(one, source, count))
            for source, count in zip(sources, (4, 2, 4), strict=True)
        )

        def step(m: Machine) -> None:
            mask = m.whole_warps(m.mask)
            parts = ([read(m, mask) for read in part] for part in (a, b, c))
            for name, value in zip(names, warp.mma(kind, *parts), strict=True):
                m.write(name, value, mask)

        return step

    def warp_group(self, one: Instruction, columns: int, kind: str) -> Step:
        """Make a product of 64 rows (`wgmma`). Each of four warps has 16 rows in registers."""
        target, left, right, accumulates, *signs, transposed = self.operands(one, 7)
        if signs != [Immediate(1)] * 2 or not isinstance(transposed, Immediate):
            raise self.refuse(one, "a negated operand")
        count = columns // 2
        names = [self.destination(one, item) for item in self.group(one, target, count)]
        a = self.whole(one, "u32", self.group(one, left, 4))
        c = self.whole(one, "u32", self.group(one, target, count))
        read, read_predicate = self.reader(one, right, "u64"), self.reader(one, accumulates, "pred")

        def step(m: Machine) -> None:
            mask = m.whole_warps(m.mask)
            m.settle(set(names), mask)
            place = np.broadcast_to(read(m, mask), (m.warps, 1))
            address = warp.matrix_in_shared_memory(place, columns, bool(transposed.value))
            address = address.reshape(m.warps, -1)
            (at, slot, keys), shape = spread(mask, address, m.slot, m.keys)
            numbers = m.shared.read(at, 2, slot, keys).view(np.uint16)[:, 0]
            matrix = gathered(numbers, mask, shape).reshape(m.warps, 16, columns)
            keep = read_predicate(m, mask)
            sums = [np.where(keep, read_sum(m, mask), np.uint32(0)) for read_sum in c]
            left_registers = [read_left(m, mask) for read_left in a]
            for j in range(columns // 8):
                part = warp.product(kind, left_registers, matrix[..., 8 * j : 8 * j + 8])
                product = warp.sum_with(part, sums[4 * j : 4 * j + 4])
                for name, value in zip(names[4 * j : 4 * j + 4], product, strict=True):
                    m.write(name, value, mask)
            m.launch(names, mask)

        return step

    def shuffle(self, one: Instruction, match: re.Match[str]) -> Step:
        target, source, lane, clamp, members = self.operands(one, 5)
        if members != Immediate(-1):
            raise self.refuse(one, "a member mask other than -1")
        name = self.destination(one, target)
        (read,) = self.whole(one, "u32", (source,))
        read_lane, read_clamp = (self.reader(one, x, "u32") for x in (lane, clamp))
        mode = match[1]

        def step(m: Machine) -> None:
            mask = m.whole_warps(m.mask)
            origin = warp.shuffle_source(mode, read_lane(m, mask), read_clamp(m, mask))
            (value,), missing = m.read_for_itself([read], mask)
            m.write(name, warp.shuffle(value, origin), mask)
            for lanes in missing:
                m.undefine(name, warp.shuffle(lanes, origin), mask)

        return step

    def reduce(self, one: Instruction) -> Step:
        target, source, members = self.operands(one, 3)
        name = self.destination(one, target)
        (read,) = self.whole(one, "u32", (source,))
        read_members = self.reader(one, members, "u32")
        function = warp.REDUCTIONS[one.opcode[11:]]

        def step(m: Machine) -> None:
            mask = m.whole_warps(m.mask)
            if (read_members(m, mask) != 0xFFFFFFFF).any():
                raise self.refuse(one, "a member mask other than -1")
            m.write(name, function(read(m, mask)), mask)

        return step
