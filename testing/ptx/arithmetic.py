# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of PTX on numpy arrays, where numpy's own differs from it.

Approximate instructions (`ex2.approx`, `div.full` and so on) round correctly here. A GPU has larger
errors, which the PTX manual allows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_TIE_BITS = np.uint64((1 << 28) - 1)
_SMALLEST_NORMAL = np.float32(2.0**-126)
_SIGN = np.uint32(0x80000000)
NAN_BITS = {16: 0x7FFF, 32: 0x7FFFFFFF}
"""Bits of the NaN that instructions return, by the size of a number; equal for fp16 and bf16."""


def flushed(x: Array) -> Array:
    """Replace subnormal float32 numbers by zeros of the same sign, as `.ftz` does."""
    small = np.abs(x) < _SMALLEST_NORMAL
    return np.where(small, np.copysign(np.float32(0), x), x) if small.any() else x


def fma(a: Array, b: Array, c: Array) -> Array:
    """Return a * b + c of float32, rounded once.

    The product is exact in float64. The sum is rounded to float64 and then to float32, which gives
    the right result unless the float64 sum looks like a tie. Then the error of that sum decides
    ("round to odd").
    """
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    total = product + addend
    doubtful = (total.view(np.uint64) & _TIE_BITS) == 0
    doubtful |= np.abs(total) < float(_SMALLEST_NORMAL)
    doubtful &= np.isfinite(total)
    if doubtful.any():
        product, addend = (np.broadcast_to(x, total.shape)[doubtful] for x in (product, addend))
        rounded = total[doubtful]
        part = rounded - product
        error = (product - (rounded - part)) + (addend - part)
        bits = rounded.view(np.int64)
        # Toward the error by one unit, if the last bit is even.
        step = np.where((error > 0) == (rounded > 0), 1, -1)
        total[doubtful] = np.where((error != 0) & (bits & 1 == 0), bits + step, bits).view(
            np.float64
        )
    return total.astype(np.float32)


def _extreme(a: Array, b: Array, smaller: bool) -> Array:
    picked = (np.fmin if smaller else np.fmax)(a, b)
    # -0 is smaller than +0. Equal numbers other than zeros have equal bits.
    words = a.view(np.uint32), b.view(np.uint32)
    of_equal = (np.bitwise_or if smaller else np.bitwise_and)(*words)
    bits = np.where(a == b, of_equal, picked.view(np.uint32))
    return np.where(np.isnan(picked), np.uint32(NAN_BITS[32]), bits).view(np.float32)


def minimum(a: Array, b: Array) -> Array:
    """Return the smaller number. If one operand is a NaN, return the other."""
    return _extreme(a, b, smaller=True)


def maximum(a: Array, b: Array) -> Array:
    """Return the larger number. If one operand is a NaN, return the other."""
    return _extreme(a, b, smaller=False)


def exp2(x: Array) -> Array:
    return np.exp2(x.astype(np.float64)).astype(np.float32)


def to_half(x: Array) -> Array:
    """Return float32 numbers as the bits of fp16, rounded to nearest even."""
    bits = x.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(x), np.uint16(NAN_BITS[16]), bits)


def from_half(bits: Array) -> Array:
    return bits.view(np.float16).astype(np.float32)


def to_bfloat(x: Array) -> Array:
    """Return float32 numbers as the bits of bf16, rounded to nearest even."""
    bits = x.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(x), NAN_BITS[16], rounded).astype(np.uint16)


def from_bfloat(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def joined(high: Array, low: Array) -> Array:
    """Return two 16-bit words as one of 32 bits."""
    return (high.astype(np.uint32) << 16) | low


def to_integer(x: Array, kind: Any) -> Array:
    """Convert float32 numbers without a fraction to integers, saturated. A NaN becomes 0."""
    limits = np.iinfo(kind)
    wide = np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=2.0**63, neginf=-(2.0**63))
    return np.clip(wide, limits.min, limits.max).astype(kind)


def divided(a: Array, b: Array) -> Array:
    """Return integer quotients rounded toward zero."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient < 0) & (quotient * safe != a)).astype(a.dtype)
    return quotient


def remainder(a: Array, b: Array) -> Array:
    return a - divided(a, b) * b


def multiplied_high(a: Array, b: Array) -> Array:
    """Return the upper half of products of 16-bit, 32-bit or 64-bit integers."""
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(a.dtype)
    words = [(x.astype(np.uint64) & 0xFFFFFFFF, x.astype(np.uint64) >> 32) for x in (a, b)]
    (a_low, a_high), (b_low, b_high) = words
    middle = a_high * b_low + (a_low * b_low >> 32)
    other = a_low * b_high + (middle & 0xFFFFFFFF)
    high = a_high * b_high + (middle >> 32) + (other >> 32)
    if a.dtype.kind == "i":
        # A negative factor counts 2^64 too much.
        for x, y in ((a, b), (b, a)):
            high = high - np.where(x < 0, y, y.dtype.type(0)).astype(np.uint64)
    return high.astype(a.dtype)


def sums_of_halves(a: Array, b: Array) -> Array:
    """Add the 16-bit halves of uint32 numbers, each modulo 2^16."""
    half = np.uint32(16)
    return ((a >> half) + (b >> half) << half) | (a + b & np.uint32(0xFFFF))


def minimum_above_zero(a: Array, b: Array) -> Array:
    return np.maximum(np.minimum(a, b), a.dtype.type(0))


def shifted_left(a: Array, count: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    result = a << (count & (bits - 1)).astype(a.dtype)
    return np.where(count >= bits, a.dtype.type(0), result)


def shifted_right(a: Array, count: Array) -> Array:
    """Shift right. Signed numbers get copies of the sign. Counts are not taken modulo the width."""
    bits = 8 * a.dtype.itemsize
    if a.dtype.kind == "i":
        return a >> np.minimum(count, bits - 1).astype(a.dtype)
    return np.where(count >= bits, a.dtype.type(0), a >> (count & (bits - 1)).astype(a.dtype))


def bit_field(a: Array, start: Array, length: Array) -> Array:
    """Return the bits of a field: `bfe`. A signed field is extended by its highest bit."""
    bits = 8 * a.dtype.itemsize
    start, length = (x.astype(np.uint64) & np.uint64(0xFF) for x in (start, length))
    one, last = np.uint64(1), np.uint64(bits - 1)
    number = a.view(f"u{bits // 8}").astype(np.uint64)
    field = np.where(start > last, np.uint64(0), number >> np.minimum(start, last))
    # Bits of the result from the end of the field on. numpy does not shift by 64.
    reach = np.minimum(length, np.maximum(last + one, start) - start)
    beyond = np.where(reach > 63, np.uint64(0), ~np.uint64(0) << np.minimum(reach, np.uint64(63)))
    field = field & ~beyond
    if a.dtype.kind == "i":
        highest = number >> np.minimum(np.maximum(start + length, one) - one, last) & one
        field = np.where((length > 0) & (highest == 1), field | beyond, field)
    return field.astype(f"u{bits // 8}").view(a.dtype)


def permuted(a: Array, b: Array, selector: Array) -> Array:
    """Return four bytes selected from the eight of a and b: `prmt` in its default mode."""
    pair = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros(np.broadcast_shapes(pair.shape, selector.shape), np.uint64)
    for byte in range(4):
        nibble = (selector >> (4 * byte)).astype(np.uint64) & np.uint64(15)
        value = (pair >> (8 * (nibble & np.uint64(7)))) & np.uint64(0xFF)
        sign = np.where(value & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        value = np.where(nibble & np.uint64(8), sign, value)
        result |= value << np.uint64(8 * byte)
    return result.astype(np.uint32)
