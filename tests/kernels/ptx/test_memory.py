# SPDX-License-Identifier: Apache-2.0
"""Each error with memory, registers and barriers is found, and code without errors runs."""

from __future__ import annotations

import numpy as np
import pytest

from testing.ptx import errors
from tests.kernels.ptx.snippets import run

SETUP = """
mov.b32 %r1, smem;
shl.b32 %r2, %r900, 2;
add.s32 %r3, %r1, %r2;
cvt.u64.u32 %rd9, %r2;
"""
"""%r1 is the start of shared memory, %r3 the word of the lane, %rd9 its offset."""


def words(count: int = 256) -> np.ndarray:
    return np.arange(count, dtype=np.uint32)


def test_the_address_after_the_last_byte_of_an_allocation_is_out_of_bounds() -> None:
    body = SETUP + "add.s64 %rd8, %rd0, %rd9;\nld.global.b32 %r5, [%rd8{}];"
    run(body.format(""), words(32))
    with pytest.raises(errors.OutOfBounds, match=r"ld.global.*4 bytes at global address 0x"):
        run(body.format("+4"), words(32))
    with pytest.raises(errors.OutOfBounds, match=r"ld.global.*4 bytes at global address 0x"):
        run(body.format("+-4"), words(32))


def test_the_address_after_the_last_byte_of_shared_memory_is_out_of_bounds() -> None:
    body = SETUP + "st.shared.b32 [%r3], %r2;\n"
    run(body, shared=128)
    with pytest.raises(errors.OutOfBounds, match="a program has 124 bytes from 0x10 on"):
        run(body, shared=124)


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_an_address_that_is_no_multiple_of_the_access_is_misaligned(offset: int) -> None:
    body = f"ld.global.v2.b32 {{%r5, %r6}}, [%rd0+{offset}];"
    with pytest.raises(errors.Misaligned, match="not a multiple of 8 bytes"):
        run(body, words())
    with pytest.raises(errors.Misaligned, match="not a multiple of 8 bytes"):
        run(SETUP + f"st.shared.v2.b32 [%r1+{offset}], {{%r2, %r2}};")


def test_a_register_that_no_instruction_writes_is_uninitialised() -> None:
    with pytest.raises(errors.UninitialisedRead, match="register %r6 was never written"):
        run("add.s32 %r5, %r6, 1;")


WRITTEN = {
    "all": "mov.pred %p1, -1;",
    "some": "setp.lt.u32 %p1, %r900, 16;",
    "no": "mov.pred %p1, 0;",
}
PARTLY_WRITTEN = SETUP + "st.shared.b32 [%r3], %r2;\nadd.s64 %rd8, %rd0, %rd9;\n{}\n"
PARTLY_WRITTEN += "@%p1 mov.b32 %r6, %r3;\nadd.s32 %r7, %r6, 0;\n"
USES = {
    "store": "st.global.b32 [%rd8], %r7;",
    "address": "ld.shared.b32 %r8, [%r7];",
    "predicate": "setp.eq.b32 %p2, %r7, 0;\n@%p2 mov.b32 %r8, 1;",
    "branch": "setp.eq.b32 %p2, %r7, 0;\n@%p2 bra $END;\n$END:",
    "reduction": "redux.sync.add.s32 %r8, %r7, -1;",
    "product": "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 "
    "{%r10, %r11, %r12, %r13}, {%r2, %r2, %r2, %r2}, {%r2, %r7}, {%r2, %r2, %r2, %r2};",
}


@pytest.mark.parametrize("lanes", WRITTEN)
@pytest.mark.parametrize("use", USES)
def test_what_depends_on_a_register_that_a_lane_has_not_written_may_not_be_used(
    lanes: str, use: str
) -> None:
    body = PARTLY_WRITTEN.format(WRITTEN[lanes])
    run(body, words())
    if lanes == "all":
        run(body + USES[use], words())
    else:
        with pytest.raises(errors.UninitialisedRead, match="have not written register"):
            run(body + USES[use], words())


@pytest.mark.parametrize("distance", [1, 16])
def test_a_shuffle_gives_lanes_what_their_source_has_written(distance: int) -> None:
    body = PARTLY_WRITTEN.format(WRITTEN["some"])
    body += f"shfl.sync.bfly.b32 %r8, %r7, {distance}, 31, -1;\n"
    reads_written = "%p1" if distance == 1 else "!%p1"
    reads_unwritten = "!%p1" if distance == 1 else "%p1"
    run(body + f"@{reads_written} st.global.b32 [%rd8], %r8;", words())
    with pytest.raises(errors.UninitialisedRead, match="have not written register %r8"):
        run(body + f"@{reads_unwritten} st.global.b32 [%rd8], %r8;", words())


def test_half_of_a_register_may_be_undefined_if_nothing_reads_it() -> None:
    pair = "mov.b64 %rd5, {%r900, %r6};\nadd.f32x2 %rd6, %rd5, %rd5;\nmov.b64 {%r7, %r8}, %rd6;\n"
    run(pair + "add.s32 %r9, %r7, 1;")
    with pytest.raises(errors.UninitialisedRead, match="register %r8 was never written"):
        run(pair + "add.s32 %r9, %r8, 1;")
    with pytest.raises(errors.UninitialisedRead, match="half of register %rd6"):
        run(pair + "add.s64 %rd7, %rd6, 1;")


def test_shared_memory_that_nothing_wrote_is_uninitialised() -> None:
    with pytest.raises(errors.UninitialisedRead, match="shared memory that nothing has written"):
        run(
            SETUP
            + "st.shared.b32 [%r3], %r2;\nbar.sync 0;\nld.shared.v2.b32 {%r5, %r6}, [%r1+128];"
        )


def test_unused_parts_of_a_vector_load_may_be_uninitialised() -> None:
    store = SETUP + "setp.eq.b32 %p1, %r900, 0;\n@%p1 st.shared.v2.b32 [%r1], {%r2, %r2};\n"
    load = store + 'bar.sync 0;\n.pragma "used_bytes_mask 0xff";\n'
    load += "ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%r1];\n"
    run(load + "st.shared.v2.b32 [%r1], {%r5, %r6};")
    with pytest.raises(errors.UninitialisedRead, match="%r7"):
        run(load + "st.shared.v2.b32 [%r1], {%r5, %r7};")


REVERSED = "sub.s32 %r4, 252, %r2;\nadd.s32 %r4, %r4, %r1;\n"
"""%r4 is the word that the lane of the other of two warps wrote."""


@pytest.mark.parametrize("seed", range(4))
def test_a_read_of_another_warps_word_needs_a_barrier(seed: int) -> None:
    body = SETUP + REVERSED + "st.shared.b32 [%r3], %r900;\n{}ld.shared.b32 %r5, [%r4];\n"
    run(body.format("bar.sync 0;\n"), warps=2, seed=seed)
    message = "reads shared memory that|shared memory that nothing has written|writes shared memory"
    with pytest.raises((errors.Race, errors.UninitialisedRead), match=message):
        run(body.format(""), warps=2, seed=seed)


@pytest.mark.parametrize("seed", range(4))
def test_a_write_to_a_word_that_another_warp_has_read_needs_a_barrier(seed: int) -> None:
    body = (
        SETUP + REVERSED + "st.shared.b32 [%r3], %r900;\nbar.sync 0;\nld.shared.b32 %r5, [%r4];\n"
    )
    body += "{}st.shared.b32 [%r3], %r2;\n"
    run(body.format("bar.sync 0;\n"), warps=2, seed=seed)
    with pytest.raises(errors.Race, match=r"writes shared memory that .* read|reads shared memory"):
        run(body.format(""), warps=2, seed=seed)


@pytest.mark.parametrize("seed", range(4))
def test_two_warps_may_write_one_word_only_with_the_same_value(seed: int) -> None:
    run(SETUP + "mov.b32 %r5, 7;\nst.shared.b32 [%r1], %r5;", warps=2, seed=seed)
    with pytest.raises(errors.Race):
        run(SETUP + "shr.u32 %r5, %r900, 5;\nst.shared.b32 [%r1], %r5;", warps=2, seed=seed)


def test_lanes_that_write_different_values_to_one_word_race() -> None:
    with pytest.raises(errors.Race, match="lanes write different values to one address"):
        run(SETUP + "st.shared.b32 [%r1], %r900;")


COPY = SETUP + "add.s64 %rd8, %rd0, %rd9;\ncp.async.ca.shared.global [%r3], [%rd8], 4;\n"
COMMIT, WAIT, BARRIER = "cp.async.commit_group;\n", "cp.async.wait_group 0;\n", "bar.sync 0;\n"


@pytest.mark.parametrize("seed", range(3))
def test_copied_bytes_need_a_wait_and_those_of_another_warp_a_barrier_after_it(seed: int) -> None:
    own, others = "ld.shared.b32 %r5, [%r3];\n", REVERSED + "ld.shared.b32 %r5, [%r4];\n"
    run(COPY + COMMIT + WAIT + own, words(64), warps=2, seed=seed)
    run(COPY + COMMIT + WAIT + BARRIER + others, words(64), warps=2, seed=seed)
    for missing in (COMMIT + own, COMMIT + BARRIER + others, WAIT + own):
        with pytest.raises(errors.ReadBeforeWait):
            run(COPY + missing, words(64), warps=2, seed=seed)
    # A barrier before a warp's wait does not make its copy visible to other warps.
    with pytest.raises((errors.Race, errors.ReadBeforeWait, errors.UninitialisedRead)):
        run(COPY + COMMIT + BARRIER + WAIT + others, words(64), warps=2, seed=seed)


def test_a_wait_for_all_but_one_group_leaves_the_last_one_pending() -> None:
    second = COPY + COMMIT + "cp.async.ca.shared.global [%r3+128], [%rd8], 4;\n" + COMMIT
    second += "cp.async.wait_group 1;\nld.shared.b32 %r5, [%r3{}];\n"
    run(second.format(""), words())
    with pytest.raises(errors.ReadBeforeWait):
        run(second.format("+128"), words())


def test_a_copy_over_bytes_that_another_warp_reads_needs_a_barrier() -> None:
    body = (
        SETUP + REVERSED + "st.shared.b32 [%r3], %r900;\nbar.sync 0;\nld.shared.b32 %r5, [%r4];\n"
    )
    body += "{}" + COPY.removeprefix(SETUP)
    run(body.format(BARRIER), words(), warps=2)
    with pytest.raises(errors.Race, match=r"writes shared memory that .* read"):
        run(body.format(""), words(), warps=2)


def test_a_copy_of_fewer_bytes_fills_the_rest_with_zeros() -> None:
    out = np.full(64, 9, np.uint32)
    body = SETUP + "add.s64 %rd8, %rd0, %rd9;\nadd.s64 %rd7, %rd1, %rd9;\nand.b32 %r6, %r2, 4;\n"
    body += "cp.async.ca.shared.global [%r3], [%rd8], 4, %r6;\n" + COMMIT + WAIT
    body += "ld.shared.b32 %r5, [%r3];\nst.global.b32 [%rd7], %r5;\n"
    # Lanes that copy nothing may have any address.
    body = body.replace("add.s64 %rd8, %rd0, %rd9;", "add.s64 %rd8, %rd0, %rd9;\n"
                        "setp.eq.b32 %p1, %r6, 0;\n@%p1 mov.b64 %rd8, 4;")  # fmt: skip
    body = body.replace("and.b32 %r6, %r2, 4;\n", "").replace(
        "setp.eq.b32 %p1", "and.b32 %r6, %r2, 4;\nsetp.eq.b32 %p1"
    )
    run(body, words(32), out)
    assert out[:32].tolist() == [lane if lane % 2 else 0 for lane in range(32)]


def test_programs_that_access_the_same_bytes_race_if_one_writes() -> None:
    own = SETUP + "shl.b32 %r5, %r902, 2;\ncvt.u64.u32 %rd7, %r5;\nadd.s64 %rd8, %rd0, %rd7;\n"
    run(own + "st.global.b32 [%rd8], %r5;", words(), programs=2)
    shared = SETUP + "add.s64 %rd8, %rd0, %rd9;\n"
    run(shared + "ld.global.b32 %r5, [%rd8];", words(), programs=2)
    for access in ("st.global.b32 [%rd8], %r900;", "ld.global.b32 %r6, [%rd8+128];"):
        with pytest.raises(errors.Race, match=r"program \d.*; .*program \d.*one of them writes"):
            run(own + "st.global.b32 [%rd8], %r5;\nadd.s64 %rd8, %rd0, %rd9;\n" + access, words(),
                programs=2)  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "wanted"), [("min", -64), ("max", 63)])
def test_atomic_updates_of_one_word_lose_none_and_need_no_order(
    name: str, wanted: int, seed: int
) -> None:
    # The lanes of two programs of two warps have the numbers 63 to -64.
    body = f"sub.s32 %r5, 63, %r902;\natom.global.gpu.acq_rel.{name}.s32 %r6, [%rd0], %r5;"
    found = np.zeros(1, np.int32)
    run(body, found, warps=2, programs=2, seed=seed)
    assert found.tolist() == [wanted]
    for access in ("ld.global.b32 %r7, [%rd0];", "st.global.b32 [%rd0], 1;"):
        with pytest.raises(errors.Race, match="one of them writes"):
            run(f"{body}\n{access}", found, warps=2, programs=2, seed=seed)


def test_an_atomic_update_returns_what_it_replaces_in_lanes_whose_guard_is_true() -> None:
    body = SETUP + "add.s64 %rd8, %rd0, %rd9;\nadd.s64 %rd7, %rd1, %rd9;\n"
    body += "setp.lt.u32 %p1, %r900, 16;\nmov.b32 %r6, 0;\n"
    body += "@%p1 atom.global.gpu.acq_rel.min.s32 %r6, [%rd8], 8;\nst.global.b32 [%rd7], %r6;"
    found, before = np.arange(32, dtype=np.int32), np.zeros(32, np.int32)
    run(body, found, before)
    assert found.tolist() == [*range(8), *[8] * 8, *range(16, 32)]
    assert before.tolist() == [*range(16), *[0] * 16]


def test_warps_of_a_program_order_accesses_to_global_memory_by_barriers() -> None:
    body = SETUP + "add.s64 %rd8, %rd0, %rd9;\nst.global.b32 [%rd8], %r900;\n{}"
    body += "xor.b32 %r5, %r2, 128;\ncvt.u64.u32 %rd7, %r5;\nadd.s64 %rd7, %rd0, %rd7;\n"
    body += "ld.global.b32 %r6, [%rd7];\n"
    run(body.format(BARRIER), words(), warps=2)
    with pytest.raises(errors.Race, match=r"warp \d of program 0.*warp \d of program 0"):
        run(body.format(""), words(), warps=2)


def test_a_barrier_that_a_warp_cannot_reach_is_a_deadlock_unless_the_warp_has_ended() -> None:
    ended = "setp.lt.u32 %p1, %r900, 32;\n@%p1 bra $END;\nbar.sync 0;\n$END:\n"
    run(ended, warps=2)
    with pytest.raises(errors.UndefinedResult, match="only some lanes of a warp reach a barrier"):
        run(ended.replace(" 32;", " 16;"), warps=2)


@pytest.mark.parametrize("seed", range(5))
def test_lanes_that_part_in_a_loop_meet_after_it(seed: int) -> None:
    out = np.zeros(128, np.uint32)
    body = (
        SETUP
        + """
    add.s64 %rd8, %rd0, %rd9;
    mov.b32 %r10, 0;
    mov.b32 %r11, 0;
    $LOOP:
    add.s32 %r10, %r10, %r11;
    add.s32 %r11, %r11, 1;
    setp.le.u32 %p1, %r11, %r900;
    @%p1 bra $LOOP;
    mov.b32 %r12, 1;
    shfl.sync.bfly.b32 %r13, %r10, 1, 31, -1;
    st.global.b32 [%rd8], %r13;
    """
    )
    run(body, out, warps=4, seed=seed)
    assert out.tolist() == [sum(range((lane ^ 1) + 1)) for lane in range(128)]
