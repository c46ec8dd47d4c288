# SPDX-License-Identifier: Apache-2.0
"""The instructions that the 32 lanes of a warp execute together.

Arrays are [warps, 32 lanes]; fragments of matrices are arrays of 32-bit registers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from testing.ptx import arithmetic
from testing.ptx.arithmetic import Array
from testing.ptx.errors import UnknownInstruction

LANES = np.arange(32)


def shuffle_source(mode: str, b: Array, c: Array) -> Array:
    """Return the lane that each lane reads in `shfl.sync`, or itself outside of its segment."""
    b, clamp, segment = (b & 31).astype(int), (c & 31).astype(int), (c >> 8 & 31).astype(int)
    first = LANES & segment
    limit = first | (clamp & ~segment)
    source = {
        "up": LANES - b, "down": LANES + b, "bfly": LANES ^ b, "idx": first | (b & ~segment)
    }[mode]  # fmt: skip
    inside = source >= limit if mode == "up" else source <= limit
    return np.where(inside, source, LANES)


def shuffle(value: Array, source: Array) -> Array:
    """Return the value of each lane's source lane."""
    if source.shape[0] == 1:
        return value[:, source[0]]
    return np.take_along_axis(value, source, axis=1)


def _float_reduction(function: Callable[..., Array]) -> Callable[[Array], Array]:
    def reduce(x: Array) -> Array:
        x = x.view(np.float32)
        while x.shape[1] > 1:
            half = x.shape[1] // 2
            x = function(x[:, :half], x[:, half:])
        return x

    return reduce


_largest = _float_reduction(arithmetic.maximum)
REDUCTIONS: dict[str, Callable[..., Array]] = {
    "add.s32": lambda x: x.view(np.int32).sum(1, keepdims=True, dtype=np.int32),
    "add.u32": lambda x: x.sum(1, keepdims=True, dtype=np.uint32),
    "min.s32": lambda x: x.view(np.int32).min(1, keepdims=True),
    "min.u32": lambda x: x.min(1, keepdims=True),
    "max.s32": lambda x: x.view(np.int32).max(1, keepdims=True),
    "max.u32": lambda x: x.max(1, keepdims=True),
    "min.f32": _float_reduction(arithmetic.minimum),
    "max.f32": _largest,
    "max.abs.f32": lambda x: _largest(x & np.uint32(0x7FFFFFFF)),
    "and.b32": lambda x: np.bitwise_and.reduce(x, axis=1, keepdims=True),
    "or.b32": lambda x: np.bitwise_or.reduce(x, axis=1, keepdims=True),
    "xor.b32": lambda x: np.bitwise_xor.reduce(x, axis=1, keepdims=True),
}
"""`redux.sync` of uint32 [warps, 32] to [warps, 1]."""


def _left(fragment: Array) -> Array:
    """Return A, 16 rows and 4 n columns, from its registers [4, warps, 32, n numbers of each].

    Lane 4 g + t has n columns of row g, from n t on, in register 0, and those 4 n later in register
    2. The same columns of row g + 8 are in registers 1 and 3.
    """
    count = fragment.shape[-1]
    split = fragment.reshape(2, 2, -1, 8, 4, count)  # column half, row half, warp, g, t, number
    return split.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 8 * count)


def _right(fragment: Array) -> Array:
    """Return B, 4 n rows and 8 columns, from its registers [2, warps, 32, n numbers of each].

    Lane 4 g + t has n rows of column g, from n t on, in register 0, and those 4 n later in 1.
    """
    count = fragment.shape[-1]
    split = fragment.reshape(2, -1, 8, 4, count)  # row half, warp, g, t, number
    return split.transpose(1, 0, 3, 4, 2).reshape(-1, 8 * count, 8)


def _sum_matrix(fragment: Array) -> Array:
    """Return C or D [warps, 16, 8] from its registers [4, warps, 32].

    Lane 4 g + t has columns 2 t and 2 t + 1 of row g in registers 0 and 1, of row g + 8 in 2, 3.
    """
    split = fragment.reshape(2, 2, -1, 8, 4)  # row half, column, warp, g, t
    return split.transpose(2, 0, 3, 4, 1).reshape(-1, 16, 8)


def _sum_fragment(matrix: Array) -> Array:
    split = matrix.reshape(-1, 2, 8, 4, 2)  # warp, row half, g, t, column
    return np.ascontiguousarray(split.transpose(1, 4, 0, 2, 3)).reshape(4, -1, 32)


def _unpacked(registers: Sequence[Array], kind: str) -> Array:
    """Return float32 [registers, warps, 32, numbers of each register]."""
    words = np.stack(registers)
    if kind == "s8":
        return words.view(np.int8).reshape(*words.shape, 4).astype(np.float32)
    halves = words.view(np.uint16).reshape(*words.shape, 2)
    return arithmetic.from_half(halves) if kind == "f16" else arithmetic.from_bfloat(halves)


def mma(kind: str, a: Sequence[Array], b: Sequence[Array], c: Sequence[Array]) -> Array:
    """Return the registers [4, warps, 32] of A B + C; `kind` is f16, bf16 (m16n8k16) or s8 (k32).

    Products of codes and their sums are exact in float32: 32 products of at most 2^14. Floats are
    summed in float32 in some order. A GPU also does so, but it may round sums toward zero.
    """
    product = _left(_unpacked(a, kind)) @ _right(_unpacked(b, kind))
    if kind == "s8":
        total = _sum_matrix(np.stack(c).view(np.int32)) + product.astype(np.int64)
        return _sum_fragment(np.clip(total, -(2**31), 2**31 - 1).astype(np.int32))
    return sum_with(product, c)


def product(kind: str, a: Sequence[Array], b: Array) -> Array:
    """Return A B; B is 16-bit words [warps, 16, 8], not in registers."""
    return _left(_unpacked(a, kind)) @ widened(kind, b)


def widened(kind: str, words: Array) -> Array:
    """Convert 16-bit words to float32 numbers."""
    widen = arithmetic.from_half if kind == "f16" else arithmetic.from_bfloat
    return widen(np.ascontiguousarray(words))


def sum_with(matrix: Array, c: Sequence[Array]) -> Array:
    """Return the registers of the sum of float32 [warps, 16, 8] and C in registers."""
    return _sum_fragment(_sum_matrix(np.stack(c).view(np.float32)) + matrix)


MMA = {
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": "f16",
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": "bf16",
    "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32": "s8",
}


def matrix_rows_to_fragments(rows: Array, transposed: bool) -> Array:
    """Return the registers [matrices, warps, 32] that `ldmatrix` loads.

    Args:
        rows: uint16 [warps, matrices, 8 rows, 8 numbers].
    """
    if transposed:
        rows = rows.swapaxes(2, 3)
    words = np.ascontiguousarray(rows).view(np.uint32)  # [warps, matrices, 8, 4]
    return np.ascontiguousarray(words.reshape(*words.shape[:2], 32).swapaxes(0, 1))


def fragments_to_matrix_rows(registers: Sequence[Array], transposed: bool) -> Array:
    """Return the rows, uint16 [warps, matrices, 8, 8], that `stmatrix` stores."""
    words = np.stack(registers, axis=1)  # [warps, matrices, 32]
    rows = words.reshape(*words.shape[:2], 8, 4).view(np.uint16)
    return np.ascontiguousarray(rows.swapaxes(2, 3)) if transposed else rows


def matrix_in_shared_memory(descriptor: Array, columns: int, transposed: bool) -> Array:
    """Return the addresses [warps, 16, columns] of the right operand of `wgmma`, 16-bit numbers.

    The manual's canonical layouts: rows of 16, 32, 64 or 128 bytes, eight to a block. They hold
    columns if `transposed`, otherwise the 16 rows. Blocks are a stride apart along one dimension,
    and a leading offset along the other. The 16-byte parts of a row are permuted by its number.

    Args:
        descriptor: uint64 [warps, 1].
    """

    def field(first: int) -> Array:
        return (descriptor >> np.uint64(first) & np.uint64(0x3FFF)).astype(np.int64)[..., None] * 16

    start, leading, stride = field(0), field(16), field(32)
    mode = int(descriptor[0, 0] >> np.uint64(62))
    if (descriptor >> np.uint64(49) != descriptor[0, 0] >> np.uint64(49)).any():
        raise UnknownInstruction("descriptors of several layouts")
    width = {0: 16, 1: 128, 2: 64, 3: 32}[mode]
    k, n = np.arange(16)[:, None], np.arange(columns)
    across, along = (n, k) if transposed else (k, n)
    if mode == 0:
        leading, stride = (stride, leading) if transposed else (leading, stride)
    offset = across * 2 % width + across * 2 // width * leading
    offset = offset + along % 8 * width + along // 8 * stride
    address = start + offset
    return address ^ ((address >> 3) & (width - 16))
