# SPDX-License-Identifier: Apache-2.0
"""Emit LLVM code: vector types, constants, and an `Emitter` for operations.

A Python loop that calls an `Emitter` emits unrolled code; `Emitter.loop` emits a real loop.
Addresses are integers. No operation has a fast-math flag: each rounds once and treats NaN and
infinity as IEEE 754 says, so a NaN stays in its own row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from llvmlite import ir
from numba.core import cgutils

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()

LANES = 16
"""float32 numbers in a vector. They fill one cache line, and match the 16 tokens of a tile."""

LINE = 64
"""Bytes of a cache line."""

Case = TypeVar("Case")


def vector(element: ir.Type, lanes: int = LANES) -> ir.VectorType:
    """Return the LLVM type of a vector of `lanes` numbers."""
    return ir.VectorType(element, lanes)


def constant(element: ir.Type, numbers: Sequence[float]) -> ir.Constant:
    """Return a constant vector of the given numbers."""
    return ir.Constant(vector(element, len(numbers)), list(numbers))


def filled(element: ir.Type, number: float, lanes: int = LANES) -> ir.Constant:
    """Return a constant vector with the same number in every lane."""
    return constant(element, [number] * lanes)


ZEROS = filled(F32, 0.0)

ROUNDING = 1.5 * 2.0**23
"""Adding this to a float32 rounds it to an integer. The sum's lowest bits are then the integer."""

# 2^f on [-1/2, 1/2], highest power first. Minimax polynomial of degree 5: largest relative error
# 7.5e-8 before float32 rounding and 2.4e-7 after it.
_EXP2 = (1.3276471e-03, 9.6755415e-03, 5.5507133e-02, 2.4022120e-01, 6.9314697e-01, 1.0000001)


class Emitter:
    """Emits the operations that the kernels need, through the LLVM builder `b`."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder

    def call(self, name: str, returns: ir.Type, *arguments: ir.Value) -> ir.Value:
        """Call an LLVM intrinsic by its full name."""
        signature = ir.FunctionType(returns, [argument.type for argument in arguments])
        function = cgutils.get_or_insert_function(self.b.module, signature, name)
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
        """Load a cache line as a vector of integers of `bits` bits."""
        return self.load(vector(ir.IntType(bits), 8 * LINE // bits), address)

    def shift_right(self, x: ir.Value, bits: int) -> ir.Value:
        """Return an int64 divided by 2^bits, rounded down."""
        return self.b.ashr(x, I64(bits))

    def is_multiple(self, x: ir.Value, power_of_two: int) -> ir.Value:
        """Return whether an int64 is a multiple of a power of two."""
        rest = self.b.and_(x, I64(power_of_two - 1))
        return self.b.icmp_signed("==", rest, I64(0))

    def prefetch(self, address: ir.Value, write: int = 0) -> None:
        """Prefetch a cache line into the second-level cache. An invalid address does no harm.

        Prefetching into the first level would occupy its few miss buffers. On an AMD EPYC (Zen 4),
        decode then took 1.2 to 1.35 times as long.
        """
        pointer = self.b.inttoptr(address, I8.as_pointer())
        self.call("llvm.prefetch.p0", ir.VoidType(), pointer, I32(write), I32(2), I32(1))

    def broadcast(self, scalar: ir.Value, lanes: int = LANES) -> ir.Value:
        """Copy a scalar to every lane."""
        undefined = ir.Constant(vector(scalar.type, lanes), ir.Undefined)
        first = self.b.insert_element(undefined, scalar, I32(0))
        return self.b.shuffle_vector(first, undefined, filled(I32, 0, lanes))

    def shuffle(self, x: ir.Value, y: ir.Value, order: Sequence[int]) -> ir.Value:
        """Pick lanes by number. The lanes of `x` are counted first, then those of `y`."""
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

    def reduce(self, x: ir.Value, combine: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
        """Combine all 16 lanes into a scalar, by combining halves four times."""
        lanes = x.type.count
        for distance in (8, 4, 2, 1):
            rotated = self.shuffle(x, x, [(lane + distance) % lanes for lane in range(lanes)])
            x = combine(x, rotated)
        return self.b.extract_element(x, I32(0))

    def halves_to_floats(self, bits: ir.Value) -> ir.Value:
        """Convert a vector of fp16 bits to float32. x86 needs F16C, which AVX2 CPUs have."""
        lanes = bits.type.count
        return self.b.fpext(self.b.bitcast(bits, vector(F16, lanes)), vector(F32, lanes))

    def bfloat16_to_floats(self, bits: ir.Value) -> ir.Value:
        """Convert a vector of bf16 bit patterns to float32."""
        b, lanes = self.b, bits.type.count
        wide = b.shl(b.zext(bits, vector(I32, lanes)), filled(I32, 16, lanes))
        return b.bitcast(wide, vector(F32, lanes))

    def floats_to_bfloat16(self, x: ir.Value) -> ir.Value:
        """Round a vector of float32 to bf16 bit patterns, half to even.

        Uses integer operations. For a conversion without AVX-512 BF16, LLVM would call a library
        function that numba does not link, and the process would crash.
        """
        b, lanes = self.b, x.type.count

        def word(number: int) -> ir.Constant:
            return filled(I32, number, lanes)

        bits = b.bitcast(x, vector(I32, lanes))
        last = b.and_(b.lshr(bits, word(16)), word(1))
        rounded = b.add(b.add(bits, word(0x7FFF)), last)
        # Rounding up would turn a NaN with all bits set into a zero.
        rounded = b.select(b.fcmp_unordered("uno", x, x), word(0x7FC00000), rounded)
        return b.trunc(b.lshr(rounded, word(16)), vector(I16, lanes))

    def exp2(self, x: ir.Value) -> ir.Value:
        """Return 2^x in each lane, for x up to 127. An x below -126 counts as -126."""
        b = self.b
        x = self.larger(filled(F32, -126.0), x)
        raised = b.fadd(x, filled(F32, ROUNDING))
        fraction = b.fsub(x, b.fsub(raised, filled(F32, ROUNDING)))
        power = filled(F32, _EXP2[0])
        for coefficient in _EXP2[1:]:
            power = self.fma(power, fraction, filled(F32, coefficient))
        exponent = b.shl(b.bitcast(raised, vector(I32)), filled(I32, 23))
        two_to = b.bitcast(b.add(exponent, filled(I32, 127 << 23)), vector(F32))
        return b.fmul(power, two_to)

    @contextlib.contextmanager
    def each(self, count: ir.Value) -> Iterator[ir.Value]:
        """Emit a loop around the body of a `with` statement: `count` passes, at least one."""
        b = self.b
        before = b.block
        head, after = b.append_basic_block("loop"), b.append_basic_block("done")
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(I64)
        yield index
        step = b.add(index, I64(1))
        index.add_incoming(I64(0), before)
        index.add_incoming(step, b.block)
        b.cbranch(b.icmp_signed("<", step, count), head, after)
        b.position_at_end(after)

    def loop(
        self,
        count: ir.Value,
        carried: Sequence[ir.Value],
        body: Callable[[ir.Value, list[ir.Value]], Sequence[ir.Value]],
    ) -> list[ir.Value]:
        """Emit a loop like `each` that carries values from one pass to the next.

        `carried` are the values of the first pass. `body(index, values)` emits a pass and returns
        the values for the next one. Returns the values after the last pass.
        """
        before = self.b.block
        with self.each(count) as index:
            phis = [self.b.phi(value.type) for value in carried]
            following = list(body(index, phis))
            for phi, first, value in zip(phis, carried, following, strict=True):
                phi.add_incoming(first, before)
                phi.add_incoming(value, self.b.block)
        return following

    def choose(
        self,
        cases: Sequence[Case],
        condition: Callable[[Case], ir.Value],
        emit: Callable[[Case], Sequence[ir.Value] | None],
    ) -> list[ir.Value]:
        """Emit code for each case with `emit(case)`, and run the first whose condition holds.

        The last case runs if no other does. Returns the results of the case that runs.
        """
        b, (case, *others) = self.b, cases
        if not others:
            return list(emit(case) or ())
        with b.if_else(condition(case)) as (then, otherwise):
            with then:
                results, block = list(emit(case) or ()), b.block
            with otherwise:
                other_results, other_block = self.choose(others, condition, emit), b.block
        phis = [b.phi(result.type) for result in results]
        for phi, result, other in zip(phis, results, other_results, strict=True):
            phi.add_incoming(result, block)
            phi.add_incoming(other, other_block)
        return phis

    def choose_number(
        self,
        value: ir.Value,
        numbers: Sequence[int],
        emit: Callable[[int], Sequence[ir.Value] | None],
        comparison: str = "==",
    ) -> list[ir.Value]:
        """Like `choose`, with a case per number, chosen by comparing `value` with each number."""
        return self.choose(
            numbers, lambda number: self.b.icmp_signed(comparison, value, I64(number)), emit
        )
