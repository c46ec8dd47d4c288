# SPDX-License-Identifier: Apache-2.0
"""fp16 numbers as bits, rounded in the direction that is asked for, inside numba code."""

from __future__ import annotations

import numba
import numpy as np

from . import codes


@numba.njit
def _cut_to_half(x):  # type: ignore[no-untyped-def]
    """Return |x| rounded towards 0 to fp16, as bits, and 1 if that changed it, else 0."""
    bits = np.int64(codes.float_bits(x)) & 0x7FFFFFFF
    if bits >= 0x38800000:  # 2^-14, the smallest normal fp16 number
        return (bits - 0x38000000) >> 13, np.int64((bits & 0x1FFF) != 0)
    steps = codes.bits_float(np.uint32(bits)) * np.float32(2.0**24)
    whole = np.int64(steps)
    return whole, np.int64(np.float32(whole) != steps)


@numba.njit
def round_down(x):  # type: ignore[no-untyped-def]
    """Return the bits of the largest fp16 number not above x; +0 for both zeros."""
    magnitude, inexact = _cut_to_half(x)
    if x < np.float32(0.0):
        return (magnitude + inexact) | 0x8000
    return magnitude


@numba.njit
def round_up(x):  # type: ignore[no-untyped-def]
    """Return the bits of the smallest fp16 number not below x, for x not negative."""
    magnitude, inexact = _cut_to_half(x)
    return magnitude + inexact


@numba.njit
def widen(bits):  # type: ignore[no-untyped-def]
    """Return a finite fp16 number, given as bits, as float32."""
    magnitude = bits & 0x7FFF
    if magnitude >= 0x400:
        x = codes.bits_float(np.uint32((magnitude << 13) + 0x38000000))
    else:
        x = np.float32(magnitude) * np.float32(2.0**-24)
    return -x if bits & 0x8000 else x
