# SPDX-License-Identifier: Apache-2.0
"""Tensor memory and its products against the PTX manual, and what must be waited for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from testing.ptx import errors
from tests.kernels.ptx.snippets import run

ALLOCATE = """
setp.lt.u32 %p1, %r900, 32;
mov.b32 %r1, smem;
@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 64;
@%p1 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
bar.sync 0;
ld.shared.b32 %r2, [%r1];
bar.sync 0;
and.b32 %r3, %r900, 96;
shl.b32 %r3, %r3, 16;
add.s32 %r3, %r3, %r2;
mul.wide.u32 %rd20, %r900, 4;
add.s64 %rd20, %rd20, %rd0;
"""
"""%r1 is the start of shared memory, %r2 of tensor memory, %r3 of the lanes of the warp in it, and
%rd20 the first word of the lane in the first array, of which rows are 128 words."""

FREE = "bar.sync 0;\n@%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r2, 64;\n"
WAIT_ST, WAIT_LD = "tcgen05.wait::st.sync.aligned;\n", "tcgen05.wait::ld.sync.aligned;\n"


def group(first: int, count: int) -> str:
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"


def loaded(array: int, first: int, count: int) -> str:
    """Load registers from rows of an array, one for each lane."""
    text = f"mul.wide.u32 %rd30, %r900, 4;\nadd.s64 %rd30, %rd30, %rd{array};\n"
    return text + "".join(
        f"ld.global.b32 %r{first + i}, [%rd30+{512 * i}];\n" for i in range(count)
    )


def stored(array: int, first: int, count: int) -> str:
    text = f"mul.wide.u32 %rd31, %r900, 4;\nadd.s64 %rd31, %rd31, %rd{array};\n"
    return text + "".join(
        f"st.global.b32 [%rd31+{512 * i}], %r{first + i};\n" for i in range(count)
    )


def store(column: int, first: int, count: int) -> str:
    name = f"tcgen05.st.sync.aligned.32x32b.x{count}.b32"
    return f"{name} [%r3+{column}], {group(first, count)};\n"


def load(column: int, first: int, count: int) -> str:
    name = f"tcgen05.ld.sync.aligned.32x32b.x{count}.b32"
    return f"{name} {group(first, count)}, [%r3+{column}];\n"


def words(rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**32, (rows, 128), dtype=np.uint32)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_lane_of_tensor_memory_has_a_word_in_each_column(seed: int) -> None:
    numbers, out = words(16), np.zeros((16, 128), np.uint32)
    body = ALLOCATE + loaded(0, 100, 16) + store(8, 100, 16) + WAIT_ST
    body += load(8, 200, 4) + load(12, 204, 8) + load(20, 212, 4) + WAIT_LD + stored(1, 200, 16)
    run(body + FREE, numbers, out, warps=4, seed=seed)
    assert np.array_equal(out, numbers)


STORED = ALLOCATE + loaded(0, 100, 16) + store(8, 100, 16)
TENSOR_ERRORS: dict[str, tuple[str, type[Exception], str]] = {
    "a load before the wait for a store": (
        STORED + load(8, 200, 4), errors.ReadBeforeWait, "may not have been written"
    ),
    "a load of columns that nothing wrote": (
        STORED + WAIT_ST + load(4, 200, 8), errors.UninitialisedRead, "nothing has written"
    ),
    "columns after those allocated": (
        STORED + store(60, 100, 8), errors.OutOfBounds, "8 columns of tensor memory from 508"
    ),
    "columns before those allocated": (
        STORED + load(-1, 200, 1), errors.OutOfBounds, "1 columns of tensor memory from 447"
    ),
    "lanes of another warp": (
        STORED.replace("shl.b32 %r3, %r3, 16", "shl.b32 %r3, %r3, 17"), errors.OutOfBounds,
        "a warp of the lanes from 32 on",
    ),
    "memory that was not allocated": (
        "mov.b32 %r3, 0;\n" + load(0, 200, 1), errors.OutOfBounds, "has no tensor memory"
    ),
    "memory that was freed": (
        STORED + WAIT_ST + FREE + "bar.sync 0;\n" + load(8, 200, 1), errors.OutOfBounds,
        "has no tensor memory",
    ),
    "another size than allocated": (
        ALLOCATE + FREE.replace("64;", "32;"), errors.OutOfBounds, "other columns than"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSOR_ERRORS)
def test_errors_of_tensor_memory_are_found(name: str) -> None:
    body, error, message = TENSOR_ERRORS[name]
    with pytest.raises(error, match=message):
        run(body, words(16), warps=4, seed=1)


K_MAJOR, N_MAJOR = 0, 1 << 16
# Byte offset in B of row k (of 16) and column n (of 16), and leading and stride offsets / 16.
LAYOUTS: dict[str, tuple[int, int, int, int, Any]] = {
    "no swizzle, rows along k": (
        K_MAJOR, 0, 8, 16, lambda k, n: n % 8 * 16 + n // 8 * 256 + k % 8 * 2 + k // 8 * 128
    ),
    "32 bytes, rows along n": (
        N_MAJOR, 6, 0, 16,
        lambda k, n: k % 8 * 32 + k // 8 * 256 + (n // 8 ^ k // 4 % 2) * 16 + n % 8 * 2,
    ),
}  # fmt: skip


COMMIT = "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r1+16];"
TRY_WAIT = "mbarrier.try_wait.parity.shared::cta.b64"
OLDER = {
    COMMIT: "tcgen05.commit.cta_group::1.mbarrier::arrive::one.b64 [%rd16];",
    TRY_WAIT: "mbarrier.try_wait.parity.shared.b64",
}
"""The instructions that Triton 3.6 writes instead."""


def product(
    layout: str,
    kind: str,
    *,
    accumulate: bool = True,
    drop: str = "",
    keep: str = "",
    seed: int = 1,
    older: dict[str, str] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums of a product and the exact sums, [128, 16]. Omit `drop` before `keep`."""
    major, swizzle, leading, stride, offset = LAYOUTS[layout]
    generator = np.random.default_rng(0)
    a, b = (generator.integers(-9, 10, shape) for shape in ((128, 16), (16, 16)))
    c = generator.integers(-99, 99, (128, 16))

    def bits(matrix: np.ndarray) -> np.ndarray:
        if kind == "f16":
            return matrix.astype(np.float16).view(np.uint16)
        return (matrix.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)

    left = np.ascontiguousarray(np.ascontiguousarray(bits(a)).view(np.uint32).T)
    sums = np.ascontiguousarray(c.astype(np.float32).view(np.uint32).T)
    right = np.zeros(128, np.uint32)
    for k in range(16):
        for n in range(16):
            right.view(np.uint16)[offset(k, n) // 2] = bits(b)[k, n]
    out = np.zeros((16, 128), np.uint32)
    description = 8 << 24 | 2 << 17 | major | 1 << 4 | (9 << 7 if kind == "bf16" else 0)
    # Shared memory of the snippets starts at 1024 if there is tensor memory.
    descriptor = 2048 >> 4 | leading << 16 | stride << 32 | swizzle << 61
    body = ALLOCATE + loaded(0, 100, 8) + store(0, 100, 8) + loaded(1, 120, 16) + store(16, 120, 16)
    body += (
        loaded(2, 140, 1) + "mad.lo.s32 %r10, %r900, 4, %r1;\nst.shared.b32 [%r10+1024], %r140;\n"
    )
    body += (
        WAIT_ST
        + "fence.proxy.async.shared::cta;\nelect.sync %r11|%p2, -1;\nand.pred %p3, %p1, %p2;\n"
    )
    body += "@%p3 mbarrier.init.shared::cta.b64 [%r1+16], 1;\nbar.sync 0;\n"
    body += f"mov.b32 %r12, {description};\nmov.b64 %rd40, {descriptor};\n"
    body += f"mov.pred %p4, {-int(accumulate)};\n"
    body += "@%p3 tcgen05.mma.cta_group::1.kind::f16 [%r2+16], [%r2+0], %rd40, %r12, %p4;\n"
    body += f"add.s32 %r13, %r1, 16;\ncvt.u64.u32 %rd16, %r13;\n@%p3 {COMMIT}\n"
    body += "{\n.reg .pred complete;\nwaitLoop:\n"
    body += f"{TRY_WAIT} complete, [%r1+16], 0;\n"
    body += "@!complete bra.uni waitLoop;\n}\n"
    body += "bar.sync 0;\n@%p3 mbarrier.inval.shared::cta.b64 [%r1+16];\n"
    body += load(16, 160, 16) + WAIT_LD + stored(3, 160, 16)
    assert drop + keep in body
    body = body.replace(drop + keep, keep) if drop else body
    for text, other in (older or {}).items():
        body = body.replace(text, other)
    run(body + FREE, left, sums, right, out, warps=4, shared=4096, seed=seed)
    return out.view(np.float32).T, a @ b + (c if accumulate else 0)


@pytest.mark.parametrize("older", [{}, OLDER], ids=["Triton 3.9", "Triton 3.6"])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_of_tensor_memory_and_shared_memory_are_exact(
    layout: str, kind: str, accumulate: bool, older: dict[str, str]
) -> None:
    found, exact = product(layout, kind, accumulate=accumulate, older=older)
    assert np.array_equal(found, exact)


MBARRIER = "shared::cta.b64 [%r1+16]"


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    ("drop", "keep", "error"),
    [
        (WAIT_ST, "fence", errors.ReadBeforeWait),
        (f"{TRY_WAIT} complete, [%r1+16], 0;\n@!complete bra.uni waitLoop;\n", "}",
         errors.ReadBeforeWait),
        (f"@%p3 {COMMIT}\n", "{", errors.Deadlock),
        (f"@%p3 mbarrier.init.{MBARRIER}, 1;\n", "", errors.UninitialisedRead),
        ("bar.sync 0;\n", "mov.b32 %r12", (errors.Race, errors.UninitialisedRead)),
        ("bar.sync 0;\n", f"@%p3 mbarrier.inval.{MBARRIER}",
         (errors.Race, errors.UninitialisedRead)),
    ],
)  # fmt: skip
def test_what_a_product_needs_is_not_left_out(
    drop: str, keep: str, error: type[Exception], seed: int
) -> None:
    with pytest.raises(error):
        product("32 bytes, rows along n", "f16", drop=drop, keep=keep, seed=seed)
