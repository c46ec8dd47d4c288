# SPDX-License-Identifier: Apache-2.0
"""A small vocabulary for emitting LLVM vector code from numba intrinsics.

Numba's own loops cannot hold a block of sums in registers, nor name the bf16 instructions.
The kernels' innermost loops are therefore written with an `Emitter`: Python loops over it are
unrolled code, `Emitter.loop` is a loop of the machine. Addresses are integers, as data pointers
are in Python. No operation carries a fast-math flag: NaN and infinity behave as IEEE 754 says,
which keeps a NaN in its own row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()

LANES = 16
"""float32 numbers of a vector; a cache line, and the tokens of a tile."""


class _BFloat16(ir.types._BaseFloatType):
    """LLVM's `bfloat`, which llvmlite has no name for."""

    null = "0.0"
    intrinsic_name = "bf16"

    def __new__(cls) -> Any:
        return object.__new__(cls)

    def __str__(self) -> str:
        return "bfloat"


BF16 = _BFloat16()

# 2^f on [-1/2, 1/2], highest power first: least largest relative error of degree 5, 7.5e-8
# before float32 rounding and 2.4e-7 with it.
_EXP2 = (
    1.3276471e-03,
    9.6755415e-03,
    5.5507133e-02,
    2.4022120e-01,
    6.9314697e-01,
    1.0000001,
)


def vector(element: ir.Type, lanes: int = LANES) -> ir.VectorType:
    """Return LLVM's type of `lanes` numbers side by side."""
    return ir.VectorType(element, lanes)


def constant(element: ir.Type, numbers: Sequence[float]) -> ir.Constant:
    """Return a vector of given numbers."""
    return ir.Constant(vector(element, len(numbers)), list(numbers))


def every(element: ir.Type, number: float, lanes: int = LANES) -> ir.Constant:
    """Return a vector of one number."""
    return constant(element, [number] * lanes)


NOTHING = every(F32, 0.0)


class Emitter:
    """LLVM's builder with the words that the kernels need.

    Attributes:
        b: The builder, for whatever has no word here.
    """

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder

    def call(self, name: str, returns: ir.Type, *arguments: ir.Value) -> ir.Value:
        """Call an LLVM intrinsic by its full name."""
        module = self.b.module
        function = module.globals.get(name)
        if function is None:
            kind = ir.FunctionType(returns, [a.type for a in arguments])
            function = ir.Function(module, kind, name)
        return self.b.call(function, arguments)

    def at(self, address: ir.Value, offset: int | ir.Value, scale: int = 1) -> ir.Value:
        """Return `address + offset * scale`, in bytes."""
        if isinstance(offset, int):
            return self.b.add(address, I64(offset * scale)) if offset else address
        return self.b.add(address, self.b.mul(offset, I64(scale)))

    def load(self, kind: ir.Type, address: ir.Value) -> ir.Value:
        """Load a scalar or a vector from an address of any alignment."""
        return self.b.load(self.b.inttoptr(address, kind.as_pointer()), align=1)

    def store(self, value: ir.Value, address: ir.Value) -> None:
        """Store a scalar or a vector at an address of any alignment."""
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer()), align=1)

    def prefetch(self, address: ir.Value) -> None:
        """Ask for a cache line; any address will do, no fault comes of it."""
        pointer = self.b.inttoptr(address, I8.as_pointer())
        self.call("llvm.prefetch.p0", ir.VoidType(), pointer, I32(0), I32(3), I32(1))

    def splat(self, scalar: ir.Value, lanes: int = LANES) -> ir.Value:
        """Repeat a scalar in every lane."""
        undefined = ir.Constant(vector(scalar.type, lanes), ir.Undefined)
        first = self.b.insert_element(undefined, scalar, I32(0))
        return self.b.shuffle_vector(first, undefined, every(I32, 0, lanes))

    def fma(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        """Return `x * y + z`, fused where the machine can."""
        return self.call(f"llvm.fmuladd.v{x.type.count}f32", x.type, x, y, z)

    def larger(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """Return the larger of two, `y` where either is NaN."""
        return self.b.select(self.b.fcmp_ordered(">", x, y), x, y)

    def reduce(self, x: ir.Value, combine: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
        """Combine the lanes of a vector into a scalar, in halves."""
        lanes = x.type.count
        for distance in (8, 4, 2, 1):
            turned = [(lane + distance) % lanes for lane in range(lanes)]
            x = combine(x, self.b.shuffle_vector(x, x, constant(I32, turned)))
        return self.b.extract_element(x, I32(0))

    def halves_to_floats(self, bits: ir.Value) -> ir.Value:
        """Widen a vector of fp16 bit patterns to float32."""
        lanes = bits.type.count
        return self.b.fpext(self.b.bitcast(bits, vector(F16, lanes)), vector(F32, lanes))

    def floats_to_bfloat16(self, x: ir.Value) -> ir.Value:
        """Round a vector of float32 to the nearest bf16 bit patterns, to even ones at half way.

        In integers: where the machine has no such instruction LLVM calls a library that numba's
        code is not linked with, and ends the process.
        """
        b, lanes = self.b, x.type.count

        def word(number: int) -> ir.Constant:
            return every(I32, number, lanes)

        bits = b.bitcast(x, vector(I32, lanes))
        last = b.and_(b.lshr(bits, word(16)), word(1))
        rounded = b.add(b.add(bits, word(0x7FFF)), last)
        # Rounding up the largest payload of a NaN would make it a zero.
        rounded = b.select(b.fcmp_unordered("uno", x, x), word(0x7FC00000), rounded)
        return b.trunc(b.lshr(rounded, word(16)), vector(I16, lanes))

    def exp2(self, x: ir.Value) -> ir.Value:
        """Return 2^x of a vector; 2^-126 below -126, NaN of NaN. For x up to 127.

        The addition of 1.5 * 2^23 rounds to an integer, which stands in the last bits.
        """
        b = self.b
        low = every(F32, -126.0)
        x = b.select(b.fcmp_ordered("<", x, low), low, x)
        raised = b.fadd(x, every(F32, 1.5 * 2.0**23))
        fraction = b.fsub(x, b.fsub(raised, every(F32, 1.5 * 2.0**23)))
        power = every(F32, _EXP2[0])
        for coefficient in _EXP2[1:]:
            power = self.fma(power, fraction, every(F32, coefficient))
        exponent = b.shl(b.bitcast(raised, vector(I32)), every(I32, 23))
        two_to = b.bitcast(b.add(exponent, every(I32, 127 << 23)), vector(F32))
        return b.fmul(power, two_to)

    def loop(
        self,
        count: ir.Value,
        carried: Sequence[ir.Value],
        body: Callable[[ir.Value, list[ir.Value]], Sequence[ir.Value]],
    ) -> list[ir.Value]:
        """Emit `for i in range(count)`, at least once, and return the carried values.

        Args:
            count: Number of passes, int64, at least 1.
            carried: Values before the first pass.
            body: Emits a pass from its index and the carried values, and returns their next.
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
        following = list(body(index, list(phis)))
        step = b.add(index, I64(1))
        index.add_incoming(step, b.block)
        for phi, value in zip(phis, following, strict=True):
            phi.add_incoming(value, b.block)
        b.cbranch(b.icmp_signed("<", step, count), head, after)
        b.position_at_end(after)
        return following


def procedure(emit: Callable[..., None], arguments: int) -> tuple[Any, Any]:
    """Return what a numba intrinsic returns for a procedure of int64 arguments.

    Args:
        emit: Called with an `Emitter` and the arguments' values.
        arguments: Number of arguments.
    """

    def code(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        emit(Emitter(builder), *values)
        return context.get_dummy_value()

    return types.void(*[types.int64] * arguments), code
