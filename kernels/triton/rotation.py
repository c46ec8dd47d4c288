# SPDX-License-Identifier: Apache-2.0
"""`reference.rotate` as pieces of kernels: the same additions, so that the bits are the same.

The last step, the multiplication by `rotation_unit`, is left to the kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_hybrid_kv.kernels import k8v4


def rotation_unit(head_size: int) -> float:
    """Return what numbers are multiplied by after all stages of their rotation."""
    return 2.0 ** -len(k8v4.rotation_strides(head_size))


@triton.jit
def rotation_stage(x, STRIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the stage of a stride, among the numbers of axis 1 of three.

    Two sums of two numbers each: in whatever order a sum of two is taken, its bits are the same.
    """
    FOURS: tl.constexpr = x.shape[1] // (4 * STRIDE)
    four = tl.reshape(x, [x.shape[0], FOURS, 2, 2, STRIDE * x.shape[2]])
    total = tl.sum(tl.sum(four, axis=3, keep_dims=True), axis=2, keep_dims=True)
    return tl.reshape(total - 2.0 * four, x.shape)


@triton.jit
def _stages(x, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return all stages of D numbers, along axis 1 of three."""
    if D % 4 == 0:
        x = rotation_stage(x, 1)
    if D % 16 == 0:
        x = rotation_stage(x, 4)
    if D % 64 == 0:
        x = rotation_stage(x, 16)
    if D % 256 == 0:
        x = rotation_stage(x, 64)
    return x


@triton.jit
def turned(x, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return all stages, of rows of values.

    Args:
        x: float32 [rows, dims], 0 from dim D on.
    """
    stages = _stages(tl.reshape(x, [x.shape[0], x.shape[1], 1]), D)
    return tl.reshape(stages, [x.shape[0], x.shape[1]])


@triton.jit
def turned_quarter(x, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the stages of strides 4 and more, of every fourth dim.

    Args:
        x: float32 [dims / 4, rows].
    """
    stages = _stages(tl.reshape(x, [1, x.shape[0], x.shape[1]]), D // 4)
    return tl.reshape(stages, [x.shape[0], x.shape[1]])
