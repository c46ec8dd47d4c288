# SPDX-License-Identifier: Apache-2.0
"""Let numba code call functions written in LLVM code, such as loads and stores by address.

Numba cannot keep a block of sums in registers, cannot emit the bf16 instructions, and widens 32-bit
integers to 64 bits. The innermost loops are therefore written in LLVM code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from vllm_hybrid_kv.kernels.cpu.llvm import F32, I8, I32, I64, LINE, Emitter

# Annotations of the arguments and results of functions that `inline_llvm` decorates.
Int64: TypeAlias = ir.Value
Float32: TypeAlias = ir.Value
Bool: TypeAlias = ir.Value

_NUMBA_TYPES = {
    "Int64": types.int64,
    "Float32": types.float32,
    "Bool": types.boolean,
    "None": types.void,
}


def inline_llvm(emit: Callable[..., Any]) -> Any:
    """Turn `emit`, which emits LLVM code, into a function that numba code can call.

    `emit` takes an `Emitter` and the values of the arguments, and returns the result's value. Its
    annotations are keys of `_NUMBA_TYPES`, as strings. An argument annotated `int` must be a
    compile-time constant in the caller; `emit` gets it as a Python int.
    """
    _, *parameters = inspect.signature(emit).parameters.values()
    annotations = [parameter.annotation for parameter in parameters]
    returns = _NUMBA_TYPES[emit.__annotations__["return"]]

    def declare(context: Any, *arguments: Any) -> Any:
        kinds = [
            _NUMBA_TYPES.get(annotation, argument)
            for annotation, argument in zip(annotations, arguments, strict=True)
        ]

        def code(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
            values = [
                kind.literal_value if annotation == "int" else value
                for annotation, kind, value in zip(annotations, kinds, values, strict=True)
            ]
            result = emit(Emitter(builder), *values)
            return context.get_dummy_value() if result is None else result

        return returns(*kinds), code

    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    declare.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]
    declare.__name__ = emit.__name__
    return intrinsic(prefer_literal="int" in annotations)(declare)


@inline_llvm
def noinline(e: Emitter) -> None:
    """Prevent inlining of the calling function. Inlining it would only cost compile time."""
    e.b.function.attributes.add("noinline")


@inline_llvm
def stack_bytes(e: Emitter, count: int) -> Int64:
    """Reserve `count` bytes on the stack, 64-byte aligned, and return their address.

    A numba array would be freed after the last line that names it, even if its address is in use.
    """
    room = cgutils.alloca_once(e.b, ir.ArrayType(I8, count))
    room.align = LINE
    return e.b.ptrtoint(room, I64)


@inline_llvm
def fetch_add(e: Emitter, counter: Int64) -> Int64:
    """Add 1 atomically to an int64, and return the value that it had before."""
    pointer = e.b.inttoptr(counter, I64.as_pointer())
    return e.b.atomic_rmw("add", pointer, I64(1), "acq_rel")


@inline_llvm
def load_int64(e: Emitter, address: Int64) -> Int64:
    return e.load(I64, address)


@inline_llvm
def load_int32(e: Emitter, address: Int64) -> Int64:
    return e.b.sext(e.load(I32, address), I64)


@inline_llvm
def load_float32(e: Emitter, address: Int64) -> Float32:
    return e.load(F32, address)


@inline_llvm
def store_float32(e: Emitter, address: Int64, number: Float32) -> None:
    e.store(number, address)


@inline_llvm
def copy_bytes(e: Emitter, to: Int64, source: Int64, count: Int64) -> None:
    pointer = I8.as_pointer()
    to, source = e.b.inttoptr(to, pointer), e.b.inttoptr(source, pointer)
    cgutils.raw_memcpy(e.b, to, source, count, 1)


@inline_llvm
def prefetch(e: Emitter, write: int, address: Int64, count: Int64) -> None:
    """Prefetch the cache lines of `count` bytes, at least one."""
    with e.each(e.shift_right(e.at(count, LINE - 1), 6)) as i:
        e.prefetch(e.at(address, i, LINE), write)
