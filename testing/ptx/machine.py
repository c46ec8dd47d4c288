# SPDX-License-Identifier: Apache-2.0
"""Run programs of a kernel in lockstep, as long as they take the same branches.

A register is an array [warps, 32], over all warps of all programs that run together, or [warps, 1]
or [1, 1] if its value is the same in all lanes or warps. Of all lanes that can run, those of the
lowest priority and the lowest address run next, so that lanes meet again after a branch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from testing.ptx.arithmetic import Array
from testing.ptx.errors import Deadlock, PTXError, UndefinedResult, UninitialisedRead
from testing.ptx.memory import GlobalMemory, SharedMemory, thread_keys
from testing.ptx.parser import Instruction
from testing.ptx.warp import LANES

LOADED_TOO_EARLY = "registers of tcgen05.ld are read before tcgen05.wait::ld"
"""Noted, but not an error: ptxas makes the first read of a register wait for its load."""

Mask = Any
"""Lanes, bool [warps or 1, 32 or 1], or None for all lanes of all warps."""

Step = Callable[["Machine"], None]


@dataclass(frozen=True)
class Block:
    """Instructions that run without interruption, and what decides which run next."""

    steps: tuple[Step, ...]
    instructions: tuple[Instruction, ...]
    end: Step


class Machine:
    """The state of programs that run together.

    Attributes:
        registers: By name.
        partial: For each register that only some lanes have written, these lanes.
        in_flight: For each register that a product of a warp group will write, the warps.
        undefined_halves: For each register with halves that nothing has written, their numbers.
        missing: The lanes that lack operands, while an instruction collects these lanes.
        tensor_memory: By the slot of the program.
        phases: The number of the phase of each `mbarrier`, by slot and address.
        loading: The registers in flight that are loaded from tensor memory.
        stalled: Warps that wait for an `mbarrier`, [warps, 1].
        mask: The lanes that run.
        slot: Which of the programs each warp belongs to, [warps, 1].
        keys: Thread key of each warp, [warps, 1].
        threads: Number of each lane among all lanes of all programs, [warps, 32].
        committed: Groups of asynchronous copies that each of these lanes has committed.
    """

    def __init__(
        self,
        blocks: dict[int, Block],
        programs: Array,
        numbers: Array,
        warps: int,
        special: dict[str, Array],
        memory: GlobalMemory,
        shared: SharedMemory,
        priority: Array,
    ) -> None:
        """
        Args:
            blocks: The blocks of the kernel, by the index of their first instruction.
            programs: `%ctaid` of each program, int [programs, 3].
            numbers: The number of each program in its grid.
            warps: Warps of a program.
            special: Values of parameters and special registers that all warps share.
            priority: The priority of each warp, int [programs * warps, 1].
        """
        self.blocks, self.memory, self.shared = blocks, memory, shared
        count = len(programs)
        self.slot = np.repeat(np.arange(count), warps)[:, None]
        warp = np.tile(np.arange(warps), count)[:, None]
        self.number = numbers[self.slot]
        self.warp, self.epoch = warp, np.zeros_like(warp)
        self.keys = thread_keys(self.number, self.epoch, warp)
        self.threads = np.arange(count * warps)[:, None] * 32 + LANES
        self.committed = np.zeros(count * warps * 32, np.int64)
        self.all_keys = self.keys[:, 0].repeat(32)
        self.registers: dict[str, Array] = dict(special)
        for axis, name in enumerate("xyz"):
            self.registers[f"%ctaid.{name}"] = programs[self.slot, axis].astype(np.uint32)
        self.registers["%tid.x"] = (warp * 32 + LANES).astype(np.uint32)
        self.registers["%laneid"] = LANES[None].astype(np.uint32)
        self.partial: dict[str, Array] = {}
        self.undefined_halves: dict[str, frozenset[int]] = {}
        self.in_flight: dict[str, Array] = {}
        self.missing: list[Array] | None = None
        self.tensor_memory: dict[int, Any] = {}
        self.phases: dict[tuple[int, int], int] = {}
        self.loading: set[str] = set()
        self.mask: Mask = None
        self.live = np.ones_like(warp, np.bool_)
        self.waiting = np.zeros_like(warp, np.bool_)
        self.stalled = np.zeros_like(warp, np.bool_)
        self.where = np.zeros_like(warp)
        self.priority = priority
        self.pc: int | None = 0
        self.others: int | None = None
        self.at = 0

    @property
    def warps(self) -> int:
        return len(self.slot)

    def run(self) -> None:
        """Run all programs to their ends."""
        with np.errstate(all="ignore"):
            self.schedule()
            while self.pc is not None:
                block = self.blocks[self.pc]
                try:
                    for self.at, step in enumerate(block.steps):
                        step(self)
                    self.at = len(block.steps)
                    block.end(self)
                except PTXError as error:
                    raise type(error)(f"{block.instructions[self.at]}: {error}") from None

    # Registers

    def read(self, name: str, mask: Mask, dtype: Any = None) -> Array:
        """Return a register that all lanes of a mask have written.

        Args:
            dtype: Type of the register, if it is among those that guarded instructions write.
        """
        value = self.registers.get(name)
        if value is None and self.missing is not None and dtype is not None:
            self.missing.append(np.ones((self.warps, 32), np.bool_))
            return np.zeros((1, 1), dtype)
        if value is None:
            raise UninitialisedRead(f"register {name} was never written")
        if name in self.undefined_halves:
            raise UninitialisedRead(f"half of register {name} was never written")
        if name in self.partial:
            missing = ~self.partial[name]
            if (missing if mask is None else missing & mask).any():
                if name in self.loading:
                    self.memory.notes.add(LOADED_TOO_EARLY)
                    return value
                if self.missing is None:
                    raise UninitialisedRead(f"some lanes have not written register {name}")
                self.missing.append(np.broadcast_to(missing, (self.warps, 32)))
        return value

    def read_for_itself(self, readers: list[Any], mask: Mask) -> tuple[list[Array], list[Array]]:
        """Return the operands of an instruction. For those that lanes lack, also return the lanes.

        Triton's reductions compute with registers of lanes that loaded nothing, and ignore the
        results. So only what reaches memory, an address, a predicate or a product is an error.
        """
        self.missing = []
        try:
            return [read(self, mask) for read in readers], self.missing
        finally:
            self.missing = None

    def undefine(self, name: str, lanes: Array, mask: Mask) -> None:
        """Make a register uninitialised in some of the lanes of a mask."""
        if mask is not None:
            lanes = lanes & mask
        self.partial[name] = self.partial.get(name, True) & ~lanes

    def write(self, name: str, value: Array, mask: Mask) -> None:
        """Write a register in some lanes."""
        if name == "_":
            return
        self.undefined_halves.pop(name, None)
        if mask is None:
            self.registers[name] = value
            if name in self.partial:
                del self.partial[name]
            return
        old = self.registers.get(name)
        if old is None:
            shape = np.broadcast_shapes(value.shape, mask.shape)
            self.registers[name] = np.broadcast_to(value, shape)
            self.partial[name] = mask
            return
        if old.dtype != value.dtype:
            old = old.view(value.dtype)
        self.registers[name] = np.where(mask, value, old)
        if (written := self.partial.get(name)) is not None:
            written = written | mask
            self.partial[name] = written
            if written.all():
                del self.partial[name]

    def guarded(self, guard: str | None, negated: bool) -> Mask:
        """Return the running lanes that execute an instruction, or False for none."""
        if guard is None:
            return self.mask
        taken = self.read(guard, self.mask)
        if negated:
            taken = ~taken
        if self.mask is not None:
            taken = taken & self.mask
        if taken.all():
            return None
        return taken if taken.any() else False

    def whole_warps(self, mask: Mask) -> Mask:
        """Return a mask [warps, 1] of lanes that execute an instruction of whole warps."""
        if mask is None or mask.shape[1] == 1:
            return mask
        if (mask != mask[:, :1]).any():
            raise UndefinedResult("only some lanes of a warp execute an instruction of the warp")
        return mask[:, :1]

    def launch(self, names: list[str], mask: Mask) -> None:
        """Make registers unreadable until the products that write them are waited for."""
        rows = np.ones((self.warps, 1), np.bool_) if mask is None else mask
        for name in names:
            self.in_flight[name] = self.in_flight.get(name, False) | rows
            self.partial[name] = self.partial.get(name, True) & ~rows

    def settle(self, names: set[str], mask: Mask) -> None:
        """Let the warps of a mask read the results of their products."""
        for name in names & self.in_flight.keys():
            rows = self.in_flight.pop(name)
            done = rows if mask is None else rows & mask
            self.partial[name] = self.partial.get(name, True) | done
            if self.partial[name].all():
                del self.partial[name]
            if (rows & ~done).any():
                self.in_flight[name] = rows & ~done

    # Control flow

    def schedule(self) -> None:
        """Choose the lanes that run next."""
        ready = self.live & ~self.waiting
        if not ready.any():
            if self.live.any():
                raise Deadlock("all running warps wait for a barrier that others do not reach")
            self.pc = None
            return
        ready = ready & ~self.stalled
        if not ready.any():
            raise Deadlock("all running warps wait for an mbarrier at which nothing arrives")
        if self.where.shape[1] > 1 and (self.where == self.where[:, :1]).all():
            self.where = self.where[:, :1]
        ready = ready & (self.priority == self.priority[ready.any(1)].min())
        where, ready = np.broadcast_arrays(self.where, ready)
        self.pc = int(where[ready].min())
        mask = ready & (where == self.pc)
        behind = where[ready & ~mask]
        self.others = int(behind.min()) if behind.size else None
        self.mask = None if mask.all() else mask

    def park(self, pc: int, mask: Mask) -> None:
        """Let the lanes of a mask continue at `pc` when they are chosen again."""
        if mask is None:
            self.where = np.full_like(self.where, pc)
        else:
            self.where = np.where(mask, pc, self.where)

    def go(self, pc: int) -> None:
        """Let the running lanes continue at `pc`."""
        if self.others is None or pc < self.others:
            self.pc = pc
        else:
            self.park(pc, self.mask)
            self.schedule()

    def branch(self, guard: str, negated: bool, target: int, following: int) -> None:
        """Let the running lanes with a true predicate continue at `target`."""
        taken = self.read(guard, self.mask)
        if negated:
            taken = ~taken
        running = taken if self.mask is None else taken & self.mask
        if not running.any():
            self.go(following)
            return
        if running.all() if self.mask is None else (taken | ~self.mask).all():
            self.go(target)
            return
        self.park(following, self.mask)
        self.park(target, running)
        self.schedule()

    def barrier(self, following: int) -> None:
        """Let the running warps wait until all warps of their programs do."""
        if self.mask is None:
            self.waiting = np.ones_like(self.waiting)
            self.release()
            self.go(following)
            return
        running = self.mask & self.live
        warps = running.any(1, keepdims=True)
        if (warps & self.live & ~running).any():
            raise UndefinedResult("only some lanes of a warp reach a barrier")
        self.park(following, warps)
        self.waiting = self.waiting | warps
        self.release()
        self.schedule()

    def release(self) -> None:
        """End the wait of the programs of which every warp waits."""
        running = (self.live & ~self.waiting).any(1)
        held = np.zeros(int(self.slot.max()) + 1, np.bool_)
        held[self.slot[running, 0]] = True
        released = self.waiting & ~held[self.slot]
        self.waiting = self.waiting & ~released
        self.epoch = self.epoch + released
        self.keys = thread_keys(self.number, self.epoch, self.warp)
        self.all_keys[self.threads] = self.keys

    def finish(self, mask: Mask) -> None:
        """End the lanes of a mask, and forget the warps that have none left."""
        if any((rows if mask is None else rows & mask).any() for rows in self.in_flight.values()):
            raise UndefinedResult("a program ends before its products")
        self.live = self.live & (False if mask is None else ~mask)
        before, kept = self.warps, self.live.any(1)
        if not kept.any():
            self.pc = None
            return
        if not kept.all():

            def keep(x: Array) -> Array:
                return x[kept] if x.shape[0] == before else x

            for name, value in self.registers.items():
                self.registers[name] = keep(value)
            for table in (self.partial, self.in_flight):
                for name, value in table.items():
                    table[name] = keep(value)
            for name in (
                "slot", "number", "warp", "epoch", "keys", "threads", "live", "waiting", "where",
                "priority", "stalled",
            ):  # fmt: skip
                setattr(self, name, keep(getattr(self, name)))
        # Others may have waited for the lanes that ended.
        self.release()
        self.schedule()
