# SPDX-License-Identifier: Apache-2.0
"""Sixteen float32 numbers as one value inside numba code: the vector step of quantisation.

Each function here emits plain LLVM vector code, with no instruction of any one CPU: LLVM
splits the lanes into whatever registers the machine has. None carries a fast-math flag, so
that every lane rounds as the scalar expression in its docstring does.

Numba's own loops do not get there: it widens 32-bit integers to 64 bits, and its loops over
16-bit floats stay scalar.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16

I8, I16, I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
F32 = ir.FloatType()


def vector(element: ir.Type, lanes: int = LANES) -> ir.VectorType:
    """Return LLVM's type of so many numbers side by side."""
    return ir.VectorType(element, lanes)


class LanesType(types.Type):
    """Numba's type of sixteen numbers side by side."""

    def __init__(self, element: ir.Type, name: str) -> None:
        self.element = element
        super().__init__(name=f"k8v4_lanes_{name}")


FLOATS = LanesType(F32, "float32")
WORDS = LanesType(I32, "int32")
BYTES = LanesType(I8, "int8")


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: LanesType) -> None:
        super().__init__(dmm, fe_type, vector(fe_type.element))


def splat(element: ir.Type, number: float, lanes: int = LANES) -> ir.Constant:
    """Return a constant, the same in every lane."""
    return ir.Constant(vector(element, lanes), [number] * lanes)


def broadcast(b: ir.IRBuilder, scalar: ir.Value, lanes: int = LANES) -> ir.Value:
    """Emit copies of a scalar, sixteen unless told."""
    undefined = ir.Constant(vector(scalar.type, lanes), ir.Undefined)
    first = b.insert_element(undefined, scalar, I32(0))
    return b.shuffle_vector(first, undefined, splat(I32, 0, lanes))


def load_vector(b: ir.IRBuilder, element: ir.Type, lanes: int, address: ir.Value) -> ir.Value:
    """Emit a load from an address of any alignment."""
    return b.load(b.inttoptr(address, vector(element, lanes).as_pointer()), align=1)


def _floats_from_float32(b: ir.IRBuilder, x: ir.Value, lanes: int) -> ir.Value:
    return b.bitcast(x, vector(F32, lanes))


def _floats_from_bfloat16(b: ir.IRBuilder, x: ir.Value, lanes: int) -> ir.Value:
    wide = b.shl(b.zext(x, vector(I32, lanes)), splat(I32, 16, lanes))
    return b.bitcast(wide, vector(F32, lanes))


def _floats_from_float16(b: ir.IRBuilder, x: ir.Value, lanes: int) -> ir.Value:
    """Widen in integers: the machine's own conversion is not there on every CPU."""

    def word(number: int) -> ir.Constant:
        return splat(I32, number, lanes)

    wide = b.zext(x, vector(I32, lanes))
    magnitude = b.and_(wide, word(0x7FFF))
    sign = b.shl(b.and_(wide, word(0x8000)), word(16))
    shifted = b.shl(magnitude, word(13))
    normal = b.add(shifted, word((127 - 15) << 23))
    special = b.add(shifted, word((255 - 31) << 23))
    # A denormal becomes 2^-14 + itself with exponent 113 and loses the 2^-14 again, exactly,
    # and without a float32 denormal on the way, which a CPU may be set to flush.
    raised = b.bitcast(b.add(shifted, word(113 << 23)), vector(F32, lanes))
    small = b.bitcast(b.fsub(raised, splat(F32, 2.0**-14, lanes)), vector(I32, lanes))
    finite = b.select(b.icmp_signed("<", magnitude, word(0x0400)), small, normal)
    bits = b.select(b.icmp_signed(">=", magnitude, word(0x7C00)), special, finite)
    return b.bitcast(b.or_(bits, sign), vector(F32, lanes))


def _loader(
    element: ir.Type, widen: Callable[[ir.IRBuilder, ir.Value, int], ir.Value], what: str
) -> tuple[Any, Any]:
    @intrinsic
    def load(typing_context: Any, address: Any) -> Any:
        def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            return widen(b, load_vector(b, element, LANES, args[0]), LANES)

        return FLOATS(types.intp), emit

    @intrinsic
    def load_half(typing_context: Any, address: Any) -> Any:
        def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            half = widen(b, load_vector(b, element, LANES // 2, args[0]), LANES // 2)
            twice = [*range(LANES // 2), *range(LANES // 2)]
            return b.shuffle_vector(half, half, ir.Constant(vector(I32), twice))

        return FLOATS(types.intp), emit

    load.__doc__ = f"Load sixteen {what} numbers at an address, as float32."
    load_half.__doc__ = f"Load eight {what} numbers at an address, as float32, and repeat them."
    return load, load_half


load_float32, load_half_float32 = _loader(I32, _floats_from_float32, "float32")
load_bfloat16, load_half_bfloat16 = _loader(I16, _floats_from_bfloat16, "bfloat16")
load_float16, load_half_float16 = _loader(I16, _floats_from_float16, "float16")


def _storer(kind: LanesType) -> Any:
    @intrinsic
    def store(typing_context: Any, address: Any, x: Any) -> Any:
        """Store sixteen numbers at an address of any alignment."""

        def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            address, x = args
            b.store(x, b.inttoptr(address, x.type.as_pointer()), align=1)
            return context.get_dummy_value()

        return types.void(types.intp, kind), emit

    return store


store_floats, store_bytes = _storer(FLOATS), _storer(BYTES)


@intrinsic
def no_words(typing_context: Any) -> Any:
    """Return sixteen zeros, what `largest_magnitude` starts from."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return splat(I32, 0)

    return WORDS(), emit


def less(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """Emit the smaller of each two lanes, `y` where `x` is NaN."""
    return b.select(b.fcmp_ordered("<", x, y), x, y)


def more(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """Emit the larger of each two lanes, `y` where `x` is NaN."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def _pairwise(pick: Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value], what: str) -> Any:
    @intrinsic
    def choose(typing_context: Any, x: Any, y: Any) -> Any:
        def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            return pick(b, args[0], args[1])

        return FLOATS(FLOATS, FLOATS), emit

    choose.__doc__ = f"Return the {what} of each pair of lanes; `y` where `x` is NaN."
    return choose


minimum, maximum = _pairwise(less, "smaller"), _pairwise(more, "larger")


@intrinsic
def clamp(typing_context: Any, x: Any, limit: Any) -> Any:
    """Return x within +-limit; a NaN becomes -limit."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        x, limit = args
        return less(b, more(b, x, broadcast(b, b.fneg(limit))), broadcast(b, limit))

    return FLOATS(FLOATS, types.float32), emit


@intrinsic
def same(typing_context: Any, x: Any) -> Any:
    """Return sixteen copies of x."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return broadcast(b, args[0])

    return FLOATS(types.float32), emit


def more_word(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """Emit the larger of each two lanes of signed integers."""
    return b.select(b.icmp_signed(">", x, y), x, y)


@intrinsic(prefer_literal=True)
def stack_bytes(typing_context: Any, count: Any) -> Any:
    """Return the address of `count` bytes on the stack, 64-byte aligned; a literal count.

    An array would be freed after the last line that names it, whoever has its address.
    """

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        room = cgutils.alloca_once(b, ir.ArrayType(I8, count.literal_value))
        room.align = 64
        return b.ptrtoint(room, ir.IntType(64))

    return types.intp(count), emit


def _prefetcher(write: int) -> Any:
    @intrinsic
    def prefetch(typing_context: Any, address: Any) -> Any:
        """Ask for the cache line of an address, which need not be a valid one."""

        def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            pointer = I8.as_pointer()
            kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
            name = "llvm.prefetch.p0"
            function = b.module.globals.get(name) or ir.Function(b.module, kind, name)
            b.call(function, [b.inttoptr(args[0], pointer), I32(write), I32(3), I32(1)])
            return context.get_dummy_value()

        return types.void(types.intp), emit

    return prefetch


prefetch_read, prefetch_write = _prefetcher(0), _prefetcher(1)


@intrinsic
def copy_bytes(typing_context: Any, to: Any, source: Any, count: Any) -> Any:
    """Copy `count` bytes between addresses."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        to, source, count = args
        pointer = I8.as_pointer()
        cgutils.raw_memcpy(b, b.inttoptr(to, pointer), b.inttoptr(source, pointer), count, 1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), emit


def _copier(element: ir.Type) -> Any:
    @intrinsic
    def copy(typing_context: Any, to: Any, source: Any) -> Any:
        """Copy one scalar between addresses of any alignment."""

        def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            pointer = element.as_pointer()
            loaded = b.load(b.inttoptr(args[1], pointer), align=1)
            b.store(loaded, b.inttoptr(args[0], pointer), align=1)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp), emit

    return copy


copy_byte, copy_pair = _copier(I8), _copier(I16)


@intrinsic
def store_half(typing_context: Any, address: Any, bits: Any) -> Any:
    """Store the lower 16 bits of a word at an address of any alignment."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        b.store(b.trunc(args[1], I16), b.inttoptr(args[0], I16.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.intp, types.int64), emit


@intrinsic
def load_slot(typing_context: Any, address: Any) -> Any:
    """Load one int64."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return b.load(b.inttoptr(args[0], ir.IntType(64).as_pointer()), align=1)

    return types.int64(types.intp), emit
