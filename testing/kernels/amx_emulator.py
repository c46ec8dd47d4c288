# SPDX-License-Identifier: Apache-2.0
"""Run the AMX path on a CPU with only AVX-512 VNNI: every tile instruction calls Python.

`python -m testing.kernels.amx_emulator`. Set `NUMBA_CACHE_DIR` to a temporary directory, because
the compiled code contains an address of this process.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from llvmlite import ir

from testing.kernels.batches import assert_close, attend, expected, make
from testing.kernels.paged_batch import Case
from vllm_hybrid_kv.kernels.cpu import isa, llvm

INSTRUCTIONS = (
    "tilezero",
    "tileloadd64",
    "tilestored64",
    "tdpbsud",
    "tdpbuud",
    "ldtilecfg",
    "tilerelease",
)

CASES = [
    Case(head_size=64, num_heads=4, lengths=(300, 70), queries=(1, 2)),
    Case(head_size=128, num_heads=24, lengths=(300,), queries=(1,)),
    # 96 dims fill one and a half operands. 40 and 21 rows need several tiles of 16 rows.
    Case(head_size=96, num_heads=2, num_kv_heads=1, lengths=(290, 40), queries=(3, 20)),
    Case(head_size=96, num_heads=7, num_kv_heads=1, lengths=(70,), queries=(3,)),
    Case(head_size=512, num_heads=2, num_kv_heads=1, lengths=(40,), dtype=torch.float32),
    Case(head_size=128, lengths=(530,), options={"window": 100, "soft_cap": 5.0}),
    Case(head_size=64, lengths=(90,), options={"scale": -0.1, "causal": False}, queries=(2,)),
    Case(head_size=64, num_heads=2, num_kv_heads=1, lengths=(2900,), queries=(4,)),
]
"""Cases with few rows (weight bytes in one tile or in two), with many, and with divided keys."""

_tiles = [np.zeros((16, 64), np.uint8) for _ in range(8)]
_rows = [16] * 8


def _line(address: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * 64).from_address(address))


@ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)
def _execute(instruction: int, a: int, b: int, c: int) -> None:
    name = INSTRUCTIONS[instruction]
    if name == "ldtilecfg":
        _rows[:] = _line(a)[48:56].tolist()
    elif name == "tilezero":
        _tiles[a][:] = 0
    elif name == "tileloadd64":
        _tiles[a][:] = 0
        for row in range(_rows[a]):
            _tiles[a][row] = _line(b + row * c)
    elif name == "tilestored64":
        for row in range(_rows[a]):
            _line(b + row * c)[:] = _tiles[a][row]
    elif name in ("tdpbsud", "tdpbuud"):
        kind = np.int8 if name == "tdpbsud" else np.uint8
        left = _tiles[b].view(kind).astype(np.int32).reshape(16, 16, 4)
        right = _tiles[c].astype(np.int32).reshape(16, 16, 4)
        products = np.einsum("mki,kni->mn", left, right)
        _tiles[a].view(np.int32)[: _rows[a]] += products[: _rows[a]]


def _emulate_tile_instructions() -> None:
    address = ctypes.cast(_execute, ctypes.c_void_p).value
    original = llvm.Emitter.call

    def call(e: llvm.Emitter, name: str, returns: Any, *arguments: ir.Value) -> ir.Value:
        instruction = name.removeprefix("llvm.x86.")
        if instruction not in INSTRUCTIONS:
            return original(e, name, returns, *arguments)
        values = [llvm.I64(INSTRUCTIONS.index(instruction))]
        for value in arguments:
            is_pointer = isinstance(value.type, ir.PointerType)
            values.append((e.b.ptrtoint if is_pointer else e.b.zext)(value, llvm.I64))
        values += [llvm.I64(0)] * (4 - len(values))
        function = ir.FunctionType(ir.VoidType(), [llvm.I64] * 4)
        return e.b.call(e.b.inttoptr(llvm.I64(address), function.as_pointer()), values)

    llvm.Emitter.call = call  # type: ignore[assignment,method-assign]


def main() -> None:
    torch.set_num_threads(1)  # the thread that holds Python's lock
    isa.available = lambda: isa.ALL  # type: ignore[assignment]
    _emulate_tile_instructions()
    for case in CASES:
        batch = make(case)
        assert_close(attend(batch, isa.AMX), expected(batch))


if __name__ == "__main__":
    main()
