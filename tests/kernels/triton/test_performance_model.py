# SPDX-License-Identifier: Apache-2.0
"""The performance model on machine code whose time is known by hand."""

from __future__ import annotations

import pytest

from testing.triton import performance_model as model
from testing.triton.machine_code import Instruction, MachineCode

H100 = model.GPUS["H100"]
ADD = Instruction("IADD3", "R0, R1, R2", 4, None, None, ())
LOAD = Instruction("LDS", "R0, [R1]", 1, 0, None, ())
USE = Instruction("IADD3", "R0, R0, R2", 4, None, None, (0,))
COPY = Instruction("LDGSTS.E.BYPASS.128", "[R0], [R2.64]", 2, None, None, ())
COMMIT = Instruction("LDGDEPBAR", "", 1, None, None, ())
BRANCH = Instruction("BRA", "`(.L_x_0)", 5, None, None, ())


def wait(pending: int) -> Instruction:
    return Instruction("DEPBAR.LE", f"SB0, {pending:#x}", 1, None, None, ())


def code(
    *loop: Instruction, registers: int = 128, shared_bytes: int = 0, warps: int = 1
) -> MachineCode:
    loop = (*loop, BRANCH)
    return MachineCode(registers, 0, 0, shared_bytes, loop, ((0, len(loop) - 1),), warps, "")


def cycles(kernel: MachineCode, programs: int = 1, rate: float = 64.0, size: int = 512) -> float:
    return model.pace(kernel, H100, programs, size, rate).cycles


def test_a_warp_alone_takes_its_stall_counts() -> None:
    assert cycles(code(*[ADD] * 10)) == 10 * 4 + 5


def test_a_warp_waits_for_the_scoreboard_of_a_load() -> None:
    assert cycles(code(LOAD, USE)) == 30 + 4 + 5


def test_four_warps_fill_the_sub_partitions_before_they_share_one() -> None:
    busy = code(*[Instruction("IADD3", "", 1, None, None, ())] * 995)
    alone = cycles(busy)
    assert cycles(busy, 4) == alone
    # Programs start one after another, so that the first and last tiles overlap less.
    assert cycles(busy, 8) == pytest.approx(2 * alone, rel=0.05)


def test_a_copy_that_is_awaited_at_once_costs_its_latency_and_a_prefetched_one_its_bytes() -> None:
    rate = 512 / 400  # a copy of 512 bytes in 400 cycles
    awaited = cycles(code(COPY, COMMIT, wait(0)), rate=rate)
    assert awaited == pytest.approx(400 + model.MEMORY_LATENCY, abs=10)
    # Three copies in flight cover the latency.
    assert cycles(code(COPY, COMMIT, wait(3)), rate=rate) == pytest.approx(400, abs=1)


def test_a_barrier_makes_the_warps_of_a_program_wait_for_the_slowest() -> None:
    barrier = Instruction("BAR.SYNC", "", 1, None, None, ())
    assert cycles(code(barrier, warps=2)) == pytest.approx(1 + model.BARRIER + 5)


def test_programs_fit_by_whole_warps_of_a_sub_partition_and_by_shared_memory() -> None:
    def fit(registers: int, shared_bytes: int) -> int:
        kernel = code(registers=registers, shared_bytes=shared_bytes, warps=2)
        return model.resident_programs(kernel, H100)

    assert fit(168, 0) == 6
    # 65536 registers hold eleven such warps, but a sub-partition only two.
    assert fit(169, 0) == fit(255, 0) == 4
    assert fit(168, 75 * 1024) == 3
    assert fit(16, 0) == 32


def test_a_second_wave_of_one_program_costs_as_much_as_the_first() -> None:
    slow = code(*[Instruction("IADD3", "", 15, None, None, ())] * 200, registers=255, warps=2)
    slots = 4 * H100.processors
    one = model.predict(slow, H100, [(100, 1)] * slots, 512)
    two = model.predict(slow, H100, [(100, 1)] * (slots + 1), 512)
    assert (one.waves, two.waves) == (1, 2)
    assert two.seconds == pytest.approx(2 * one.seconds, rel=0.05)


def test_a_launch_bound_by_memory_reaches_the_share_of_paged_reads() -> None:
    fast = code(COPY, COMMIT, wait(5), registers=255, warps=2)
    launch = model.predict(fast, H100, [(100_000, 1)] * 4 * H100.processors, 1024)
    copy_seconds = 100_000 * 4 * H100.processors * 1024 / (model.COPY_SHARE * H100.bandwidth)
    assert copy_seconds / launch.seconds == pytest.approx(model.PAGED_SHARE, rel=0.02)


def test_instructions_of_warp_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="does not know HGMMA"):
        cycles(code(Instruction("HGMMA.64x32x16.F32", "", 1, None, None, ())))
