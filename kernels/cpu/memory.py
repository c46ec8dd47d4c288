# SPDX-License-Identifier: Apache-2.0
"""Loads, stores, copies, prefetches and atomics by address, for numba code."""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

from vllm_hybrid_kv.kernels.cpu import llvm
from vllm_hybrid_kv.kernels.cpu.inline import Float32, Int64, inline_llvm
from vllm_hybrid_kv.kernels.cpu.llvm import Emitter


@inline_llvm
def noinline(e: Emitter) -> None:
    """Keep the calling function from being inlined, which only costs compile time."""
    e.b.function.attributes.add("noinline")


@inline_llvm
def stack_bytes(e: Emitter, count: int) -> Int64:
    """Return the address of `count` bytes on the stack, 64-byte aligned.

    Numba frees an array after the last line that names it, even if its address is still used.
    """
    room = cgutils.alloca_once(e.b, ir.ArrayType(llvm.I8, count))
    room.align = llvm.LINE
    return e.b.ptrtoint(room, llvm.I64)


@inline_llvm
def fetch_add(e: Emitter, counter: Int64) -> Int64:
    """Add 1 to an int64 that threads share, and return its value before."""
    pointer = e.b.inttoptr(counter, llvm.I64.as_pointer())
    return e.b.atomic_rmw("add", pointer, llvm.I64(1), "acq_rel")


@inline_llvm
def load_int64(e: Emitter, address: Int64) -> Int64:
    return e.load(llvm.I64, address)


@inline_llvm
def load_int32(e: Emitter, address: Int64) -> Int64:
    return e.b.sext(e.load(llvm.I32, address), llvm.I64)


@inline_llvm
def load_float32(e: Emitter, address: Int64) -> Float32:
    return e.load(llvm.F32, address)


@inline_llvm
def store_float32(e: Emitter, address: Int64, number: Float32) -> None:
    e.store(number, address)


@inline_llvm
def store_int16(e: Emitter, address: Int64, bits: Int64) -> None:
    """Store the lower 16 bits of an int64."""
    e.store(e.b.trunc(bits, llvm.I16), address)


@inline_llvm
def copy_bytes(e: Emitter, to: Int64, source: Int64, count: Int64) -> None:
    pointer = llvm.I8.as_pointer()
    to, source = e.b.inttoptr(to, pointer), e.b.inttoptr(source, pointer)
    cgutils.raw_memcpy(e.b, to, source, count, 1)


@inline_llvm
def prefetch_read(e: Emitter, address: Int64) -> None:
    e.prefetch(address)


@inline_llvm
def prefetch_write(e: Emitter, address: Int64) -> None:
    e.prefetch(address, write=True)
