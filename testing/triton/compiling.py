# SPDX-License-Identifier: Apache-2.0
"""The kernels as launches compile them, for any GPU; run where Triton compiles.

`python -m testing.triton.compiling` prints the figures of decode on each GPU, ours and stock's.
"""

from __future__ import annotations

import importlib.util
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from testing.triton.machine_code import MachineCode, compile_kernel, cuda, read_machine_code
from testing.triton.processes import Compiler
from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.triton.attend import attend_kernel
from vllm_hybrid_kv.kernels.triton.attention import MERGED_AT_A_TIME, merge_kernel
from vllm_hybrid_kv.kernels.triton.convert import KeyDecoder, ValueDecoder
from vllm_hybrid_kv.kernels.triton.plan import (
    ITEMS_PER_PROGRAM,
    MIN_TILES_CAPACITY,
    plan_kernel,
)
from vllm_hybrid_kv.kernels.triton.quantise import NUMBERS_PER_PROGRAM, quantise_and_store_kernel
from vllm_hybrid_kv.kernels.triton.rotation import rotation_unit
from vllm_hybrid_kv.kernels.triton.tuning import MIN_SPLIT_TILES, Tiling, tiling_for

GROUP = 4
PAGE = 16

_TYPES = {
    "q_ptr": "*bf16", "stride_q_tok": "i32", "stride_q_head": "i32",
    "out_ptr": "*bf16", "stride_out_tok": "i32", "stride_out_head": "i32",
    "lse_ptr": "*fp32", "stride_lse_tok": "i32", "stride_lse_head": "i32",
    "cache_ptr": "*u8", "stride_cache_block": "i64",
    "block_table_ptr": "*i32", "stride_block_table": "i32",
    "seq_lens_ptr": "*i32", "query_start_loc_ptr": "*i32", "items_ptr": "*i32",
    "sinks_ptr": "*fp32", "partial_out_ptr": "*fp32", "partial_lse_ptr": "*fp32",
    "scale": "fp32", "window": "i32", "soft_cap": "fp32",
    "k_ptr": "*bf16", "stride_k_tok": "i32", "stride_k_head": "i32",
    "v_ptr": "*bf16", "stride_v_tok": "i32", "stride_v_head": "i32", "slots_ptr": "*i64",
    "num_rows": "i32", "num_slots": "i32",
    "tile_starts_ptr": "*i32", "num_reqs": "i32", "num_tiles": "i32", "num_items": "i32",
    "target": "i32", "steps": "i32", "tile_steps": "i32",
}  # fmt: skip
# Multiples of 16 at every launch. Of the other arguments a launch cannot be sure.
_DIVISIBLE = {name for name, kind in _TYPES.items() if kind.startswith("*")} | {
    f"stride_{tensor}_{dim}" for tensor in ("q", "out", "k", "v") for dim in ("tok", "head")
}


def _compile(kernel: Any, target: GPUTarget, constants: dict[str, Any], **options: int) -> Any:
    divisible = (_DIVISIBLE | _block_stride(kernel)) & set(kernel.arg_names)
    types = {name: kind for name, kind in _TYPES.items() if name in kernel.arg_names}
    return compile_kernel(kernel, target, types, constants, divisible=divisible, **options)


def _block_stride(kernel: Any) -> set[str]:
    """Return the stride between blocks if the kernel's launches specialise it."""
    return {"stride_cache_block"} if kernel is quantise_and_store_kernel else set()


def _native(target: GPUTarget) -> bool:
    return bool(target.backend == "cuda" and target.arch >= 89)


def compile_attention(
    target: GPUTarget, tiling: Tiling, head_size: int, page_size: int, **modes: bool
) -> Any:
    """Compile the attention kernel for bf16 queries as `paged_attention` launches it.

    Args:
        target: The GPU.
        tiling: The tile sizes of a program.
        head_size: D.
        page_size: Tokens of a page.
        modes: CAUSAL (default true), WINDOW, SOFT_CAP, SINKS and LSE (default false).
    """
    nvidia = target.backend == "cuda"
    portable = KeyDecoder.INTEGER_PTX if nvidia else KeyDecoder.PORTABLE
    constants = {
        "GROUP": GROUP, "D": head_size, "PAGE": page_size,
        "DIMS": triton.next_power_of_2(head_size),
        "BLOCK_M": tiling.block_m, "BLOCK_N": tiling.block_n, "LANES": tiling.lanes,
        "PARTIAL_ROWS": tiling.block_m,
        "UNIT": rotation_unit(head_size),
        "KEY_DECODER": int(KeyDecoder.NATIVE_PTX if _native(target) else portable),
        "VALUE_DECODER": int(ValueDecoder.PTX if nvidia else ValueDecoder.PORTABLE),
        "CAUSAL": True, "WINDOW": False, "SOFT_CAP": False, "SINKS": False, "LSE": False,
    }  # fmt: skip
    warps, stages = tiling.num_warps, tiling.num_stages
    return _compile(attend_kernel, target, constants | modes, num_warps=warps, num_stages=stages)


def compile_quantise(target: GPUTarget, head_size: int, num_heads: int) -> Any:
    """Compile the quantising kernel for bf16 as `quantise_and_store` launches it."""
    dims = triton.next_power_of_2(head_size)
    constants = {
        # A launch makes constants of strides of 1.
        "stride_k_dim": 1, "stride_v_dim": 1, "stride_slot": 1,
        "HEADS": num_heads, "D": head_size, "DIMS": dims, "PAGE": PAGE,
        "ROWS": NUMBERS_PER_PROGRAM // dims, "UNIT": rotation_unit(head_size),
        "NATIVE": _native(target),
    }  # fmt: skip
    return _compile(quantise_and_store_kernel, target, constants)


def compile_plan(target: GPUTarget, *, split: bool, one_tile: bool) -> Any:
    """Compile the planning kernel as `plan_attention` launches it."""
    constants = {
        "GROUP": GROUP, "BLOCK_M": 16, "BLOCK_N": 64, "CAUSAL": True, "WINDOW": True,
        "ONE_TILE": one_tile, "SPLIT": split, "MIN_TILES": MIN_SPLIT_TILES,
        "TILES": MIN_TILES_CAPACITY if split else 0, "ITEMS": ITEMS_PER_PROGRAM,
    }  # fmt: skip
    return _compile(plan_kernel, target, constants)


def compile_merge(target: GPUTarget, head_size: int) -> Any:
    """Compile the merging kernel as `paged_attention` launches it."""
    constants = {
        "GROUP": GROUP, "D": head_size, "DIMS": triton.next_power_of_2(head_size),
        "PARTIAL_ROWS": 16, "PARTS": MERGED_AT_A_TIME, "SINKS": True, "LSE": True,
    }  # fmt: skip
    return _compile(merge_kernel, target, constants, num_warps=2)


def vllm_folder() -> Path | None:
    """Return where vLLM is installed, or None."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _stock_decode_kernel(folder: Path) -> Any:
    """Return vLLM's k8v4 decode kernel, copied to a module of its own.

    Its own module cannot be used: on a CPU vLLM replaces Triton by a stub that compiles nothing.
    """
    vllm = vllm_folder()
    assert vllm is not None
    file = vllm / "v1" / "attention" / "ops" / "triton_turboquant_decode.py"
    source = re.search(
        r"^@triton\.jit\ndef _tq_decode_stage1\(.*?(?=^# -----)", file.read_text(), re.S | re.M
    )
    assert source is not None, file
    module_file = folder / "stock_decode.py"
    module_file.write_text("import triton\nimport triton.language as tl\n\n\n" + source[0])
    spec = importlib.util.spec_from_file_location("stock_decode", module_file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module._tq_decode_stage1


STOCK_BLOCK_KV = 4
"""Tokens of an iteration of vLLM's kernel, as in `triton_turboquant_decode_attention`."""


def compile_stock_decode(target: GPUTarget, head_size: int, page_size: int) -> Any:
    """Compile vLLM's k8v4 decode kernel as its launcher does."""
    types = {
        "Q_rot_ptr": "*bf16", "KV_cache_ptr": "*u8", "Block_table_ptr": "*i32",
        "Seq_lens_ptr": "*i32", "Centroids_ptr": "*fp32", "Mid_o_ptr": "*fp32",
        "stride_qb": "i32", "stride_qh": "i32", "stride_cache_block": "i32",
        "stride_cache_pos": "i32", "stride_cache_head": "i32", "stride_bt_b": "i32",
        "stride_mid_b": "i32", "stride_mid_h": "i32", "stride_mid_s": "i32",
    }  # fmt: skip
    constants = {
        "NUM_KV_HEADS": 8, "HEAD_DIM": head_size, "BLOCK_SIZE": page_size, "NUM_KV_SPLITS": 32,
        "KV_GROUP_SIZE": GROUP, "MSE_BITS": 4, "MSE_BYTES": head_size // 2, "KPS": head_size,
        "VQB": 4, "VAL_DATA_BYTES": head_size // 2, "ATTN_SCALE": head_size**-0.5,
        "BLOCK_D": head_size, "BLOCK_KV": STOCK_BLOCK_KV, "KEY_FP8": 1, "NORM_CORRECTION": 0,
        "FP8_E4B15": int(target.arch < 89),
    }  # fmt: skip
    divisible = {name for name, kind in types.items() if kind.startswith("*")}
    divisible |= {"stride_qb", "stride_qh", "stride_cache_block"}
    with tempfile.TemporaryDirectory() as folder:
        return compile_kernel(
            _stock_decode_kernel(Path(folder)), target, types, constants,
            divisible=divisible, num_warps=1, num_stages=1,
        )  # fmt: skip


@dataclass(frozen=True)
class Attention:
    """Compiles the attention kernel for a compute capability, 90 for 9.0."""

    capability: int
    head_size: int
    rows: int = GROUP
    page_size: int = PAGE
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
        target = cuda(self.capability)
        return read_machine_code(
            compile_attention(target, self.tiling, self.head_size, self.page_size, **modes)
        )


@dataclass(frozen=True)
class StockDecode:
    """Compiles stock's decode kernel."""

    capability: int
    head_size: int

    @property
    def bytes_per_iteration(self) -> float:
        """KV bytes of an iteration, divided by the query heads that each read all of them."""
        return STOCK_BLOCK_KV * k8v4.slot_bytes(self.head_size) / GROUP

    def compile(self) -> MachineCode:
        return read_machine_code(compile_stock_decode(cuda(self.capability), self.head_size, PAGE))


@dataclass(frozen=True)
class Quantise:
    """Compiles the quantising kernel."""

    capability: int
    head_size: int

    def compile(self) -> MachineCode:
        return read_machine_code(compile_quantise(cuda(self.capability), self.head_size, 8))


@dataclass(frozen=True)
class AmdAttention:
    """Compiles the attention kernel for one of AMD's GPUs, to assembly."""

    architecture: str
    head_size: int

    def compile(self) -> str:
        target = GPUTarget("hip", self.architecture, 64)
        tiling = tiling_for(GROUP, self.head_size, None)
        return str(compile_attention(target, tiling, self.head_size, PAGE).asm["amdgcn"])


@dataclass(frozen=True)
class SmallKernels:
    """Compiles every variant of the planning kernel, and the merging kernel."""

    target: GPUTarget

    def compile(self) -> None:
        compile_merge(self.target, 96)
        for split in (True, False):
            for one_tile in (True, False):
                compile_plan(self.target, split=split, one_tile=one_tile)


@dataclass(frozen=True)
class Figures:
    """The cost of decode on a GPU.

    Attributes:
        issued_per_byte: Warp instructions of the main loop for a byte of KV cache. A byte counts
            once for all query heads that attend to it.
        registers: Of a thread.
        spills: Instructions that move a register to memory or back.
        shared_bytes: Of a program.
        tensor_core: Tensor-core instructions in the main loop.
        wide: Share of the bytes of the main loop that arrive in 16-byte loads.
    """

    issued_per_byte: float
    registers: int
    spills: int
    shared_bytes: int
    tensor_core: int
    wide: float


def figures(job: Attention | StockDecode, code: MachineCode) -> Figures:
    counts = code.counts(code.main_loop())
    loaded = {size: size * counts[f"load {size}"] for size in (1, 2, 4, 8, 16)}
    return Figures(
        code.issued_per_byte(job.bytes_per_iteration),
        code.registers,
        code.counts()["spill"],
        code.shared_bytes,
        counts["tensor core"],
        loaded[16] / sum(loaded.values()),
    )


def main() -> None:
    compiler = Compiler()
    jobs: list[tuple[str, Attention | StockDecode]] = [
        (name, kernel(capability, head_size))
        for capability in (80, 86, 89, 90, 100, 120)
        for head_size in (128, 256)
        for name, kernel in (("ours", Attention), ("stock", StockDecode))
    ]
    for _, job in jobs:
        compiler.start(job)
    print(
        f"Triton {triton.__version__}\n\n"
        "| compute capability | D | kernel | instructions a byte | registers | spills "
        "| shared bytes | tensor-core instructions | bytes in 16-byte loads |\n" + 9 * "|---" + "|"
    )
    for name, job in jobs:
        cost = figures(job, compiler(job))
        print(
            f"| {job.capability / 10:.1f} | {job.head_size} | {name} | {cost.issued_per_byte:.3f} "
            f"| {cost.registers} | {cost.spills} | {cost.shared_bytes} | {cost.tensor_core} "
            f"| {cost.wide:.0%} |",
            flush=True,
        )
    compiler.close()


if __name__ == "__main__":
    main()
