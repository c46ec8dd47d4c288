# SPDX-License-Identifier: Apache-2.0
"""The instructions of whole warps against the PTX manual's figures, one lane at a time."""

from __future__ import annotations

import numpy as np
import pytest

from testing.ptx.errors import Misaligned, UndefinedResult, UninitialisedRead, UnknownInstruction
from testing.ptx.warp import MMA
from tests.kernels.ptx.snippets import run

LANES = range(32)


def random_words(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**32, shape, dtype=np.uint32)


def loads(registers: list[str], array: int, first: int = 40) -> str:
    """Return PTX that loads element [register, lane] of an array of the grid into each register."""
    lines = [f"mul.wide.u32 %rd{first}, %r900, 4;", f"add.s64 %rd{first}, %rd{first}, %rd{array};"]
    lines += [f"ld.global.b32 {r}, [%rd{first}+{128 * i}];" for i, r in enumerate(registers)]
    return "\n".join(lines) + "\n"


def stored(registers: list[str], array: int) -> str:
    """Return PTX that stores each register into element [register, lane] of an array."""
    lines = ["mul.wide.u32 %rd50, %r900, 4;", f"add.s64 %rd50, %rd50, %rd{array};"]
    lines += [f"st.global.b32 [%rd50+{128 * i}], {r};" for i, r in enumerate(registers)]
    return "\n".join(lines) + "\n"


def names(first: int, count: int) -> list[str]:
    return [f"%r{first + i}" for i in range(count)]


def group(registers: list[str]) -> str:
    return "{" + ", ".join(registers) + "}"


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("distance", [0, 1, 5, 16, 31])
@pytest.mark.parametrize("segment", [32, 16, 8])
def test_shuffles_read_the_lane_that_the_manual_names(
    mode: str, distance: int, segment: int
) -> None:
    source, out = random_words(32), np.zeros(32, np.uint32)
    segment_mask = 32 - segment
    clamp = segment_mask << 8 | (0 if mode == "up" else 31)
    shuffle = f"shfl.sync.{mode}.b32 %r2, %r1, {distance}, {clamp}, -1;\n"
    run(loads(["%r1"], 0) + shuffle + stored(["%r2"], 1), source, out)
    for lane in LANES:
        # The manual's pseudocode.
        c_low = clamp & 31
        last = (lane & segment_mask) | (c_low & ~segment_mask)
        first = lane & segment_mask
        j, inside = {
            "up": (lane - distance, lane - distance >= last),
            "down": (lane + distance, lane + distance <= last),
            "bfly": (lane ^ distance, lane ^ distance <= last),
            "idx": (first | (distance & ~segment_mask),) * 2,
        }[mode]
        if mode == "idx":
            inside = j <= last
        assert out[lane] == source[j if inside else lane]


def test_every_lane_may_shuffle_from_another_one() -> None:
    source, out, from_lane = random_words(32), np.zeros(32, np.uint32), random_words(32)
    shuffle = "shfl.sync.idx.b32 %r3, %r1, %r2, 31, -1;\n"
    run(
        loads(["%r1"], 0) + loads(["%r2"], 2) + shuffle + stored(["%r3"], 1), source, out, from_lane
    )
    assert out.tolist() == source[from_lane % 32].tolist()


REDUCTIONS = {
    "add.s32": lambda x: int(x.astype(np.int64).sum()), "add.u32": lambda x: int(x.sum()),
    "min.s32": lambda x: x.view(np.int32).min(), "max.s32": lambda x: x.view(np.int32).max(),
    "min.u32": lambda x: x.min(), "max.u32": lambda x: x.max(),
    "and.b32": lambda x: np.bitwise_and.reduce(x), "or.b32": lambda x: np.bitwise_or.reduce(x),
    "xor.b32": lambda x: np.bitwise_xor.reduce(x),
    "min.f32": lambda x: np.nanmin(x.view(np.float32)).view(np.uint32),
    "max.f32": lambda x: np.nanmax(x.view(np.float32)).view(np.uint32),
    "max.abs.f32": lambda x: np.nanmax(abs(x.view(np.float32))).view(np.uint32),
}  # fmt: skip


@pytest.mark.parametrize("operation", REDUCTIONS)
def test_reductions_combine_all_lanes(operation: str) -> None:
    source, out = random_words(32) | np.uint32(0x0F), np.zeros(32, np.uint32)
    if operation.endswith("f32"):
        source = np.random.default_rng(1).standard_normal(32).astype(np.float32)
        source[3] = np.nan  # ignored
        source = source.view(np.uint32)
    reduction = f"mov.b32 %r3, -1;\nredux.sync.{operation} %r2, %r1, %r3;\n"
    run(loads(["%r1"], 0) + reduction + stored(["%r2"], 1), source, out)
    assert set(out.tolist()) == {int(REDUCTIONS[operation](source)) % 2**32}


@pytest.mark.parametrize("name", ["gtu", "lt"])
def test_both_halves_are_compared_with_a_predicate_for_each(name: str) -> None:
    a, b, out = random_words(32), random_words(32)[::-1].copy(), np.zeros(64, np.uint32)
    a[0], b[1], b[2] = 0x7E003C00, 0x3C007E00, a[2]
    run(
        loads(["%r1"], 0) + loads(["%r2"], 1) + f"setp.{name}.f16x2 %p1|%p2, %r1, %r2;\n"
        "selp.b32 %r3, 1, 0, %p1;\nselp.b32 %r4, 1, 0, %p2;\n" + stored(["%r3", "%r4"], 2),
        a, b, out,
    )  # fmt: skip
    left, right = (words.view(np.float16).reshape(32, 2).T for words in (a, b))
    for got, x, y in zip(out.reshape(2, 32), left, right, strict=True):
        nan = np.isnan(x) | np.isnan(y)
        assert got.tolist() == ((x > y) | nan if name == "gtu" else (x < y) & ~nan).tolist()


def half(bits: int, kind: str) -> float:
    word = np.uint16(bits)
    if kind == "f16":
        return float(word.view(np.float16))
    return float((np.uint32(bits) << np.uint32(16)).view(np.float32))


@pytest.mark.parametrize("opcode", MMA)
def test_products_of_matrices_follow_the_layout_of_fragments(opcode: str) -> None:
    """The manual's formulas for the row and column of element i of a lane's fragments."""
    kind = MMA[opcode]
    generator = np.random.default_rng(0)
    depth, per_register = (32, 4) if kind == "s8" else (16, 2)
    if kind == "s8":
        a, b = (generator.integers(-128, 128, s).astype(np.int8) for s in ((16, depth), (depth, 8)))
        c = generator.integers(-(2**20), 2**20, (16, 8)).astype(np.int32)
        words_a, words_b = a.view(np.uint8), b.view(np.uint8)
    else:
        # Sums of such numbers are exact in float32. fp16's denormals are multiplied as they are.
        numbers = [generator.integers(-9, 10, s).astype(np.float32) for s in ((16, 16), (16, 8))]
        c = generator.integers(-99, 99, (16, 8)).astype(np.float32)
        if kind == "f16":
            numbers[0] *= np.float32(2.0**-24)
            c *= np.float32(2.0**-24)
            a, b = (x.astype(np.float16) for x in numbers)
            words_a, words_b = a.view(np.uint16), b.view(np.uint16)
        else:
            a, b = numbers
            words_a, words_b = ((x.view(np.uint32) >> 16).astype(np.uint16) for x in (a, b))
    width = 32 // per_register
    fragments_a, fragments_b = np.zeros((4, 32), np.uint32), np.zeros((2, 32), np.uint32)
    fragments_c = np.zeros((4, 32), np.uint32)
    for lane in LANES:
        row_group, in_group = lane >> 2, lane % 4
        for i in range(4 * per_register):
            row = row_group + (8 if i // per_register % 2 else 0)
            column = in_group * per_register + i % per_register
            column += depth // 2 if i >= 2 * per_register else 0
            part = int(words_a[row, column]) << width * (i % per_register)
            fragments_a[i // per_register, lane] |= np.uint32(part)
        for i in range(2 * per_register):
            row = in_group * per_register + i % per_register
            row += depth // 2 if i >= per_register else 0
            part = int(words_b[row, row_group]) << width * (i % per_register)
            fragments_b[i // per_register, lane] |= np.uint32(part)
        for i in range(4):
            row, column = row_group + 8 * (i // 2), in_group * 2 + i % 2
            fragments_c[i, lane] = c.view(np.uint32)[row, column]
    out = np.zeros((4, 32), np.uint32)
    product = f"{opcode} {group(names(20, 4))}, {group(names(1, 4))}, {group(names(5, 2))}, "
    run(
        loads(names(1, 4), 0) + loads(names(5, 2), 1) + loads(names(7, 4), 2)
        + product + group(names(7, 4)) + ";\n" + stored(names(20, 4), 3),
        fragments_a, fragments_b, fragments_c, out,
    )  # fmt: skip
    exact = a.astype(np.float64) @ b.astype(np.float64) + c
    for lane in LANES:
        for i in range(4):
            number = out[i, lane].view(np.int32 if kind == "s8" else np.float32)
            assert number == exact[(lane >> 2) + 8 * (i // 2), lane % 4 * 2 + i % 2]


LAYOUTS = {"none": (0, 16), "128 bytes": (1, 128), "64 bytes": (2, 64), "32 bytes": (3, 32)}
"""Modes of a descriptor by the length of the rows that are swizzled."""


# A swizzled row that holds columns is no longer than the matrix has columns.
@pytest.mark.parametrize(
    ("columns", "transposed", "layout"),
    [
        (columns, transposed, layout)
        for layout, (_, width) in LAYOUTS.items()
        for columns in (8, 16, 64)
        for transposed in (False, True)
        if not transposed or columns * 2 >= width
    ],
)
def test_products_of_warp_groups_read_the_canonical_layouts(
    columns: int, transposed: bool, layout: str
) -> None:
    mode, width = LAYOUTS[layout]
    generator = np.random.default_rng(0)
    a, b = (generator.integers(-9, 10, s).astype(np.float16) for s in ((64, 16), (16, columns)))
    c = generator.integers(-99, 99, (64, columns)).astype(np.float32)
    fragments = np.zeros((4, 128), np.uint32)
    sums = np.zeros((columns // 2, 128), np.uint32)
    for thread in range(128):
        warp, group_of_four, in_group = thread // 32, thread % 32 // 4, thread % 4
        for i in range(8):
            row = 16 * warp + group_of_four + 8 * (i // 2 % 2)
            column = 2 * in_group + i % 2 + 8 * (i // 4)
            fragments[i // 2, thread] |= np.uint32(
                int(a.view(np.uint16)[row, column]) << 16 * (i % 2)
            )
        for i in range(columns // 2):
            row = 16 * warp + group_of_four + 8 * (i // 2 % 2)
            column = 8 * (i // 4) + 2 * in_group + i % 2
            sums[i, thread] = c.view(np.uint32)[row, column]
    # Eight rows are a block. Blocks are `stride` apart along the rows, and `leading` across them.
    size = 8 * width
    row_elements = columns if transposed else 16
    blocks_across = max(1, row_elements * 2 // width)
    leading, stride = size, size * blocks_across
    memory = np.zeros(16384, np.uint8)
    for k in range(16):
        for n in range(columns):
            row, element = (k, n) if transposed else (n, k)
            block = row // 8 * stride + element * 2 // width * leading
            offset = block + row % 8 * width + element * 2 % width
            # Within 128 bytes x 8, the bits of the row change those of the 16-byte part.
            offset ^= (offset >> 7 & (width // 16 - 1)) << 4
            memory[offset : offset + 2] = b[k : k + 1, n].view(np.uint8)
    if layout == "none" and transposed:
        leading, stride = stride, leading
    descriptor = 1024 >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | mode << 62
    d = names(100, columns // 2)
    body = "mul.wide.u32 %rd40, %r900, 4;\nadd.s64 %rd41, %rd40, %rd0;\n"
    body += "".join(f"ld.global.b32 %r{1 + i}, [%rd41+{512 * i}];\n" for i in range(4))
    body += "add.s64 %rd42, %rd40, %rd1;\nadd.s64 %rd43, %rd40, %rd3;\n"
    body += "".join(f"ld.global.b32 {r}, [%rd42+{512 * i}];\n" for i, r in enumerate(d))
    body += "mul.wide.u32 %rd44, %r900, 128;\nadd.s64 %rd44, %rd44, %rd2;\n"
    body += "mov.b32 %r50, smem;\nmad.lo.s32 %r50, %r900, 128, %r50;\n"
    for i in range(8):
        part = group(names(51, 4))
        body += f"ld.global.v4.b32 {part}, [%rd44+{16 * i}];\n"
        body += f"st.shared.v4.b32 [%r50+{16 * i}], {part};\n"
    body += "bar.sync 0;\nfence.proxy.async.shared::cta;\nwgmma.fence.sync.aligned;\n"
    body += f"mov.pred %p1, -1;\nmov.b64 %rd45, {descriptor};\n"
    body += f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.f16.f16 {group(d)}, "
    body += f"{group(names(1, 4))}, %rd45, %p1, 1, 1, {int(transposed)};\n"
    body += "wgmma.commit_group.sync.aligned;\n"
    wait = "wgmma.wait_group.sync.aligned 0;\n"
    end = "".join(f"st.global.b32 [%rd43+{512 * i}], {r};\n" for i, r in enumerate(d))
    out = np.zeros((columns // 2, 128), np.uint32)
    arrays = fragments, sums, memory, out
    run(body + wait + end, *arrays, warps=4, shared=16384)
    exact = a.astype(np.float64) @ b.astype(np.float64) + c
    for thread in range(128):
        for i in range(columns // 2):
            row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2 % 2)
            column = 8 * (i // 4) + 2 * (thread % 4) + i % 2
            assert out[i, thread].view(np.float32) == exact[row, column]
    with pytest.raises(UninitialisedRead):
        run(body + end, *arrays, warps=4, shared=16384)


FILL = """
mul.lo.s32 %r700, %r900, 16;
mov.b32 %r701, smem;
add.s32 %r700, %r700, %r701;
mul.wide.u32 %rd70, %r900, 16;
add.s64 %rd70, %rd70, %rd0;
ld.global.v4.b32 {%r710, %r711, %r712, %r713}, [%rd70];
st.shared.v4.b32 [%r700], {%r710, %r711, %r712, %r713};
bar.sync 0;
"""
"""Copies 512 bytes of the first array to shared memory, and leaves a lane's address in %r700."""


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_gives_a_lane_two_numbers_of_each_matrix(count: int, transposed: bool) -> None:
    matrices = random_words(32, 4)
    out = np.zeros((count, 32), np.uint32)
    # Lane i gives row i of the rows in reverse order.
    load = f"ldmatrix.sync.aligned.m8n8.x{count}{'.trans' if transposed else ''}.shared.b16"
    run(
        FILL + "sub.s32 %r702, 31, %r900;\nshl.b32 %r702, %r702, 4;\nadd.s32 %r702, %r702, %r701;\n"
        + f"{load} {group(names(1, count))}, [%r702];\n" + stored(names(1, count), 1),
        matrices, out,
    )  # fmt: skip
    rows = matrices.view(np.uint16).reshape(32, 8)[::-1]
    for lane in LANES:
        for i in range(count):
            matrix = rows[8 * i : 8 * i + 8]
            first = [(lane // 4, lane % 4 * 2 + k) for k in range(2)]
            wanted = [int(matrix[(y, x) if transposed else (x, y)]) for x, y in first]
            assert out[i, lane] == wanted[0] | wanted[1] << 16


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix_stores_what_ldmatrix_loads(count: int, transposed: bool) -> None:
    fragments, out = random_words(count, 32), np.zeros((count, 32), np.uint32)
    suffix = f"m8n8.x{count}{'.trans' if transposed else ''}.shared.b16"
    registers = group(names(1, count))
    run(
        loads(names(1, count), 0)
        + "shl.b32 %r700, %r900, 4;\nmov.b32 %r701, smem;\nadd.s32 %r700, %r700, %r701;\n"
        + f"stmatrix.sync.aligned.{suffix} [%r700], {registers};\nbar.sync 0;\n"
        + f"ldmatrix.sync.aligned.{suffix} {group(names(11, count))}, [%r700];\n"
        + stored(names(11, count), 1),
        fragments, out,
    )  # fmt: skip
    assert np.array_equal(out, fragments)


def test_a_shuffle_that_half_a_warp_executes_is_undefined() -> None:
    body = """
    mov.b32 %r1, 1;
    setp.lt.u32 %p1, %r900, 16;
    @%p1 bra $L;
    shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;
    $L:
    """
    with pytest.raises(UndefinedResult, match=r"line \d+: shfl.*only some lanes of a warp"):
        run(body)


def test_rows_of_a_matrix_start_at_multiples_of_16_bytes() -> None:
    body = FILL + "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r700+8];\n"
    with pytest.raises(Misaligned, match=r"ldmatrix.*not a multiple of 16"):
        run(body, random_words(32, 4))


def test_a_shuffle_among_some_lanes_is_refused() -> None:
    body = "mov.b32 %r1, 1;\nshfl.sync.bfly.b32 %r2, %r1, 1, 31, 0xffff;\n"
    with pytest.raises(UnknownInstruction, match="a member mask other than -1"):
        run(body)
