# SPDX-License-Identifier: Apache-2.0
"""Kernels to compile for GPUs that are not here; run where Triton compiles."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from triton.backends.compiler import GPUTarget

from testing.triton import stock
from testing.triton.ahead_of_time import (
    MachineCode,
    compile_attention,
    compile_merge,
    compile_plan,
    compile_quantise,
    cuda,
    read_machine_code,
)
from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.triton.tuning import Tiling, tiling_for

GROUP = 4


@dataclass(frozen=True)
class Attention:
    """The attention kernel for a compute capability, 90 for 9.0."""

    capability: int
    head_size: int
    rows: int = GROUP
    page_size: int = 16
    causal: bool = True
    modes: tuple[str, ...] = ()

    @property
    def tiling(self) -> Tiling:
        return tiling_for(self.rows, self.head_size, divmod(self.capability, 10))

    @property
    def bytes_per_iteration(self) -> float:
        return self.tiling.block_n * k8v4.slot_bytes(self.head_size)

    def compile(self) -> MachineCode:
        modes = {"CAUSAL": self.causal, **dict.fromkeys(self.modes, True)}
        compiled = compile_attention(
            cuda(self.capability), self.tiling, self.head_size, GROUP, self.page_size, **modes
        )
        return read_machine_code(compiled)


@dataclass(frozen=True)
class StockDecode:
    """Stock's kernel for decode, likewise."""

    capability: int
    head_size: int

    @property
    def bytes_per_iteration(self) -> float:
        return stock.bytes_per_iteration(self.head_size, GROUP)

    def compile(self) -> MachineCode:
        target = cuda(self.capability)
        with tempfile.TemporaryDirectory() as folder:
            compiled = stock.compile_decode(target, self.head_size, GROUP, 16, Path(folder))
        return read_machine_code(compiled)


@dataclass(frozen=True)
class Quantise:
    """The quantising kernel, likewise."""

    capability: int
    head_size: int

    def compile(self) -> MachineCode:
        return read_machine_code(compile_quantise(cuda(self.capability), self.head_size, 8, 16))


@dataclass(frozen=True)
class AmdAttention:
    """The attention kernel for one of AMD's GPUs; compiled to assembly."""

    architecture: str
    head_size: int

    def compile(self) -> str:
        target = GPUTarget("hip", self.architecture, 64)
        tiling = tiling_for(GROUP, self.head_size, None)
        compiled = compile_attention(target, tiling, self.head_size, GROUP, 16)
        return str(compiled.asm["amdgcn"])


@dataclass(frozen=True)
class SmallKernels:
    """The planning kernel in all its ways, and the merging one; what they become is not read."""

    target: GPUTarget

    def compile(self) -> None:
        compile_merge(self.target, 96)
        for split in (True, False):
            for one_tile in (True, False):
                compile_plan(self.target, split=split, one_tile=one_tile)


@dataclass(frozen=True)
class Figures:
    """What decode takes on a GPU.

    Attributes:
        issued_per_byte: Warp instructions of the main loop for a byte of KV cache, which counts
            once for all query heads that attend to it.
        registers: Of a thread.
        spills: Instructions that move a register to memory or back.
        shared_bytes: Of a program.
        tensor_core: Instructions of tensor cores in the main loop.
        wide: Share of the bytes of the main loop that arrive in loads of 16 bytes.
    """

    issued_per_byte: float
    registers: int
    spills: int
    shared_bytes: int
    tensor_core: int
    wide: float


def figures(job: Attention | StockDecode, code: MachineCode) -> Figures:
    kinds = code.kinds(code.main_loop())
    loaded = {size: size * kinds[f"load {size}"] for size in (1, 2, 4, 8, 16)}
    return Figures(
        code.issued_per_byte(job.bytes_per_iteration),
        code.registers,
        code.kinds()["spill"],
        code.shared_bytes,
        kinds["tensor core"],
        loaded[16] / sum(loaded.values()),
    )
