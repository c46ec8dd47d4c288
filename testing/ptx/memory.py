# SPDX-License-Identifier: Apache-2.0
"""Global and shared memory with shadows: what was written, by whom, and what may be read.

Accesses come in arrays, one element for each lane. Every access has a *thread key*,
`program << 32 | epoch << 8 | warp`: the epoch counts the barriers of the program. Accesses of two
warps of a program are ordered if their epochs differ. Accesses of two programs are never ordered.
Atomic accesses need no order among each other. Lanes of one warp count as one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from testing.ptx.arithmetic import Array
from testing.ptx.errors import Misaligned, OutOfBounds, Race, ReadBeforeWait, UninitialisedRead

_WARP_BITS = 8
_EPOCH_BITS = 24
_SEVERAL = (1 << _WARP_BITS) - 1
"""Stands for several warps in a key."""
_UNWRITTEN = np.int64(-1)
_PENDING = np.int64(1) << 62
_WIDE = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


def thread_keys(program: Array, epoch: Array, warp: Array) -> Array:
    """Return int64 thread keys."""
    return (program.astype(np.int64) << 32) | (epoch.astype(np.int64) << _WARP_BITS) | warp


def _describe(key: int) -> str:
    warp = key & _SEVERAL
    who = "several warps" if warp == _SEVERAL else f"warp {warp}"
    epoch = key >> _WARP_BITS & (1 << _EPOCH_BITS) - 1
    return f"{who} of program {key >> 32} after {epoch} barriers"


def _aligned(address: Array, width: int) -> None:
    if width > 1 and (address & (width - 1)).any():
        wrong = int(address[(address & (width - 1)) != 0][0])
        raise Misaligned(f"address {wrong:#x} is not a multiple of {width} bytes")


class _Bytes:
    """Bytes that are read and written as elements of several sizes."""

    def __init__(self, data: Array, start: int) -> None:
        self.data, self.start = data, start
        self._views: dict[int, tuple[Array, int]] = {}

    def view(self, width: int) -> tuple[Array, int]:
        """Return the elements of a size, and the address of the first one."""
        if width not in self._views:
            skipped = -self.start % width
            end = skipped + (len(self.data) - skipped) // width * width
            self._views[width] = self.data[skipped:end].view(_WIDE[width]), self.start + skipped
        return self._views[width]

    def read(self, address: Array, width: int) -> Array:
        """Return uint8 [n, width]."""
        elements, first = self.view(width)
        return elements[(address - first) // width].view(np.uint8).reshape(-1, width)

    def write(self, address: Array, values: Array) -> None:
        width = values.shape[1]
        elements, first = self.view(width)
        index = (address - first) // width
        packed: Array = np.ascontiguousarray(values).view(_WIDE[width]).reshape(-1)
        elements[index] = packed
        again = elements[index].view(np.uint8)
        if not np.array_equal(again, packed.view(np.uint8)):
            raise Race("lanes write different values to one address in one instruction")


@dataclass
class _Access:
    offset: Array
    keys: Array
    width: int
    write: bool
    where: str
    atomic: bool


class Allocation(_Bytes):
    """A range of global memory.

    Args:
        data: uint8 [bytes], the memory itself.
        start: Its address.
        initialised: Whether all bytes were written before.
    """

    def __init__(self, data: Array, start: int, initialised: bool) -> None:
        super().__init__(data, start)
        self.written = None if initialised else np.zeros(len(data), np.bool_)
        self.log: list[_Access] = []

    def check_races(self) -> None:
        """Raise if two accesses of the launch to one byte are in no defined order."""
        log, self.log = self.log, []
        if not any(access.write for access in log):
            return
        granule = min(access.width for access in log)
        cells, keys, writes, numbers = [], [], [], []
        # Bytes that only atomic instructions access need no order.
        plain = np.zeros(len(self.data) // granule + 1, np.bool_)
        for index, access in enumerate(log):
            parts = access.width // granule
            cell = (access.offset // granule)[:, None] + np.arange(parts)
            plain[cell] |= not access.atomic
            cells.append(cell.ravel())
            keys.append(np.broadcast_to(access.keys[:, None], cell.shape).ravel())
            writes.append(np.full(cell.size, access.write))
            numbers.append(np.full(cell.size, index, np.int32))
        cell, key, write, number = map(np.concatenate, (cells, keys, writes, numbers))
        written = np.zeros(len(self.data) // granule + 1, np.bool_)
        written[cell[write]] = True
        touched = (written & plain)[cell]
        if not touched.any():
            return
        cell, key, write, number = (x[touched] for x in (cell, key, write, number))
        order = np.lexsort((key, cell))
        cell, key, write, number = (x[order] for x in (cell, key, write, number))
        same_cell = cell[1:] == cell[:-1]
        # For one cell: two programs are never ordered, and two warps only by a barrier.
        programs = same_cell & (key[1:] >> 32 != key[:-1] >> 32)
        epochs = same_cell & (key[1:] >> _WARP_BITS == key[:-1] >> _WARP_BITS)
        starts = np.flatnonzero(np.concatenate([[True], ~epochs]))
        length = np.diff(np.append(starts, len(key)))
        any_write = np.repeat(np.logical_or.reduceat(write, starts), length)
        warps = epochs & (key[1:] != key[:-1]) & any_write[1:]
        if (bad := np.flatnonzero(programs | warps)).size:
            at = int(bad[0])
            first, second = (
                f"{_describe(int(key[i]))}, {log[number[i]].where}" for i in (at, at + 1)
            )
            address = self.start + int(cell[at]) * granule
            raise Race(f"global address {address:#x}: {first}; {second}; one of them writes")


class GlobalMemory:
    """The allocations that a kernel may access.

    Attributes:
        notes: What kernels did that PTX leaves undefined, but all versions of ptxas define.
    """

    def __init__(self) -> None:
        self._allocations: dict[int, Allocation] = {}
        self._starts = np.zeros(0, np.int64)
        self._last: Allocation | None = None
        self.notes: set[str] = set()

    def register(self, data: Array, start: int, *, initialised: bool = True) -> None:
        """Add a range of memory, unless it is known.

        Args:
            data: uint8 [bytes].
            start: Its address.
            initialised: Whether kernels may read bytes that no kernel has written.
        """
        known = self._allocations.get(start)
        if known is None or len(known.data) != len(data):
            self._allocations[start] = Allocation(data, start, initialised)
            self._starts = np.array(sorted(self._allocations), np.int64)
            self._last = None

    def _at(self, address: Array, width: int) -> list[tuple[Allocation, Any]]:
        """Return the allocations with the indices of the accesses to each."""
        _aligned(address, width)
        low, high = int(address.min()), int(address.max()) + width
        last = self._last
        if last is not None and last.start <= low and high <= last.start + len(last.data):
            return [(last, slice(None))]
        which = np.searchsorted(self._starts, address, "right") - 1
        found = []
        for i in np.unique(which).tolist():
            index = np.flatnonzero(which == i)
            owner = self._allocations[int(self._starts[i])] if i >= 0 else None
            end = 0 if owner is None else owner.start + len(owner.data)
            outside = address[index] + width > end
            if owner is None or outside.any():
                wrong = int(address[index][outside][0])
                near = "" if owner is None else f"; the allocation before ends at {end:#x}"
                raise OutOfBounds(f"{width} bytes at global address {wrong:#x}{near}")
            found.append((owner, index))
        if len(found) == 1:
            self._last = found[0][0]
            return [(found[0][0], slice(None))]
        return found

    def read(
        self, address: Array, width: int, keys: Array, where: str, *, atomic: bool = False
    ) -> Array:
        """Return uint8 [n, width]; `address` and `keys` are int64 [n]."""
        result = np.empty((len(address), width), np.uint8)
        for owner, index in self._at(address, width):
            offset = address[index] - owner.start
            if owner.written is not None and not all(
                owner.written[offset + byte].all() for byte in range(width)
            ):
                raise UninitialisedRead("bytes of global memory that nothing has written")
            result[index] = owner.read(address[index], width)
            owner.log.append(_Access(offset, keys[index], width, False, where, atomic))
        return result

    def write(
        self, address: Array, values: Array, keys: Array, where: str, *, atomic: bool = False
    ) -> None:
        """Write uint8 `values` [n, width]."""
        width = values.shape[1]
        for owner, index in self._at(address, width):
            owner.write(address[index], values[index])
            offset = address[index] - owner.start
            if owner.written is not None:
                for byte in range(width):
                    owner.written[offset + byte] = True
            owner.log.append(_Access(offset, keys[index], width, True, where, atomic))

    def update(
        self,
        address: Array,
        values: Array,
        function: Callable[[Array, Array], Array],
        keys: Array,
        where: str,
    ) -> Array:
        """Replace numbers by `function(number, value)`, one lane after another.

        Returns:
            The number that each lane has replaced.
        """
        width = values.itemsize
        before = np.empty_like(values)
        for i in range(len(address)):
            lane = slice(i, i + 1)
            before[lane] = self.read(address[lane], width, keys[lane], where, atomic=True).view(
                values.dtype
            )[0]
            after = function(before[lane], values[lane]).view(np.uint8).reshape(1, width)
            self.write(address[lane], after, keys[lane], where, atomic=True)
        return before

    def finish_launch(self) -> None:
        """Check the accesses of a launch for races; launches are ordered."""
        for allocation in self._allocations.values():
            allocation.check_races()


class SharedMemory:
    """The shared memory of all programs, one after another.

    Args:
        programs: Programs.
        size: Bytes of each.
        granule: Bytes of the kernel's smallest access, and of each entry of the shadow.
        base: Address of the first byte in each program.
    """

    def __init__(self, programs: int, size: int, granule: int, base: int = 0) -> None:
        self.size, self.base, self.granule = size, base, granule
        self.stride = -(-size // 16) * 16
        self.bytes = _Bytes(np.zeros(programs * self.stride, np.uint8), 0)
        cells = programs * self.stride // granule
        self.writer = np.full(cells, _UNWRITTEN)
        self.reader = np.full(cells, _UNWRITTEN)
        self.pending: list[tuple[Array, Array, Array]] = []

    def place(self, address: Array, slot: Array, width: int) -> tuple[Array, Array]:
        """Return the offset of each access, and the cells of the shadow [n, cells]."""
        _aligned(address, width)
        offset = address - self.base
        if (outside := (offset < 0) | (offset + width > self.size)).any():
            wrong = int(address[outside][0])
            raise OutOfBounds(
                f"{width} bytes at shared address {wrong:#x}; a program has {self.size} bytes from "
                f"{self.base:#x} on"
            )
        offset = offset + slot * self.stride
        return offset, (offset // self.granule)[:, None] + np.arange(width // self.granule)

    def read(
        self, address: Array, width: int, slot: Array, keys: Array, used: Array | None = None
    ) -> Array:
        """Return uint8 [n, width]; `used` says which cells of an access matter, if not all."""
        offset, cells = self.place(address, slot, width)
        values = self.bytes.read(offset, width)
        if used is not None:
            cells = cells[:, used]
        mine = keys[:, None]
        writer = self.writer[cells]
        if (unordered := self._unordered(writer, mine)).any() or (writer < 0).any():
            self._explain(writer, mine, unordered, "reads", "wrote")
        self._mark(self.reader, cells, mine)
        return values

    def _mark(self, shadow: Array, cells: Array, mine: Array) -> None:
        """Enter keys into a shadow. If several warps of an epoch have a cell, enter `_SEVERAL`."""
        marked = np.where(self._unordered(shadow[cells], mine), mine | _SEVERAL, mine)
        shadow[cells] = marked
        if (other := shadow[cells] != marked).any():
            shadow[cells[other]] = (marked | _SEVERAL)[other]

    @staticmethod
    def _unordered(key: Array, mine: Array) -> Array:
        """Return whether an access by another warp is in the same epoch, or pending."""
        return (key >= (mine & ~_SEVERAL)) & (key != mine)

    @staticmethod
    def _explain(other: Array, mine: Array, bad: Array, does: str, did: str) -> None:
        if (other == _PENDING).any():
            raise ReadBeforeWait(
                f"a warp {does} shared memory that an asynchronous copy may not have written yet"
            )
        if bad.any():
            first = tuple(np.argwhere(bad)[0])
            here = int(np.broadcast_to(mine, other.shape)[first])
            raise Race(
                f"{_describe(here)} {does} shared memory that {_describe(int(other[first]))} {did}"
            )
        raise UninitialisedRead("bytes of shared memory that nothing has written")

    def _claim(self, cells: Array, mine: Array, unchanged: Array | None = None) -> None:
        """Check that the cells may be written now.

        Args:
            unchanged: Accesses that write the value which is already there. They are allowed,
                because Triton lets all warps that hold an element store it.
        """
        for shadow, did in ((self.writer, "wrote"), (self.reader, "read")):
            other = shadow[cells]
            bad = self._unordered(other, mine)
            if unchanged is not None:
                bad &= ~unchanged[:, None] | (self.writer[cells] == _PENDING)
            if bad.any():
                self._explain(np.where(bad, other, 0), mine, bad, "writes", did)

    def write(self, address: Array, values: Array, slot: Array, keys: Array) -> None:
        """Write uint8 `values` [n, width]."""
        offset, cells = self.place(address, slot, values.shape[1])
        mine = np.broadcast_to(keys[:, None], cells.shape)
        self._claim(cells, mine, (self.bytes.read(offset, values.shape[1]) == values).all(1))
        self.bytes.write(offset, values)
        self._mark(self.writer, cells, mine)

    def copy(
        self, address: Array, values: Array, slot: Array, keys: Array, lanes: Array, group: Array
    ) -> None:
        """Write `values`. They count as written when the lane has waited for its group."""
        offset, cells = self.place(address, slot, values.shape[1])
        self._claim(cells, keys[:, None])
        self.bytes.write(offset, values)
        self.writer[cells] = _PENDING
        self.pending.append((cells, lanes, group))

    def wait(self, allowed: Array, keys: Array) -> None:
        """Complete the copies of every lane whose group is below `allowed` [all lanes].

        Args:
            keys: The thread key of every lane.
        """
        still = []
        for cells, lanes, group in self.pending:
            done = group < allowed[lanes]
            if done.any():
                self.writer[cells[done]] = keys[lanes[done]][:, None]
            if not done.all():
                still.append((cells[~done], lanes[~done], group[~done]))
        self.pending = still
