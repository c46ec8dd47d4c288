# SPDX-License-Identifier: Apache-2.0
"""`reference.rotate` as device functions: the same additions, so the bits are the same.

The kernels do the final multiplication by `rotation_unit` themselves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_hybrid_kv.kernels import k8v4


def rotation_unit(head_size: int) -> float:
    """Return the factor that follows all stages of a rotation."""
    return 2.0 ** -len(k8v4.rotation_strides(head_size))


@triton.jit
def rotation_stage(x, STRIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return one stage of the rotation, along axis 1 of three.

    A sum of four is two sums of two: the order of two addends does not change the bits.
    """
    FOURS: tl.constexpr = x.shape[1] // (4 * STRIDE)
    four = tl.reshape(x, [x.shape[0], FOURS, 2, 2, STRIDE * x.shape[2]])
    total = tl.sum(tl.sum(four, axis=3, keep_dims=True), axis=2, keep_dims=True)
    return tl.reshape(total - 2.0 * four, x.shape)


@triton.jit
def _stages(x, D: tl.constexpr):  # type: ignore[no-untyped-def]
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
def rotated(x, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return all stages of float32 `x` [rows, dims], which is 0 from dim D on."""
    stages = _stages(tl.reshape(x, [x.shape[0], x.shape[1], 1]), D)
    return tl.reshape(stages, [x.shape[0], x.shape[1]])


@triton.jit
def rotated_quarter(x, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the stages of strides >= 4 of every fourth dim, float32 `x` [dims / 4, rows]."""
    stages = _stages(tl.reshape(x, [1, x.shape[0], x.shape[1]]), D // 4)
    return tl.reshape(stages, [x.shape[0], x.shape[1]])
