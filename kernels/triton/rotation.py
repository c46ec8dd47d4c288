# SPDX-License-Identifier: Apache-2.0
"""Device functions that rotate by the same additions as `reference.rotation_sums`, bit for bit."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotation_stage(x, RADIX: tl.constexpr, STRIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Apply one stage of the rotation along the second of three axes.

    Four numbers are added as two sums of two, because swapping two addends changes no bits.
    """
    RUNS: tl.constexpr = x.shape[1] // (RADIX * STRIDE)
    if RADIX == 4:
        run = tl.reshape(x, [x.shape[0], RUNS, 2, 2, STRIDE * x.shape[2]])
        total = tl.sum(tl.sum(run, axis=3, keep_dims=True), axis=2, keep_dims=True)
        run = total - 2.0 * run
    else:
        # A pair (a, b) becomes (a + b, a - b). For a - b, the sum is taken with b negated.
        run = tl.reshape(x, [x.shape[0], RUNS, 2, STRIDE * x.shape[2]])
        sign = (1.0 - 2.0 * tl.arange(0, 2).to(tl.float32))[None, None, :, None]
        other = tl.sum(run, axis=2, keep_dims=True)
        signed = run * sign
        run = tl.where(sign > 0, other, tl.sum(signed, axis=2, keep_dims=True))
    return tl.reshape(run, x.shape)


@triton.jit
def _stages(x, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rotate blocks of BLOCK numbers, a power of two up to 512, along the second of three axes."""
    if BLOCK >= 4:
        x = rotation_stage(x, 4, 1)
    if BLOCK >= 16:
        x = rotation_stage(x, 4, 4)
    if BLOCK >= 64:
        x = rotation_stage(x, 4, 16)
    if BLOCK >= 256:
        x = rotation_stage(x, 4, 64)
    if BLOCK == 2:
        x = rotation_stage(x, 2, 1)
    if BLOCK == 8:
        x = rotation_stage(x, 2, 4)
    if BLOCK == 32:
        x = rotation_stage(x, 2, 16)
    if BLOCK == 128:
        x = rotation_stage(x, 2, 64)
    if BLOCK == 512:
        x = rotation_stage(x, 2, 256)
    return x


@triton.jit
def rotated(x, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rotate float32 `x` [rows, dims] without multiplying by the unit. From dim D on, `x` is 0."""
    sums = _stages(tl.reshape(x, [x.shape[0], x.shape[1], 1]), D & -D)
    return tl.reshape(sums, [x.shape[0], x.shape[1]])


@triton.jit
def rotated_quarter(x, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Apply the stages of strides >= 4 to float32 `x` [dims / 4, rows], every fourth dim."""
    sums = _stages(tl.reshape(x, [1, x.shape[0], x.shape[1]]), (D & -D) // 4)
    return tl.reshape(sums, [x.shape[0], x.shape[1]])
