# SPDX-License-Identifier: Apache-2.0
"""The vocabulary for LLVM code: vector types, constants, and an `Emitter` of operations.

A Python loop over an `Emitter` is unrolled code, `Emitter.loop` is a loop of the machine. Addresses
are integers. No operation carries a fast-math flag: each rounds once, and NaN and infinity behave
as IEEE 754 says, which keeps a NaN in its own row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from llvmlite import ir

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()

LANES = 16
"""float32 numbers of a vector. One cache line, and the tokens of a tile."""

LINE = 64
"""Bytes of a cache line."""

Case = TypeVar("Case")


class _BFloat16(ir.types._BaseFloatType):
    """LLVM's `bfloat`, which llvmlite lacks."""

    null = "0.0"
    intrinsic_name = "bf16"

    def __new__(cls) -> Any:
        return object.__new__(cls)

    def __str__(self) -> str:
        return "bfloat"


BF16 = _BFloat16()


def vector(element: ir.Type, lanes: int = LANES) -> ir.VectorType:
    """Return LLVM's type of a vector of `lanes` numbers."""
    return ir.VectorType(element, lanes)


def constant(element: ir.Type, numbers: Sequence[float]) -> ir.Constant:
    """Return a constant vector of the given numbers."""
    return ir.Constant(vector(element, len(numbers)), list(numbers))


def filled(element: ir.Type, number: float, lanes: int = LANES) -> ir.Constant:
    """Return a constant vector with the same number in every lane."""
    return constant(element, [number] * lanes)


ZEROS = filled(F32, 0.0)

# 2^f on [-1/2, 1/2], highest power first. Minimax polynomial of degree 5: largest relative error
# 7.5e-8 before float32 rounding and 2.4e-7 after it.
_EXP2 = (1.3276471e-03, 9.6755415e-03, 5.5507133e-02, 2.4022120e-01, 6.9314697e-01, 1.0000001)


class Emitter:
    """An LLVM builder with the operations that the kernels need.

    Attributes:
        b: The builder, for all other operations.
    """

    def __init__(self, builder: ir.IRBuilder, context: Any) -> None:
        self.b = builder
        triple, _, features = context.codegen().magic_tuple()
        self._converts_halves = not triple.startswith("x86") or "+f16c" in features

    def call(self, name: str, returns: ir.Type, *arguments: ir.Value) -> ir.Value:
        """Call an LLVM intrinsic by its full name."""
        module = self.b.module
        function = module.globals.get(name)
        if function is None:
            signature = ir.FunctionType(returns, [a.type for a in arguments])
            function = ir.Function(module, signature, name)
        return self.b.call(function, arguments)

    def at(self, address: ir.Value, offset: int | ir.Value, scale: int = 1) -> ir.Value:
        """Return `address + offset * scale`, in bytes."""
        if isinstance(offset, int):
            return self.b.add(address, I64(offset * scale)) if offset else address
        return self.b.add(address, self.b.mul(offset, I64(scale)))

    def rows(self, address: ir.Value, stride: ir.Value, count: int) -> list[ir.Value]:
        """Return the addresses of `count` rows, `stride` bytes apart."""
        return [self.b.add(address, self.b.mul(stride, I64(row))) for row in range(count)]

    def load(self, kind: ir.Type, address: ir.Value) -> ir.Value:
        """Load a scalar or a vector from an address of any alignment."""
        return self.b.load(self.b.inttoptr(address, kind.as_pointer()), align=1)

    def store(self, value: ir.Value, address: ir.Value) -> None:
        """Store a scalar or a vector at an address of any alignment."""
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer()), align=1)

    def load_floats(self, address: ir.Value, lanes: int = LANES) -> ir.Value:
        """Load a vector of float32."""
        return self.load(vector(F32, lanes), address)

    def load_line(self, bits: int, address: ir.Value) -> ir.Value:
        """Load a cache line as a vector of integers of so many bits."""
        return self.load(vector(ir.IntType(bits), 8 * LINE // bits), address)

    def shift_right(self, x: ir.Value, bits: int) -> ir.Value:
        """Return an int64 divided by 2^bits, rounded down."""
        return self.b.ashr(x, I64(bits))

    def is_multiple(self, x: ir.Value, power_of_two: int) -> ir.Value:
        """Return whether an int64 is a multiple of a power of two."""
        rest = self.b.and_(x, I64(power_of_two - 1))
        return self.b.icmp_signed("==", rest, I64(0))

    def prefetch(self, address: ir.Value, *, write: bool = False) -> None:
        """Prefetch a cache line. An invalid address does no harm."""
        pointer = self.b.inttoptr(address, I8.as_pointer())
        self.call("llvm.prefetch.p0", ir.VoidType(), pointer, I32(int(write)), I32(3), I32(1))

    def broadcast(self, scalar: ir.Value, lanes: int = LANES) -> ir.Value:
        """Copy a scalar to every lane."""
        undefined = ir.Constant(vector(scalar.type, lanes), ir.Undefined)
        first = self.b.insert_element(undefined, scalar, I32(0))
        return self.b.shuffle_vector(first, undefined, filled(I32, 0, lanes))

    def shuffle(self, x: ir.Value, y: ir.Value, order: Sequence[int]) -> ir.Value:
        """Return the lanes `order` of `x` followed by `y`."""
        return self.b.shuffle_vector(x, y, constant(I32, order))

    def fma(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        """Return `x * y + z`, fused if the machine has the instruction."""
        return self.call(f"llvm.fmuladd.v{x.type.count}f32", x.type, x, y, z)

    def larger(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """Return the larger of two floats in each lane; `y` if either is NaN."""
        return self.b.select(self.b.fcmp_ordered(">", x, y), x, y)

    def smaller(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """Return the smaller of two floats in each lane; `y` if either is NaN."""
        return self.b.select(self.b.fcmp_ordered("<", x, y), x, y)

    def larger_integer(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """Return the larger of two signed integers in each lane."""
        return self.b.select(self.b.icmp_signed(">", x, y), x, y)

    def reduce(self, x: ir.Value, combine: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
        """Combine the lanes of a vector into a scalar, in halves."""
        lanes = x.type.count
        for distance in (8, 4, 2, 1):
            rotated = self.shuffle(x, x, [(lane + distance) % lanes for lane in range(lanes)])
            x = combine(x, rotated)
        return self.b.extract_element(x, I32(0))

    def halves_to_floats(self, bits: ir.Value) -> ir.Value:
        """Convert a vector of fp16 bit patterns to float32.

        On an x86 CPU without F16C with integers, because LLVM would call a library function that
        numba does not link, and the process would end.
        """
        b, lanes = self.b, bits.type.count
        if self._converts_halves:
            return b.fpext(b.bitcast(bits, vector(F16, lanes)), vector(F32, lanes))

        def word(number: int) -> ir.Constant:
            return filled(I32, number, lanes)

        wide = b.zext(bits, vector(I32, lanes))
        magnitude = b.and_(wide, word(0x7FFF))
        sign = b.shl(b.and_(wide, word(0x8000)), word(16))
        shifted = b.shl(magnitude, word(13))
        normal = b.add(shifted, word((127 - 15) << 23))
        special = b.add(shifted, word((255 - 31) << 23))
        # A denormal becomes 2^-14 + itself with exponent 113, and 2^-14 is subtracted again. That
        # is exact and has no float32 denormal in between, which a CPU may be set to flush.
        raised = b.bitcast(b.add(shifted, word(113 << 23)), vector(F32, lanes))
        small = b.bitcast(b.fsub(raised, filled(F32, 2.0**-14, lanes)), vector(I32, lanes))
        finite = b.select(b.icmp_signed("<", magnitude, word(0x0400)), small, normal)
        magnitude = b.select(b.icmp_signed(">=", magnitude, word(0x7C00)), special, finite)
        return b.bitcast(b.or_(magnitude, sign), vector(F32, lanes))

    def bfloat16_to_floats(self, bits: ir.Value) -> ir.Value:
        """Convert a vector of bf16 bit patterns to float32."""
        b, lanes = self.b, bits.type.count
        wide = b.shl(b.zext(bits, vector(I32, lanes)), filled(I32, 16, lanes))
        return b.bitcast(wide, vector(F32, lanes))

    def floats_to_bfloat16(self, x: ir.Value) -> ir.Value:
        """Round a vector of float32 to bf16 bit patterns, half to even.

        With integers, for the same reason as in `halves_to_floats`.
        """
        b, lanes = self.b, x.type.count

        def word(number: int) -> ir.Constant:
            return filled(I32, number, lanes)

        bits = b.bitcast(x, vector(I32, lanes))
        last = b.and_(b.lshr(bits, word(16)), word(1))
        rounded = b.add(b.add(bits, word(0x7FFF)), last)
        # Rounding up the largest payload of a NaN would make it a zero.
        rounded = b.select(b.fcmp_unordered("uno", x, x), word(0x7FC00000), rounded)
        return b.trunc(b.lshr(rounded, word(16)), vector(I16, lanes))

    def exp2(self, x: ir.Value) -> ir.Value:
        """Return 2^x of a vector for x up to 127; 2^-126 below -126, NaN of NaN.

        Adding 1.5 * 2^23 rounds to an integer, which the last bits then hold.
        """
        b = self.b
        low = filled(F32, -126.0)
        x = b.select(b.fcmp_ordered("<", x, low), low, x)
        raised = b.fadd(x, filled(F32, 1.5 * 2.0**23))
        fraction = b.fsub(x, b.fsub(raised, filled(F32, 1.5 * 2.0**23)))
        power = filled(F32, _EXP2[0])
        for coefficient in _EXP2[1:]:
            power = self.fma(power, fraction, filled(F32, coefficient))
        exponent = b.shl(b.bitcast(raised, vector(I32)), filled(I32, 23))
        two_to = b.bitcast(b.add(exponent, filled(I32, 127 << 23)), vector(F32))
        return b.fmul(power, two_to)

    def loop(
        self,
        count: ir.Value,
        carried: Sequence[ir.Value],
        body: Callable[[ir.Value, list[ir.Value]], Sequence[ir.Value] | None],
    ) -> list[ir.Value]:
        """Emit `for i in range(count)`, at least one pass, and return the carried values.

        Args:
            count: Number of passes, int64, at least 1.
            carried: Values before the first pass.
            body: Emits a pass from its index and the carried values, and returns their next values.
        """
        b = self.b
        before = b.block
        head = b.append_basic_block("loop")
        after = b.append_basic_block("done")
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(I64)
        index.add_incoming(I64(0), before)
        phis = []
        for value in carried:
            phi = b.phi(value.type)
            phi.add_incoming(value, before)
            phis.append(phi)
        following = list(body(index, list(phis)) or [])
        step = b.add(index, I64(1))
        index.add_incoming(step, b.block)
        for phi, value in zip(phis, following, strict=True):
            phi.add_incoming(value, b.block)
        b.cbranch(b.icmp_signed("<", step, count), head, after)
        b.position_at_end(after)
        return following

    def choose(
        self,
        cases: Sequence[Case],
        condition: Callable[[Case], ir.Value],
        emit: Callable[[Case], Sequence[ir.Value] | None],
    ) -> list[ir.Value]:
        """Emit `emit(case)` for each case, and branches to the first whose condition holds.

        The last case needs no condition.

        Returns:
            The results of the case that runs.
        """
        b = self.b
        after = b.append_basic_block("chosen")
        results = []
        for case in cases[:-1]:
            this, others = b.append_basic_block("case"), b.append_basic_block("others")
            b.cbranch(condition(case), this, others)
            b.position_at_end(this)
            results.append((emit(case) or (), b.block))
            b.branch(after)
            b.position_at_end(others)
        results.append((emit(cases[-1]) or (), b.block))
        b.branch(after)
        b.position_at_end(after)
        chosen = []
        for i, value in enumerate(results[0][0]):
            chosen.append(b.phi(value.type))
            for values, block in results:
                chosen[-1].add_incoming(values[i], block)
        return chosen

    def choose_number(
        self,
        value: ir.Value,
        numbers: Sequence[int],
        emit: Callable[[int], Sequence[ir.Value] | None],
    ) -> list[ir.Value]:
        """Emit `emit(number)` for the number that equals `value`; the last one otherwise."""
        return self.choose(
            numbers, lambda number: self.b.icmp_signed("==", value, I64(number)), emit
        )
