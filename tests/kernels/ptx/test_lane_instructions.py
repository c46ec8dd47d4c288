# SPDX-License-Identifier: Apache-2.0
"""Each instruction of a lane equals its definition in the PTX manual, written for one number.

Integers are Python's, and floats are exact fractions that are rounded once, so nothing here shares
code with the machine.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from testing.ptx.errors import UndefinedResult
from testing.ptx.operations import DTYPES, OPERATIONS
from tests.kernels.ptx.snippets import each_lane

LANES = 128
INTEGERS = [0, 1, 2, 3, 5, 7, 8, 31, 32, 33, 63, 64, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF]
INTEGERS += [2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
# Zeros, subnormal numbers, neighbours of 1, limits, infinities and NaNs of both signs.
FLOATS = {
    "f32": [0x0, 0x80000000, 0x1, 0x80000001, 0x7FFFFF, 0x800000, 0x3F800000, 0x3F7FFFFF,
            0xBF800001, 0x4B000001, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000,
            0xFFC00001],
    "f16": [0x0, 0x8000, 0x1, 0x8001, 0x3FF, 0x400, 0x3C00, 0x3BFF, 0xBC01, 0x7BFF, 0xFBFF, 0x7C00,
            0xFC00, 0x7E00, 0xFE01],
    "bf16": [0x0, 0x8000, 0x1, 0x80, 0x3F80, 0x3F7F, 0xBF81, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80,
             0x7FC0],
}  # fmt: skip
MANTISSA = {"f32": 23, "f16": 10, "bf16": 7}


def bits_of(kind: str) -> int:
    return 8 * np.dtype(DTYPES[kind]).itemsize


def is_float(kind: str) -> bool:
    return kind in FLOATS


def some_numbers(kind: str, generator: np.random.Generator) -> list[int]:
    """Return the bits of special and random numbers, and for floats of some from 1 to 16."""
    bits = 1 if kind == "pred" else bits_of(kind)
    result = []
    for choice in generator.integers(0, 3, LANES):
        if choice == 0:
            special = FLOATS.get(kind, INTEGERS)
            result.append(special[generator.integers(len(special))] % 2**bits)
        elif choice == 1 and is_float(kind):
            one = {"f32": 0x3F800000, "f16": 0x3C00, "bf16": 0x3F80}[kind]
            result.append(one + int(generator.integers(0, 4 << MANTISSA[kind])))
        else:
            result.append(int(generator.integers(0, 2**bits, dtype=np.uint64)))
    return result


# The expected results are computed with Python's numbers. A Python float holds 16-bit and 32-bit
# floats exactly.


def decoded(bits: int, kind: str) -> Any:
    """Return the number that bits stand for."""
    if kind == "f32":
        return struct.unpack("<f", struct.pack("<I", bits))[0]
    if kind == "f16":
        return struct.unpack("<e", struct.pack("<H", bits))[0]
    if kind == "bf16":
        return decoded(bits << 16, "f32")
    if kind.startswith("s"):
        width = int(kind[1:])
        bits &= 2**width - 1
        return bits - 2**width if bits >> (width - 1) else bits
    if kind == "pred":
        return bool(bits)
    return bits & (2 ** int(kind[1:]) - 1)


FORMATS = {"f32": (23, -126, 127), "f16": (10, -14, 15), "bf16": (7, -126, 127)}


def rounded(value: Any, kind: str) -> float:
    """Round a fraction to the nearest number of a format, ties to even; a float is kept."""
    if isinstance(value, float) and (value == 0 or not math.isfinite(value)):
        return value
    mantissa, smallest, largest = FORMATS[kind]
    value = Fraction(value)
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > size
    step = Fraction(2) ** (max(exponent, smallest) - mantissa)
    result = round(size / step) * step
    number = math.inf if result >= Fraction(2) ** (largest + 1) else float(result)
    return math.copysign(number, value)


def encoded(value: Any, kind: str) -> int:
    """Return the bits of a number of the format. All NaNs have the same bits."""
    if is_float(kind) and math.isnan(value):
        return -1
    if kind == "f32":
        return struct.unpack("<I", struct.pack("<f", value))[0]
    if kind == "f16":
        return struct.unpack("<H", struct.pack("<e", value))[0]
    if kind == "bf16":
        return encoded(value, "f32") >> 16
    return int(value) % 2 ** (1 if kind == "pred" else max(int(kind[1:]), 16))


def exact(function: Callable[..., Any]) -> Callable[..., Any]:
    """Apply +, - and * to fractions; zeros, infinities and NaNs are as in IEEE 754."""

    def apply(*operands: float) -> Any:
        if all(math.isfinite(x) for x in operands):
            result = function(*map(Fraction, operands))
            if result != 0:
                return result
        return function(*operands)

    return apply


def fma(a: Any, b: Any, c: Any) -> Any:
    # Python's float rounds small products to zero, but keeps their sign.
    return a * b + c


def smaller(*operands: float) -> float:
    numbers = [x for x in operands if not math.isnan(x)]
    return min(numbers, key=lambda x: (x, math.copysign(1, x)), default=math.nan)


def larger(*operands: float) -> float:
    return -smaller(*(-x for x in operands))


def quotient(a: float, b: float) -> Any:
    if math.isnan(a) or math.isnan(b) or a == b == 0 or abs(a) == abs(b) == math.inf:
        return math.nan
    sign = math.copysign(1, a) * math.copysign(1, b)
    if b == 0 or math.isinf(a):
        return sign * math.inf
    return sign * 0.0 if a == 0 or math.isinf(b) else Fraction(a) / Fraction(b)


def toward_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def exponential(x: float) -> float:
    return math.inf if x > 1000 else 2.0**x


ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "mul.lo": lambda a, b: a * b, "mul.wide": lambda a, b: a * b,
    "mad.lo": lambda a, b, c: a * b + c, "mad.wide": lambda a, b, c: a * b + c, "fma": fma,
    "div": toward_zero, "rem": lambda a, b: a - toward_zero(a, b) * b,
    "neg": lambda a: -a, "abs": abs,
    "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
    "mov": lambda a: a, "selp": lambda a, b, p: a if p else b,
}  # fmt: skip
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip


def compare(name: str, a: Any, b: Any) -> bool:
    """Compare. `num` and `nan` test for NaNs. With the suffix `u`, a NaN makes comparisons true."""
    if isinstance(a, float):
        nan = math.isnan(a) or math.isnan(b)
        if name in ("num", "nan"):
            return nan == (name == "nan")
        if nan:
            return name.endswith("u")
    return COMPARISONS[name[:2]](a, b)


def bit_field(a: int, start: int, length: int, signed: bool, bits: int) -> int:
    start, length = start & 255, length & 255
    if length == 0:
        return 0
    sign = a >> min(start + length - 1, bits - 1) & 1 if signed else 0
    return sum(
        ((a >> (start + i) & 1) if i < length and start + i < bits else sign) << i
        for i in range(bits)
    )


def permuted(a: int, b: int, selector: int) -> int:
    source = (b << 32 | a).to_bytes(8, "little")
    result = []
    for nibble in (selector >> 4 * i & 15 for i in range(4)):
        byte = source[nibble & 7]
        result.append((255 if byte & 128 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(result), "little")


def shifted(name: str, a: int, count: int, width: int) -> int:
    if name == "shl":
        return a << count if count < width else 0
    return a >> min(count, width)


def flushed(x: Any) -> Any:
    small = isinstance(x, float) and abs(x) < 2.0**-126
    return math.copysign(0.0, x) if small else x


def wanted(opcode: str, kinds: list[str], operands: list[Any]) -> Any:
    """Return the number that an instruction gives, not yet rounded to its type."""
    name, *modifiers = opcode.removesuffix("/3").split(".")
    kind = modifiers[-1]
    if name == "setp":
        return compare(modifiers[0], *operands)
    if name in ("min", "max"):
        if is_float(kind):
            return (smaller if name == "min" else larger)(*operands)
        result = min(operands) if name == "min" else max(operands)
        return max(result, 0) if "relu" in modifiers else result
    if name == "bfe":
        return bit_field(*operands, signed=kind[0] == "s", bits=int(kind[1:]))
    if name == "prmt":
        return permuted(*operands)
    if name in ("shl", "shr"):
        return shifted(name, *operands, width=bits_of(kinds[0]))
    if name == "not":
        return not operands[0] if kind == "pred" else ~operands[0]
    if opcode.startswith("mul.hi"):
        return operands[0] * operands[1] >> int(kind[1:])
    if name == "cvt":
        return converted(operands[0], *modifiers)
    if name == "div" and is_float(kind):
        return quotient(*operands)
    if name == "ex2":
        return exponential(*operands)
    long_name = f"{name}.{modifiers[0]}"
    function = ARITHMETIC[long_name if long_name in ARITHMETIC else name]
    if name in ("add", "sub", "mul", "fma") and isinstance(operands[0], float):
        return exact(function)(*operands)
    return function(*operands)


def converted(x: Any, *modifiers: str) -> Any:
    """Return the number that `cvt` gives; integers lose high bits, or saturate from floats."""
    target, source = modifiers[-2:]
    if is_float(target):
        return x
    if not is_float(source):
        return decoded(x, target)
    if math.isnan(x):
        return 0
    width, signed = int(target[1:]), target[0] == "s"
    low, high = (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if signed else (0, 2**width - 1)
    if not math.isinf(x):
        x = {"rni": round, "rzi": math.trunc, "rmi": math.floor}[modifiers[0]](x)
    return min(max(x, low), high)


NAN = -1


def result_of(opcode: str, result: str, kinds: list[str], operands: list[int]) -> int | None:
    """Return the bits of the result for bits of operands; NAN for any NaN, None if undefined."""
    if opcode.startswith(("mov", "selp")):
        result, kinds = result.replace("f", "b"), [kind.replace("f", "b") for kind in kinds]
    if opcode.startswith("cvt."):
        # The types in its name may be narrower than the registers.
        result, kinds = opcode.split(".")[-2], [opcode.split(".")[-1]]
    numbers = [decoded(x, kind) for x, kind in zip(operands, kinds, strict=True)]
    if re.match(r"(div|rem)\.[su]", opcode) and numbers[1] == 0:
        return None
    flush = flushed if ".ftz" in opcode else lambda x: x
    number = wanted(opcode, kinds, [flush(x) for x in numbers])
    if is_float(result):
        return encoded(flush(rounded(number, result)), result)
    return encoded(number, result)


APPROXIMATE = re.compile(r"(ex2|div\.(approx|full))")


def assert_equal(opcode: str, got: int, result: str, kinds: list[str], operands: list[int]) -> None:
    expected = result_of(opcode, result, kinds, operands)
    if expected is None:
        return
    context = f"{opcode} of {[hex(x) for x in operands]} is {got:#x}, not {expected:#x}"
    if expected == NAN:
        assert math.isnan(decoded(got, result)), context
    else:
        # For these, the expected result is rounded twice, because Python rounds it to float64.
        assert abs(got - expected) <= (1 if APPROXIMATE.match(opcode) else 0), context


PAIR = re.compile(r"(bf16|f16|s16|u16|f32)x2$")


@pytest.mark.parametrize("target", ["s32", "u16", "u64"])
@pytest.mark.parametrize("sign", ["s", "u"])
def test_a_byte_is_converted_from_the_low_bits_of_a_wider_register(sign: str, target: str) -> None:
    opcode, kind = f"cvt.{target}.{sign}8", f"{sign}8"
    registers = np.array(some_numbers("u32", np.random.default_rng(0)), np.uint32)
    got = each_lane(opcode, np.dtype(f"u{int(target[1:]) // 8}"), [registers])
    for register, number in zip(registers.tolist(), got.tolist(), strict=True):
        assert_equal(opcode, number, target, [kind], [register % 256])


TWO_TO_ONE = ("cvt.rn.f16x2.f32", "cvt.rn.bf16x2.f32")


@pytest.mark.parametrize("opcode", [one for one in OPERATIONS if one not in TWO_TO_ONE])
def test_instruction_equals_its_definition(opcode: str) -> None:
    operation = OPERATIONS[opcode]
    generator = np.random.default_rng(len(opcode))
    pair = PAIR.search(opcode)
    kinds = [pair[1]] * len(operation.sources) if pair else list(operation.sources)
    columns = [some_numbers(kind, generator) for kind in kinds]
    if opcode.startswith(("div.s", "div.u", "rem")):
        columns[1] = [x or 1 for x in columns[1]]
    if pair:
        others = [some_numbers(kind, generator) for kind in kinds]
        width = bits_of(pair[1])
        both = [
            [low | high << width for low, high in zip(*column, strict=True)]
            for column in zip(columns, others, strict=True)
        ]
    sources = [
        np.array(column, np.uint64).astype(bool if kind == "pred" else f"u{bits_of(kind) // 8}")
        for column, kind in zip(both if pair else columns, operation.sources, strict=True)
    ]
    result = np.dtype(bool if operation.result == "pred" else f"u{bits_of(operation.result) // 8}")
    got = each_lane(opcode.removesuffix("/3"), result, sources)
    for lane, number in enumerate(got.tolist()):
        operands = [column[lane] for column in columns]
        if pair:
            assert_equal(opcode[:-2], number % 2**width, pair[1], kinds, operands)
            operands = [column[lane] for column in others]
            assert_equal(opcode[:-2], number >> width, pair[1], kinds, operands)
        else:
            assert_equal(opcode, int(number), operation.result, kinds, operands)


@pytest.mark.parametrize("opcode", TWO_TO_ONE)
def test_two_floats_become_the_halves_of_a_register(opcode: str) -> None:
    kind = opcode.split(".")[2].removesuffix("x2")
    generator = np.random.default_rng(0)
    high, low = (some_numbers("f32", generator) for _ in range(2))
    sources = [np.array(column, np.uint32) for column in (high, low)]
    got = each_lane(opcode, np.dtype(np.uint32), sources)
    for register, *operands in zip(got.tolist(), low, high, strict=True):
        for half, operand in enumerate(operands):
            part = register >> 16 * half & 0xFFFF
            assert_equal(f"cvt.rn.{kind}.f32", part, kind, ["f32"], [operand])


def test_fused_products_round_once() -> None:
    """The sums are so close to the middle of two float32 numbers that float64 rounds them to it."""
    a = np.float32([1 + 2.0**-12, 1 + 2.0**-12, 1, 2.0**-75] * 8).view(np.uint32)
    b = np.float32([1 + 2.0**-12, -(1 + 2.0**-12), 1, 2.0**-75] * 8).view(np.uint32)
    c = np.float32([2.0**-60, -(2.0**-60), 2.0**-24, 2.0**-149] * 8).view(np.uint32)
    got = each_lane("fma.rn.f32", np.dtype(np.uint32), [a, b, c])
    for lane, bits in enumerate(got.tolist()):
        operands = [int(x[lane]) for x in (a, b, c)]
        assert_equal("fma.rn.f32", bits, "f32", ["f32"] * 3, operands)


@pytest.mark.parametrize("opcode", ["div.s32", "rem.u64"])
def test_division_by_zero_is_undefined(opcode: str) -> None:
    dtype = np.dtype(f"u{int(opcode[-2:]) // 8}")
    divisors = np.ones(32, dtype)
    divisors[5] = 0
    with pytest.raises(UndefinedResult, match=opcode):
        each_lane(opcode, dtype, [np.ones(32, dtype), divisors])
