# SPDX-License-Identifier: Apache-2.0
"""Predict how fast an attention kernel runs on any GPU, from its machine code.

`pace` runs the main loop of a multiprocessor's resident programs in order, with the stall counts
and scoreboards that the compiler wrote: cycles per tile. `predict` lets all multiprocessors work
off the programs of a launch and share the memory bandwidth: waves, tails and time.

**Nothing here is calibrated.** Trust orderings and ratios; take absolute numbers as +-30 %. Not
modelled: bank conflicts, misses of the instruction cache, DRAM pages, power, warp-group and
tensor-memory instructions.
"""

from __future__ import annotations

import heapq
import math
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from testing.triton.machine_code import Instruction, MachineCode


@dataclass(frozen=True)
class Gpu:
    """What the model knows of a GPU; from NVIDIA's data sheets and the CUDA programming guide.

    Attributes:
        capability: 90 for 9.0.
        processors: Streaming multiprocessors.
        clock: Hz, the boost clock.
        bandwidth: Bytes a second of its memory, as specified.
        shared_bytes, max_warps, max_programs: Of a multiprocessor.
        product: Cycles that a sub-partition's tensor core takes for a 16x8x16 fp16 product with
            float32 sums, and for a 16x8x32 int8 product, from the rates in the data sheet. On 9.0
            and 10.0 `mma` reaches some 60 % of the rate of warp-group instructions.
    """

    name: str
    capability: int
    processors: int
    clock: float
    bandwidth: float
    shared_bytes: int
    max_warps: int
    max_programs: int
    product: tuple[float, float]


_GPUS = (
    Gpu("A100", 80, 108, 1.41e9, 2.04e12, 164 << 10, 64, 32, (8.0, 8.0)),
    Gpu("H100", 90, 132, 1.83e9, 3.35e12, 228 << 10, 64, 32, (6.5, 6.5)),
    Gpu("H200", 90, 132, 1.83e9, 4.8e12, 228 << 10, 64, 32, (6.5, 6.5)),
    Gpu("B200", 100, 148, 1.85e9, 8.0e12, 228 << 10, 64, 32, (6.5, 6.5)),
    Gpu("RTX 4090", 89, 128, 2.52e9, 1.01e12, 100 << 10, 48, 24, (32.0, 16.0)),
)
GPUS = {gpu.name: gpu for gpu in _GPUS}

# All other assumptions, and where they come from.
SUB_PARTITIONS = 4  # CUDA programming guide; each issues one instruction a cycle
REGISTERS = 65536 // SUB_PARTITIONS  # of a sub-partition; CUDA programming guide
REGISTER_UNIT = 256  # granularity of a warp's registers; cuda_occupancy.h
RESERVED_SHARED_BYTES = 1024  # by the system for each program, since 8.0; cuda_occupancy.h
COPY_SHARE = 0.92  # of the specified bandwidth that a copy reaches; users' tests
PAGED_SHARE = 0.90  # of a copy's bandwidth, for scattered pages; a guess chosen to match a review
MEMORY_LATENCY = 850  # cycles of a copy from memory that is busy; guess
LOAD_LATENCY = 500  # cycles of block numbers and lengths, partly from L2; guess
BARRIER = 24  # cycles from the last warp's arrival until all warps go on; guess
PROCESSOR_BYTES = 64  # a cycle, from L2 to a multiprocessor; guess
LAUNCH_SECONDS = 2e-6  # start and end of a kernel in a graph; guess
DEPENDENT_LOADS = 6  # of LOAD_LATENCY before the first tile of a row tile; from the kernel's source
# By the start of an instruction's name: the unit that executes it, the cycles for which a warp
# occupies that unit, and the latency of its result. The unit `shared` serves a multiprocessor, the
# others a sub-partition. Throughputs: CUDA programming guide. Latencies: guesses near published
# microbenchmarks of similar GPUs.
INSTRUCTIONS: tuple[tuple[str, str, float, int], ...] = (
    (r"LDSM.*4", "shared", 4, 33),
    (r"LDSM", "shared", 2, 33),
    (r"LDS.*128", "shared", 4, 30),
    (r"STS.*128", "shared", 4, 20),
    (r"LDS\b", "shared", 1, 30),
    (r"ST[SM]\b", "shared", 1, 20),
    (r"SHFL|REDUX", "shared", 1, 25),
    (r"LDGSTS", "shared", 4, 40),
    (r"LDG\b", "shared", 1, LOAD_LATENCY),
    (r"ST[GL]\b|LDL", "shared", 1, 40),
    (r"MUFU", "special", 8, 22),
    (r"F2F\b|I2F\b|F2I\b", "special", 8, 22),
    (r"F2FP|I2FP", "", 0, 12),
    (r"S2R|S2UR|R2UR", "", 0, 25),
    (r"LDC|ULDC", "", 0, 40),
    (r"HMMA.16816", "fp16", 1, 34),
    (r"IMMA.16832", "int8", 1, 34),
    (r"", "", 0, 10),
)
NOT_MODELLED = re.compile(r"UTC|[HIQ]GMMA|WARPGROUP|HMMA(?!\.16816)|IMMA(?!\.16832)")


def resident_programs(code: MachineCode, gpu: Gpu) -> int:
    """Return how many programs fit a multiprocessor, by the rules of cuda_occupancy.h.

    A sub-partition holds whole warps. With 176 registers it holds two, so a multiprocessor holds
    four programs of two warps, although all of its registers together would be enough for five.
    """
    warp_registers = math.ceil(code.registers * 32 / REGISTER_UNIT) * REGISTER_UNIT
    return min(
        REGISTERS // warp_registers * SUB_PARTITIONS // code.num_warps,
        gpu.shared_bytes // (code.shared_bytes + RESERVED_SHARED_BYTES),
        gpu.max_warps // code.num_warps,
        gpu.max_programs,
    )


def _cost(one: Instruction, gpu: Gpu) -> tuple[str, float, int]:
    """Return unit, cycles of the unit and latency of an instruction."""
    if NOT_MODELLED.match(one.operation):
        raise ValueError(f"the performance model does not know {one.operation}")
    _, unit, cycles, latency = next(x for x in INSTRUCTIONS if re.match(x[0], one.operation))
    if unit in {"fp16", "int8"}:
        return "tensor", gpu.product[unit == "int8"], latency
    return unit, cycles, latency


def _copied_bytes(one: Instruction) -> int:
    """Return the bytes that a warp copies with an asynchronous copy, 0 for other instructions."""
    if not one.operation.startswith("LDGSTS"):
        return 0
    width = re.search(r"\.(64|128)\b", one.operation)
    return 32 * (int(width[1]) if width else 32) // 8


class _Warp:
    def __init__(self, number: int, program: int) -> None:
        self.number, self.program = number, program
        self.at = self.tiles = 0
        self.ready = 0.0  # when the next instruction may issue, units aside
        self.issued = 0.0  # the last instruction; of two warps, the one that waits longer goes on
        self.boards = [0.0] * 6
        self.arrival = 0.0  # of the last copy
        self.groups: list[float] = []  # arrivals of committed copies
        self.finished: list[float] = []


def read_bytes_per_cycle(gpu: Gpu) -> float:
    """Return what memory delivers at most to all multiprocessors together."""
    return PAGED_SHARE * COPY_SHARE * gpu.bandwidth / gpu.clock


class Pace(NamedTuple):
    cycles: float
    """Of each program for a tile."""
    bytes_in_flight: float


@cache
def pace(
    code: MachineCode, gpu: Gpu, programs: int, tile_bytes: int, bytes_per_cycle: float
) -> Pace:
    """Run the main loop of a multiprocessor's programs, and return their steady pace.

    Args:
        programs: Resident programs.
        tile_bytes: Bytes of memory that a tile reads.
        bytes_per_cycle: What memory delivers to this multiprocessor.
    """
    first, last = code.main_loop()
    loop = code.instructions[first : last + 1]
    costs = [_cost(one, gpu) for one in loop]
    copied = [_copied_bytes(one) for one in loop]
    scale = tile_bytes / code.num_warps / max(1, sum(copied))
    tiles, settled = 12, 4
    in_flight = 0.0  # bytes times cycles
    warps = [_Warp(n, n // code.num_warps) for n in range(programs * code.num_warps)]
    for warp in warps:
        warp.ready = 97.0 * warp.program  # programs do not run in step
    issue_free: dict[int, float] = {}
    unit_free: dict[object, float] = {}
    memory_free = 0.0
    barriers: dict[int, list[_Warp]] = {}
    queue = [(warp.ready, warp.issued, warp.number) for warp in warps]
    heapq.heapify(queue)
    while queue:
        now, _, number = heapq.heappop(queue)
        warp = warps[number]
        part = number % SUB_PARTITIONS
        one, (unit, occupied, latency) = loop[warp.at], costs[warp.at]
        key = unit if unit == "shared" else (unit, part)
        start = max(now, issue_free.get(part, 0.0), unit_free.get(key, 0.0) if unit else 0.0)
        if start > now:
            heapq.heappush(queue, (start, warp.issued, number))
            continue
        issue_free[part] = now + 1
        warp.issued = now
        if unit:
            unit_free[key] = now + occupied
        if one.written is not None:
            warp.boards[one.written] = max(warp.boards[one.written], now + latency)
        if one.read is not None:
            warp.boards[one.read] = max(warp.boards[one.read], now + min(latency, 14))
        if copied[warp.at]:
            memory_free = max(memory_free, now) + copied[warp.at] * scale / bytes_per_cycle
            warp.arrival = memory_free + MEMORY_LATENCY
            in_flight += copied[warp.at] * scale * (warp.arrival - now)
        elif one.operation.startswith("LDGDEPBAR"):
            warp.groups.append(warp.arrival)
        warp.ready = now + max(one.stall, 1)
        warp.at += 1
        if warp.at == len(loop):
            warp.at, warp.tiles = 0, warp.tiles + 1
            warp.finished.append(now)
            if warp.tiles == tiles:
                continue
        following = loop[warp.at]
        for board in following.awaited:
            warp.ready = max(warp.ready, warp.boards[board])
        if following.operation.startswith("DEPBAR"):
            count = re.search(r"0x(\w+)", following.arguments)
            pending = int(count[1], 16) if count else 0
            if len(warp.groups) > pending:
                warp.ready = max(warp.ready, warp.groups[-pending - 1])
        if one.operation.startswith("BAR"):
            waiting = barriers.setdefault(warp.program, [])
            waiting.append(warp)
            if len(waiting) == code.num_warps:
                go_on = max(w.ready for w in waiting) + BARRIER
                for other in waiting:
                    other.ready = go_on
                    heapq.heappush(queue, (go_on, other.issued, other.number))
                waiting.clear()
            continue
        heapq.heappush(queue, (warp.ready, now, number))
    steady = sum(w.finished[-2] - w.finished[settled - 1] for w in warps) / len(warps)
    cycles = steady / (tiles - 1 - settled)
    return Pace(cycles, in_flight / (tiles * cycles))


class Launch(NamedTuple):
    programs: int
    waves: int
    seconds: float


def predict(
    code: MachineCode,
    gpu: Gpu,
    pieces: Sequence[tuple[int, int]],
    tile_bytes: int,
    partial_bytes: int = 0,
    resident: int | None = None,
) -> Launch:
    """Predict a launch.

    Every program gets the same share of the memory bandwidth. The hardware gives the first
    programs to the multiprocessors in turn, and each later one to the first free place.

    Args:
        pieces: Key tiles and row tiles of each program, in the order of the launch.
        tile_bytes: Bytes of memory that a tile reads.
        partial_bytes: Size of the partial results, which are written and read once.
        resident: Programs of a multiprocessor; `resident_programs` if None.
    """
    resident = resident or resident_programs(code, gpu)
    read_bytes = read_bytes_per_cycle(gpu)

    def rate(programs: int, running: int) -> float:
        share = min(read_bytes * programs / running, PROCESSOR_BYTES)
        few = 1.1 ** math.ceil(math.log(share, 1.1))  # rounded, so that few shares are simulated
        cycles = pace(code, gpu, programs, tile_bytes, few).cycles
        return 1 / max(cycles, programs * tile_bytes / share)

    first, last = code.main_loop()
    once = len(code.instructions) - (last - first + 1) + DEPENDENT_LOADS * LOAD_LATENCY
    extra = once * rate(resident, resident * gpu.processors)
    waiting = deque(tiles + extra * row_tiles for tiles, row_tiles in pieces)
    processors: list[list[float]] = [[] for _ in range(gpu.processors)]
    for _ in range(resident):
        for processor in processors:
            if waiting:
                processor.append(waiting.popleft())
    cycles = 0.0
    while running := sum(map(len, processors)):
        rates = {count: rate(count, running) for count in set(map(len, processors)) if count}
        step = min(min(one) / rates[len(one)] for one in processors if one)
        cycles += step
        for index, one in enumerate(processors):
            done = step * rates[len(one)] if one else 0.0
            left = [work - done for work in one if work - done > 1e-6]
            left += [waiting.popleft() for _ in range(min(len(one) - len(left), len(waiting)))]
            processors[index] = left
    seconds = cycles / gpu.clock + LAUNCH_SECONDS
    if partial_bytes:
        seconds += LAUNCH_SECONDS + 2 * partial_bytes / (COPY_SHARE * gpu.bandwidth)
    waves = math.ceil(len(pieces) / (resident * gpu.processors))
    return Launch(len(pieces), waves, seconds)
