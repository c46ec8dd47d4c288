# SPDX-License-Identifier: Apache-2.0
"""The record of a call, and the few reads and writes of memory that numba has no word for."""

from __future__ import annotations

import struct
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from vllm_hybrid_kv.kernels.cpu.emit import F32, I32, I64, Emitter

_INTEGERS = (
    "query",
    "query_token_stride",
    "query_head_stride",
    "out",
    "out_token_stride",
    "out_head_stride",
    "number",  # BFLOAT16, FLOAT16 or FLOAT32, of queries and outputs
    "lse",  # 0: not asked for
    "lse_token_stride",
    "lse_head_stride",
    "cache",
    "block_stride",
    "head_bytes",
    "value_offset",
    "scale_offset",
    "zero_offset",
    "tiled",
    "block_table",
    "block_table_stride",
    "sinks",  # float32 [Hq], 0: none
    "num_kv_heads",
    "group",
    "dims",
    "output_stride",  # of a row of float32 dims, a multiple of 64
    "page_size",
    "causal",
    "window",  # 0: none
    "items",  # int64 [num_items, ITEM_COLUMNS]
    "num_items",
    "merges",  # int64 [., MERGE_COLUMNS]
    "partials",
    "counters",  # int64: the next item, then finished parts of each merge and head
)
_NUMBERS = ("scale", "soft_cap")  # soft cap 0: none

CALL = np.dtype(
    [(name, np.int64) for name in _INTEGERS] + [(name, np.float64) for name in _NUMBERS]
)
"""One call of attention: addresses, strides in bytes and sizes. A record, which numba passes by
address: a tuple of thirty numbers would be thirty arguments of every function here."""

CALL_STRUCT = struct.Struct(f"={len(_INTEGERS)}q{len(_NUMBERS)}d")
"""The same record for Python to fill, fields in the same order; numpy's own way is slower."""

_CALL = numba.from_dtype(CALL)


@intrinsic
def keep_apart(context: Any) -> Any:
    """Keep the function that this stands in from being inlined, which only costs compilation."""

    def code(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> Any:
        b.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), code


@intrinsic
def call_at(context: Any, address: Any) -> Any:
    """Return the record of a call from its address."""

    def code(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        return b.inttoptr(values[0], context.get_value_type(_CALL))

    return _CALL(types.int64), code


@intrinsic
def rows_at(context: Any, address: Any) -> Any:
    """Return a pointer to int64 from its address."""

    def code(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        return b.inttoptr(values[0], I64.as_pointer())

    return types.CPointer(types.int64)(types.int64), code


@intrinsic
def take_next(context: Any, counter: Any) -> Any:
    """Add 1 to an int64 shared between threads and return what it was."""

    def code(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        pointer = b.inttoptr(values[0], I64.as_pointer())
        return b.atomic_rmw("add", pointer, I64(1), "acq_rel")

    return types.int64(types.int64), code


@intrinsic
def read_float(context: Any, address: Any) -> Any:
    """Load a float32."""

    def code(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        return Emitter(b).load(F32, values[0])

    return types.float32(types.int64), code


@intrinsic
def write_float(context: Any, address: Any, number: Any) -> Any:
    """Store a float32."""

    def code(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> Any:
        Emitter(b).store(values[1], values[0])
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), code


@intrinsic
def read_index(context: Any, address: Any) -> Any:
    """Load an int32 as int64."""

    def code(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        return b.sext(Emitter(b).load(I32, values[0]), I64)

    return types.int64(types.int64), code
