# SPDX-License-Identifier: Apache-2.0
"""The instructions that each lane executes for itself, from registers to registers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from testing.ptx import arithmetic
from testing.ptx.arithmetic import Array

DTYPES: dict[str, Any] = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.uint16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "f16x2": np.uint32, "bf16x2": np.uint32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
}  # fmt: skip
"""The numpy type of a PTX type. Numbers of 16 bits are kept as their bits."""


@dataclass(frozen=True)
class Operation:
    """What an instruction computes.

    Attributes:
        result: PTX type of the result.
        sources: PTX types of the operands.
        function: From arrays of `sources` to an array of `result`; shapes broadcast.
        defined: Returns for which elements of the operands PTX defines the result. Elsewhere,
            `function` may return anything. None if PTX defines all results.
    """

    result: str
    sources: tuple[str, ...]
    function: Callable[..., Array]
    defined: Callable[..., Array] | None = None


OPERATIONS: dict[str, Operation] = {}
"""By opcode. If an opcode has forms with two and with three sources, the latter ends in `/3`."""


def _define(
    opcode: str, types: str, function: Callable[..., Any], defined: Callable[..., Any] | None = None
) -> None:
    result, *sources = types.split()
    OPERATIONS[opcode] = Operation(result, tuple(sources), function, defined)


def _not_zero(_: Array, divisor: Array) -> Array:
    return divisor != 0


def _integers() -> None:
    wrapping: dict[str, Callable[..., Any]] = {
        "add": np.add, "sub": np.subtract, "mul.lo": np.multiply,
    }  # fmt: skip
    for (name, function), bits, sign in itertools.product(
        wrapping.items(), (16, 32, 64), ("s", "u")
    ):
        _define(f"{name}.{sign}{bits}", f"u{bits} u{bits} u{bits}", function)
    for bits, sign in itertools.product((16, 32, 64), ("s", "u")):
        kind = f"{sign}{bits}"
        _define(f"mad.lo.{kind}", f"u{bits} u{bits} u{bits} u{bits}", lambda a, b, c: a * b + c)
        _define(f"min.{kind}", f"{kind} {kind} {kind}", np.minimum)
        _define(f"max.{kind}", f"{kind} {kind} {kind}", np.maximum)
        _define(f"div.{kind}", f"{kind} {kind} {kind}", arithmetic.divided, _not_zero)
        _define(f"rem.{kind}", f"{kind} {kind} {kind}", arithmetic.remainder, _not_zero)
        _define(f"shr.{kind}", f"{kind} {kind} u32", arithmetic.shifted_right)
    _define("min.relu.s32", "s32 s32 s32", arithmetic.minimum_above_zero)
    for bits in (16, 32, 64):
        _define(f"neg.s{bits}", f"u{bits} u{bits}", lambda a: np.subtract(a.dtype.type(0), a))
        _define(f"abs.s{bits}", f"s{bits} s{bits}", np.abs)
        _define(f"shl.b{bits}", f"b{bits} b{bits} u32", arithmetic.shifted_left)
        _define(f"shr.b{bits}", f"b{bits} b{bits} u32", arithmetic.shifted_right)
    for sign in "su":
        narrow, wide = DTYPES[f"{sign}32"], DTYPES[f"{sign}64"]

        def product(a: Array, b: Array, wide: Any = wide) -> Array:
            return a.astype(wide) * b.astype(wide)

        def mad(a: Array, b: Array, c: Array, wide: Any = wide) -> Array:
            return a.astype(wide) * b.astype(wide) + c

        def narrow_product(a: Array, b: Array, narrow: Any = narrow) -> Array:
            return a.astype(narrow) * b.astype(narrow)

        def narrow_mad(a: Array, b: Array, c: Array, narrow: Any = narrow) -> Array:
            return a.astype(narrow) * b.astype(narrow) + c

        _define(f"mul.wide.{sign}16", f"{sign}32 {sign}16 {sign}16", narrow_product)
        _define(f"mul.wide.{sign}32", f"{sign}64 {sign}32 {sign}32", product)
        _define(f"mad.wide.{sign}16", f"{sign}32 {sign}16 {sign}16 {sign}32", narrow_mad)
        _define(f"mad.wide.{sign}32", f"{sign}64 {sign}32 {sign}32 {sign}64", mad)
        for bits in (16, 32, 64):
            kind = f"{sign}{bits}"
            _define(f"mul.hi.{kind}", f"{kind} {kind} {kind}", arithmetic.multiplied_high)
        for kind in (f"{sign}32", f"{sign}64"):
            _define(f"bfe.{kind}", f"{kind} {kind} u32 u32", arithmetic.bit_field)
        _define(f"add.{sign}16x2", "b32 b32 b32", arithmetic.sums_of_halves)


def _bits() -> None:
    logic: dict[str, Callable[..., Any]] = {
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    }  # fmt: skip
    for kind in ("pred", "b16", "b32", "b64"):
        for name, function in logic.items():
            _define(f"{name}.{kind}", f"{kind} {kind} {kind}", function)
        _define(f"not.{kind}", f"{kind} {kind}", np.invert)
    _define("prmt.b32", "b32 b32 b32 u32", arithmetic.permuted)
    for kind in ("b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64", "f32"):
        _define(
            f"selp.{kind}", f"{kind} {kind} {kind} pred", lambda a, b, p: np.where(p, a, b)
        )  # fmt: skip
    for kind in ("b16", "b32", "b64", "u16", "u32", "u64", "s32", "s64", "f32", "pred"):
        _define(f"mov.{kind}", f"{kind} {kind}", lambda a: a)


def _comparisons() -> None:
    functions: dict[str, Callable[..., Any]] = {
        "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
        "gt": np.greater, "ge": np.greater_equal,
    }  # fmt: skip
    for name, function in functions.items():
        kinds = [f"{sign}{bits}" for sign in "su" for bits in (16, 32, 64)]
        if name in ("eq", "ne"):
            kinds += ["b16", "b32", "b64"]
        for kind in kinds:
            _define(f"setp.{name}.{kind}", f"pred {kind} {kind}", function)
    floats: dict[str, Callable[..., Any]] = {
        "num": lambda a, b: (a == a) & (b == b), "nan": lambda a, b: (a != a) | (b != b),
    }  # fmt: skip
    for name, function in functions.items():

        def ordered(a: Array, b: Array, function: Any = function) -> Array:
            return function(a, b) & (a == a) & (b == b)

        def unordered(a: Array, b: Array, function: Any = function) -> Array:
            return function(a, b) | (a != a) | (b != b)

        floats[name] = ordered if name == "ne" else function
        floats[f"{name}u"] = function if name == "ne" else unordered
    widen: dict[str, Callable[[Array], Array]] = {
        "f32": lambda x: x, "f16": arithmetic.from_half, "bf16": arithmetic.from_bfloat,
    }  # fmt: skip
    for (name, function), (kind, wide) in itertools.product(floats.items(), widen.items()):
        _define(
            f"setp.{name}.{kind}", f"pred {kind} {kind}",
            lambda a, b, function=function, wide=wide: function(wide(a), wide(b)),
        )  # fmt: skip


def _with_flushing(name: str, types: str, function: Callable[..., Array]) -> None:
    """Define an instruction on float32 and its form with `.ftz`."""

    def flushing(*operands: Array) -> Array:
        return arithmetic.flushed(function(*map(arithmetic.flushed, operands)))

    head, _, tail = name.rpartition(".")
    _define(name, types, function)
    _define(f"{head}.ftz.{tail}", types, flushing)


def _floats() -> None:
    sums: dict[str, Callable[..., Any]] = {
        "add": np.add, "sub": np.subtract, "mul": np.multiply,
    }  # fmt: skip
    for (name, function), rounding in itertools.product(sums.items(), ("", ".rn")):
        _with_flushing(f"{name}{rounding}.f32", "f32 f32 f32", function)
    _with_flushing("fma.rn.f32", "f32 f32 f32 f32", arithmetic.fma)
    for name, extreme in (("min", arithmetic.minimum), ("max", arithmetic.maximum)):
        _with_flushing(f"{name}.f32", "f32 f32 f32", extreme)
        _define(
            f"{name}.f32/3", "f32 f32 f32 f32",
            lambda a, b, c, extreme=extreme: extreme(extreme(a, b), c),
        )  # fmt: skip
    for name in ("div.rn", "div.full", "div.approx"):
        _with_flushing(f"{name}.f32", "f32 f32 f32", np.divide)
    _with_flushing("ex2.approx.f32", "f32 f32", arithmetic.exp2)
    _with_flushing("abs.f32", "f32 f32", np.abs)
    _with_flushing("neg.f32", "f32 f32", np.negative)
    _define("abs.f16x2", "b32 b32", lambda a: a & np.uint32(0x7FFF7FFF))


def _float_pairs() -> None:
    """Define operations on two float32 numbers in a register, and sums of numbers of two sizes."""
    functions: dict[str, tuple[int, Callable[..., Array]]] = {
        "add": (2, np.add), "sub": (2, np.subtract), "mul": (2, np.multiply),
        "fma.rn": (3, arithmetic.fma),
    }  # fmt: skip
    for name, (count, function) in functions.items():

        def both(*registers: Array, function: Any = function) -> Array:
            shape = np.broadcast_shapes(*(register.shape for register in registers))
            pairs = [np.broadcast_to(x, shape).copy().view(np.float32) for x in registers]
            return function(*pairs).view(np.uint64)

        _define(f"{name}.f32x2", " ".join(["b64"] * (count + 1)), both)
    for kind, wide in (("f16", arithmetic.from_half), ("bf16", arithmetic.from_bfloat)):
        _define(f"add.rn.f32.{kind}", f"f32 {kind} f32", lambda a, c, wide=wide: wide(a) + c)
        _define(f"sub.rn.f32.{kind}", f"f32 {kind} f32", lambda a, c, wide=wide: wide(a) - c)


def _conversions() -> None:
    for source, target in itertools.product(
        [f"{sign}{bits}" for sign in "su" for bits in (8, 16, 32, 64)], repeat=2
    ):
        # 8-bit numbers are in registers of 16 bits.
        held = {kind: kind.replace("8", "16") for kind in (source, target)}

        def resize(a: Array, source: str = source, target: str = target) -> Array:
            kept = a.astype(DTYPES[source]).astype(DTYPES[target])
            return kept.astype(np.int16 if target == "s8" else np.uint16) if "8" in target else kept

        _define(f"cvt.{target}.{source}", f"{held[target]} {held[source]}", resize)
    for sign, bits in itertools.product("su", (8, 16, 32)):
        kind, held_as = f"{sign}{bits}", f"{sign}{max(bits, 16)}"
        dtype = DTYPES[kind]
        _define(
            f"cvt.rn.f32.{kind}", f"f32 {held_as}",
            lambda a, dtype=dtype: a.astype(dtype).astype(np.float32),
        )  # fmt: skip
        for suffix, function in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor)):
            _define(
                f"cvt.{suffix}.{kind}.f32", f"{held_as} f32",
                lambda a, dtype=dtype, function=function, held_as=held_as: arithmetic.to_integer(
                    function(a), dtype
                ).astype(DTYPES[held_as]),
            )  # fmt: skip
    _define("cvt.f32.f16", "f32 f16", arithmetic.from_half)
    _define("cvt.f32.bf16", "f32 bf16", arithmetic.from_bfloat)
    _define("cvt.rn.f16.f32", "f16 f32", arithmetic.to_half)
    _define("cvt.rn.bf16.f32", "bf16 f32", arithmetic.to_bfloat)
    for kind, narrow in (("f16", arithmetic.to_half), ("bf16", arithmetic.to_bfloat)):
        _define(
            f"cvt.rn.{kind}x2.f32", "b32 f32 f32",
            lambda high, low, narrow=narrow: arithmetic.joined(narrow(high), narrow(low)),
        )  # fmt: skip


for _section in (
    _integers,
    _bits,
    _comparisons,
    _floats,
    _float_pairs,
    _conversions,
):
    _section()
