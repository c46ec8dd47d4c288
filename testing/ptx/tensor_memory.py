# SPDX-License-Identifier: Apache-2.0
"""Tensor memory, its instructions (`tcgen05`), and the barriers in shared memory that order them.

A product is computed when it is issued, and read only after its `mbarrier`. Waiting for an
`mbarrier` blocks. Not modelled: proxy fences, and when a product has read shared memory.
"""

from __future__ import annotations

import re

import numpy as np

from testing.ptx import warp
from testing.ptx.accesses import Accesses
from testing.ptx.arithmetic import Array
from testing.ptx.errors import OutOfBounds, Race, ReadBeforeWait, UninitialisedRead
from testing.ptx.machine import Machine, Step
from testing.ptx.parser import Immediate, Instruction

_ALLOCATE = "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32"
_FREE = "tcgen05.dealloc.cta_group::1.sync.aligned.b32"
_MULTIPLY = "tcgen05.mma.cta_group::1.kind::f16"
_COMMIT = re.compile(
    r"tcgen05\.commit\.cta_group::1\.mbarrier::arrive::one(\.shared::cluster)?\.b64$"
)
_MOVE = re.compile(r"tcgen05\.(ld|st)\.sync\.aligned\.32x32b\.x(\d+)\.b32$")
_BARRIER = re.compile(r"mbarrier\.(init|inval)\.shared::cta\.b64$")
TRY_WAIT = ("mbarrier.try_wait.parity.shared::cta.b64", "mbarrier.try_wait.parity.shared.b64")

COLUMNS = 512
UNWRITTEN, WRITTEN, STORING, MULTIPLYING = range(4)


class TensorMemory:
    """The tensor memory of one program: 128 lanes. Warp w has the 32 lanes from 32 (w % 4) on."""

    def __init__(self, columns: int) -> None:
        self.first = COLUMNS - columns
        self.words = np.zeros((128, COLUMNS), np.uint32)
        self.state = np.full((128, COLUMNS), UNWRITTEN)
        self.keys = np.zeros(128, np.int64)

    def columns(self, address: int, count: int) -> slice:
        first = address & 0xFFFF
        if not self.first <= first <= COLUMNS - count:
            raise OutOfBounds(f"{count} columns of tensor memory from {first} on")
        return slice(first, first + count)

    def check(self, lanes: slice, columns: slice, does: str) -> None:
        state = self.state[lanes, columns]
        if (state >= STORING).any():
            raise ReadBeforeWait(f"{does} tensor memory that may not have been written yet")
        if does == "reads" and (state == UNWRITTEN).any():
            raise UninitialisedRead("tensor memory that nothing has written")


def _of(m: Machine, row: int) -> TensorMemory:
    memory = m.tensor_memory.get(int(m.slot[row, 0]))
    if memory is None:
        raise OutOfBounds("the program has no tensor memory")
    return memory


def _rows(m: Machine, mask: Array | None) -> list[int]:
    """Return the warps with lanes in a mask."""
    return sorted({row for row, _ in _lanes(m, mask)})


def _lanes(m: Machine, mask: Array | None) -> list[list[int]]:
    """Return the warp and lane of each lane in a mask. Without a mask all lanes run."""
    return np.argwhere(np.broadcast_to(True if mask is None else mask, (m.warps, 32))).tolist()


def _phase(m: Machine, barrier: tuple[int, int]) -> int:
    if barrier not in m.phases:
        raise UninitialisedRead("an mbarrier that is not initialised")
    return m.phases[barrier]


class TensorMemoryAccesses(Accesses):
    """Translates instructions that use tensor memory or an `mbarrier` into steps."""

    def tensor_memory_access(self, one: Instruction) -> Step | None:
        """Return the step of an instruction for tensor memory or an `mbarrier`, or None."""
        if one.opcode == _ALLOCATE:
            return self.allocate(one)
        if one.opcode == _FREE:
            return self.free(one)
        if match := _MOVE.match(one.opcode):
            return (self.load_words if match[1] == "ld" else self.store_words)(one, int(match[2]))
        if one.opcode == _MULTIPLY:
            return self.multiply(one)
        if _COMMIT.match(one.opcode):
            return self.commit(one)
        if match := _BARRIER.match(one.opcode):
            return self.change_barrier(one, match[1] == "init")
        if one.opcode == "elect.sync":
            return self.elect(one)
        if one.opcode == "tcgen05.wait::st.sync.aligned" and one.guard is None:
            return _wait_for_stores
        if one.opcode == "tcgen05.wait::ld.sync.aligned" and one.guard is None:
            return _wait_for_loads
        return None

    def allocate(self, one: Instruction) -> Step:
        place, count = self.operands(one, 2)
        if not isinstance(count, Immediate):
            raise self.refuse(one, "a number of columns in a register")
        columns = count.value
        read, guard, negated = self.address(one, place, True), one.guard, one.negated

        def step(m: Machine) -> None:
            mask = m.guarded(guard, negated)
            if mask is False:
                return
            mask = m.whole_warps(mask)
            address = np.broadcast_to(read(m, mask), (m.warps, 1))
            for row in _rows(m, mask):
                memory = m.tensor_memory[int(m.slot[row, 0])] = TensorMemory(columns)
                first = np.array([[memory.first]], np.uint32).view(np.uint8)
                m.shared.write(address[row], first, m.slot[row], m.keys[row])

        return step

    def free(self, one: Instruction) -> Step:
        place, count = self.operands(one, 2)
        read, columns = self.reader(one, place, "u32"), self.reader(one, count, "u32")
        guard, negated = one.guard, one.negated

        def step(m: Machine) -> None:
            mask = m.guarded(guard, negated)
            if mask is False:
                return
            address = np.broadcast_to(read(m, mask), (m.warps, 32))
            for row in _rows(m, m.whole_warps(mask)):
                memory = _of(m, row)
                if memory.columns(int(address[row, 0]), int(columns(m, mask)[0, 0])) != slice(
                    memory.first, COLUMNS
                ):
                    raise OutOfBounds("tcgen05.dealloc of other columns than were allocated")
                del m.tensor_memory[int(m.slot[row, 0])]

        return step

    def place(self, m: Machine, row: int, address: Array) -> tuple[TensorMemory, slice]:
        """Return the lanes that a warp moves, and check that they are its own."""
        lane = int(m.warp[row, 0]) % 4 * 32
        if (address != address[0]).any() or int(address[0]) >> 16 != lane:
            raise OutOfBounds(f"a warp of the lanes from {lane} on accesses {address[0]:#x}")
        return _of(m, row), slice(lane, lane + 32)

    def load_words(self, one: Instruction, count: int) -> Step:
        target, source = self.operands(one, 2)
        names = [self.destination(one, item) for item in self.group(one, target, count)]
        read = self.address(one, source, True)
        if one.guard is not None:
            raise self.refuse(one, "a guarded instruction of a warp")

        def step(m: Machine) -> None:
            mask = m.whole_warps(m.mask)
            address = np.broadcast_to(read(m, mask), (m.warps, 32))
            values = np.zeros((count, m.warps, 32), np.uint32)
            for row in _rows(m, mask):
                memory, lanes = self.place(m, row, address[row])
                columns = memory.columns(int(address[row, 0]), count)
                memory.check(lanes, columns, "reads")
                values[:, row] = memory.words[lanes, columns].T
            for name, value in zip(names, values, strict=True):
                m.write(name, value, mask)
            m.launch(names, mask)
            m.loading |= set(names)

        return step

    def store_words(self, one: Instruction, count: int) -> Step:
        target, source = self.operands(one, 2)
        read = self.address(one, target, True)
        readers = [self.reader(one, item, "u32") for item in self.group(one, source, count)]
        guard, negated = one.guard, one.negated

        def step(m: Machine) -> None:
            mask = m.guarded(guard, negated)
            if mask is False:
                return
            mask = m.whole_warps(mask)
            address = np.broadcast_to(read(m, mask), (m.warps, 32))
            values = [np.broadcast_to(reader(m, mask), (m.warps, 32)) for reader in readers]
            for row in _rows(m, mask):
                memory, lanes = self.place(m, row, address[row])
                columns = memory.columns(int(address[row, 0]), count)
                if (memory.state[lanes, columns] == MULTIPLYING).any():
                    raise ReadBeforeWait("a warp overwrites the sums of a product in flight")
                memory.words[lanes, columns] = np.stack([value[row] for value in values], axis=1)
                memory.state[lanes, columns] = STORING
                memory.keys[lanes] = m.keys[row, 0]

        return step

    def multiply(self, one: Instruction) -> Step:
        sums, left, right, description, accumulates = self.operands(one, 5)
        read_sums, read_left = (self.address(one, x, True) for x in (sums, left))
        read_right = self.reader(one, right, "u64")
        read_description = self.reader(one, description, "u32")
        read_accumulates = self.reader(one, accumulates, "pred")
        guard, negated = one.guard, one.negated

        def step(m: Machine) -> None:
            mask = m.guarded(guard, negated)
            if mask is False:
                return
            shape = m.warps, 32
            to, origin, place, bits, keep = (
                np.broadcast_to(read(m, mask), shape)
                for read in (read_sums, read_left, read_right, read_description, read_accumulates)
            )
            for row, lane in _lanes(m, mask):
                # Supported: fp16 or bf16 with float32 sums, 128 rows, B by columns or by rows.
                description = int(bits[row, lane])
                if description & ~(0x3F << 17 | 1 << 16 | 9 << 7) != 8 << 24 | 1 << 4:
                    raise self.refuse(one, f"the instruction descriptor {description:#x}")
                kind = "bf16" if description >> 7 & 1 else "f16"
                columns = (description >> 17 & 0x3F) * 8
                memory = _of(m, row)
                target = memory.columns(int(to[row, lane]), columns)
                source = memory.columns(int(origin[row, lane]), 8)
                everywhere = slice(0, 128)
                memory.check(everywhere, source, "reads")
                others = (memory.keys >= m.keys[row, 0] & ~255) & (memory.keys != m.keys[row, 0])
                if others.any():
                    raise Race("a product reads tensor memory that another warp has stored")
                address = warp.matrix_in_shared_memory(
                    place[row : row + 1, lane : lane + 1], columns, bool(description >> 16 & 1)
                ).reshape(-1)
                numbers = m.shared.read(
                    address, 2, m.slot[row].repeat(len(address)), m.keys[row].repeat(len(address))
                )
                matrix = numbers.view(np.uint16).reshape(16, columns)
                a = np.ascontiguousarray(memory.words[:, source]).view(np.uint16)
                product = warp.widened(kind, a) @ warp.widened(kind, matrix)
                if keep[row, lane]:
                    state = memory.state[:, target]
                    # Products of one thread are executed in order.
                    if (state == STORING).any():
                        raise ReadBeforeWait("a product adds to what may not have been stored yet")
                    if (state == UNWRITTEN).any():
                        raise UninitialisedRead("a product adds to what nothing has written")
                    product += memory.words[:, target].view(np.float32)
                memory.words[:, target] = product.view(np.uint32)
                memory.state[:, target] = MULTIPLYING

        return step

    # Barriers

    def commit(self, one: Instruction) -> Step:
        (place,) = self.operands(one, 1)
        # Triton 3.6 gives the address in shared memory as a generic one.
        read = self.address(one, place, ".shared::cluster" in one.opcode)
        guard, negated = one.guard, one.negated

        def step(m: Machine) -> None:
            mask = m.guarded(guard, negated)
            if mask is False:
                return
            address = np.broadcast_to(read(m, mask), (m.warps, 32))
            for row, lane in _lanes(m, mask):
                barrier = int(m.slot[row, 0]), int(address[row, lane])
                m.phases[barrier] = _phase(m, barrier) + 1
            m.stalled = np.zeros_like(m.stalled)

        return step

    def change_barrier(self, one: Instruction, starts: bool) -> Step:
        place, *count = self.operands(one, 2 if starts else 1)
        if starts and count != [Immediate(1)]:
            raise self.refuse(one, "an mbarrier of several arrivals")
        read, guard, negated = self.address(one, place, True), one.guard, one.negated

        def step(m: Machine) -> None:
            mask = m.guarded(guard, negated)
            if mask is False:
                return
            address = np.broadcast_to(read(m, mask), (m.warps, 32))
            for row, lane in _lanes(m, mask):
                barrier = int(m.slot[row, 0]), int(address[row, lane])
                state = np.full((1, 8), starts, np.uint8)
                m.shared.write(address[row, lane : lane + 1], state, m.slot[row], m.keys[row])
                if starts:
                    m.phases[barrier] = 0
                else:
                    _phase(m, barrier)
                    del m.phases[barrier]

        return step

    def try_wait(self, one: Instruction, at: int, following: int) -> Step:
        """Make a wait that only ends when the phase has ended. So its result is always true."""
        target, place, parity = self.operands(one, 3)
        name = self.destination(one, target)
        read, read_parity = self.address(one, place, True), self.reader(one, parity, "u32")
        if one.guard is not None:
            raise self.refuse(one, "a guarded wait")

        def step(m: Machine) -> None:
            mask = m.whole_warps(m.mask)
            address = np.broadcast_to(read(m, mask), (m.warps, 32))
            wanted = np.broadcast_to(read_parity(m, mask), (m.warps, 32))
            waits = np.zeros((m.warps, 1), np.bool_)
            for row in _rows(m, mask):
                barrier = int(m.slot[row, 0]), int(address[row, 0])
                m.shared.read(address[row, :1], 8, m.slot[row], m.keys[row])
                if _phase(m, barrier) % 2 == int(wanted[row, 0]):
                    waits[row] = True
                elif memory := m.tensor_memory.get(barrier[0]):
                    memory.state[memory.state == MULTIPLYING] = WRITTEN
            m.write(name, np.ones((1, 1), np.bool_), mask)
            if waits.any():
                m.park(following, mask)
                m.park(at, waits)
                m.stalled = m.stalled | waits
                m.schedule()
            else:
                m.go(following)

        return step

    def elect(self, one: Instruction) -> Step:
        leader, target, members = self.operands(one, 3)
        names = self.destination(one, leader), self.destination(one, target)
        if members != Immediate(-1) or one.guard is not None:
            raise self.refuse(one, "a member mask other than -1, or a guard")

        def step(m: Machine) -> None:
            mask = m.whole_warps(m.mask)
            m.write(names[0], np.zeros((1, 1), np.uint32), mask)
            m.write(names[1], (warp.LANES == 0)[None], mask)

        return step


def _wait_for_stores(m: Machine) -> None:
    for row in _rows(m, m.whole_warps(m.mask)):
        first = int(m.warp[row, 0]) % 4 * 32
        if memory := m.tensor_memory.get(int(m.slot[row, 0])):
            state = memory.state[first : first + 32]
            state[state == STORING] = WRITTEN


def _wait_for_loads(m: Machine) -> None:
    m.settle(set(m.loading), m.whole_warps(m.mask))
    m.loading &= m.in_flight.keys()
