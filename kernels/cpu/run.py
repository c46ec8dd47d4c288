# SPDX-License-Identifier: Apache-2.0
"""Run compiled code, given by its address, on every thread of numba's pool."""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from vllm_hybrid_kv.kernels.cpu.compile_cache import cached
from vllm_hybrid_kv.kernels.cpu.emit import I64


@intrinsic
def _call(context: Any, code: Any, first: Any, second: Any) -> Any:
    """Call a C function of two int64 by its address."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> Any:
        code, *arguments = values
        kind = ir.FunctionType(ir.VoidType(), [I64, I64])
        b.call(b.inttoptr(code, kind.as_pointer()), arguments)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), emit


@cached(parallel=True)
def run_on_threads(code, call, scratch):  # type: ignore[no-untyped-def]
    """Call `code(call, own scratch)` once for each row of uint8 [threads, bytes] scratch."""
    for thread in numba.prange(scratch.shape[0]):
        own = (scratch[thread].ctypes.data + 63) // 64 * 64
        _call(code, call, own)
