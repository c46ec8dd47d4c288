# SPDX-License-Identifier: Apache-2.0
"""Makes functions that numba code calls, and whose body is LLVM code.

Numba cannot keep a block of sums in registers, cannot emit the bf16 instructions, and widens 32-bit
integers to 64 bits. The innermost loops are therefore written in LLVM code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from vllm_hybrid_kv.kernels.cpu.llvm import Emitter

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
    """Return a function that numba code can call, and whose body is the LLVM code of `emit`.

    Args:
        emit: Takes an `Emitter` and the values of the arguments, and returns the result's value.
            The annotations of `emit` are keys of `_NUMBA_TYPES`, as strings. An argument annotated
            `int` must be a constant in the calling code; `emit` gets the constant.
    """
    _, *parameters = inspect.signature(emit).parameters.values()
    annotations = [parameter.annotation for parameter in parameters]
    returns = _NUMBA_TYPES[emit.__annotations__["return"]]

    def declare(context: Any, *arguments: Any) -> Any:
        kinds = [
            argument if annotation == "int" else _NUMBA_TYPES[annotation]
            for annotation, argument in zip(annotations, arguments, strict=True)
        ]
        if any(
            annotation == "int" and not isinstance(kind, types.Literal)
            for annotation, kind in zip(annotations, kinds, strict=True)
        ):
            return None

        def code(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
            values = [
                kind.literal_value if annotation == "int" else value
                for annotation, kind, value in zip(annotations, kinds, values, strict=True)
            ]
            result = emit(Emitter(builder, context), *values)
            return context.get_dummy_value() if result is None else result

        return returns(*kinds), code

    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    declare.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]
    declare.__name__ = emit.__name__
    return intrinsic(prefer_literal="int" in annotations)(declare)
