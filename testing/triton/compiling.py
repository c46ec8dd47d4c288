# SPDX-License-Identifier: Apache-2.0
"""Compile the kernels for any GPU with the same types and constants as their launches.

The process must not have Triton's interpreter switched on.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from testing.triton.machine_code import MachineCode, compile_kernel, cuda, read_machine_code
from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.triton.attend import attend_kernel
from vllm_hybrid_kv.kernels.triton.attention import MERGED_AT_A_TIME, merge_kernel
from vllm_hybrid_kv.kernels.triton.plan import (
    MIN_TILES_CAPACITY,
    TABLE_ROWS,
    plan_kernel,
)
from vllm_hybrid_kv.kernels.triton.prefill import (
    dequantise_kernel,
    merge_piece_kernel,
    round_query_kernel,
)
from vllm_hybrid_kv.kernels.triton.quantise import NUMBERS_PER_PROGRAM, quantise_and_store_kernel
from vllm_hybrid_kv.kernels.triton.tuning import Tiling, tiling_for

GROUP = 4
PAGE = 16

_TYPES = {
    "q_ptr": "*bf16", "stride_q_tok": "i32", "stride_q_head": "i32",
    "out_ptr": "*bf16", "stride_out_tok": "i32", "stride_out_head": "i32",
    "lse_ptr": "*fp32", "stride_lse_tok": "i32", "stride_lse_head": "i32",
    "cache_ptr": "*u8", "stride_cache_block": "i32",
    "block_table_ptr": "*i32", "stride_block_table": "i32",
    "seq_lens_ptr": "*i32", "query_start_loc_ptr": "*i32", "pieces_ptr": "*i32",
    "row_tiles_ptr": "*i32",
    "sinks_ptr": "*bf16", "partial_out_ptr": "*fp32", "partial_lse_ptr": "*fp32",
    "scale": "fp32", "window": "i32", "soft_cap": "fp32",
    "k_ptr": "*bf16", "stride_k_tok": "i32", "stride_k_head": "i32",
    "v_ptr": "*bf16", "stride_v_tok": "i32", "stride_v_head": "i32", "slots_ptr": "*i64",
    "num_rows": "i32", "num_slots": "i32",
    "positions_ptr": "*i32", "num_reqs": "i32", "num_tiles": "i32", "num_programs": "i32",
    "steps": "i32", "tile_steps": "i32",
    "min_query_len": "i32", "max_query_len": "i32", "tiles_per_req": "i32",
    "broken_ptr": "*i32", "units_ptr": "*i32", "num_broken": "i32",
    "part_ptr": "*fp16", "stride_part_tok": "i32", "stride_part_head": "i32",
    "part_lse_ptr": "*fp32", "stride_part_lse_head": "i32", "part_tokens": "i32",
    "acc_ptr": "*fp32", "acc_lse_ptr": "*fp32",
}  # fmt: skip
# These arguments are multiples of 16 at every launch, so Triton specialises on them.
_DIVISIBLE = {name for name, kind in _TYPES.items() if kind.startswith("*")} | {
    f"stride_{tensor}_{dim}" for tensor in ("q", "out", "k", "v", "part") for dim in ("tok", "head")
}


def _compile(
    kernel: Any,
    target: GPUTarget,
    constants: dict[str, Any],
    other_types: Mapping[str, str] | None = None,
    **options: int,
) -> Any:
    # The store kernel specialises on `stride_cache_block`; the attention kernel opts out.
    divisible = _DIVISIBLE | (
        {"stride_cache_block"} if kernel is quantise_and_store_kernel else set()
    )
    all_types = _TYPES | dict(other_types or {})
    types = {name: kind for name, kind in all_types.items() if name in kernel.arg_names}
    divisible &= set(types)
    return compile_kernel(kernel, target, types, constants, divisible=divisible, **options)


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
    constants = {
        "GROUP": GROUP, "D": head_size, "PAGE": page_size,
        "DIMS": triton.next_power_of_2(head_size),
        "BLOCK_M": tiling.block_m, "BLOCK_N": tiling.block_n, "LANES": tiling.lanes,
        "PARTIAL_ROWS": tiling.block_m,
        "UNIT": k8v4.rotation_unit(head_size),
        "VALUE_PTX": nvidia,
        "CAUSAL": True, "WINDOW": False, "SOFT_CAP": False, "SINKS": False, "LSE": False,
    }  # fmt: skip
    warps, stages = tiling.num_warps, tiling.num_stages
    return _compile(attend_kernel, target, constants | modes, num_warps=warps, num_stages=stages)


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

    def compile(self) -> MachineCode:
        modes = {"CAUSAL": self.causal, **dict.fromkeys(self.modes, True)}
        target = cuda(self.capability)
        return read_machine_code(
            compile_attention(target, self.tiling, self.head_size, self.page_size, **modes)
        )


@dataclass(frozen=True)
class Quantise:
    """Compiles the quantising kernel for bf16 as `quantise_and_store` launches it."""

    capability: int
    head_size: int

    def compile(self) -> MachineCode:
        dims, target = triton.next_power_of_2(self.head_size), cuda(self.capability)
        constants = {
            # At a launch Triton makes a constant of each stride that is 1.
            "stride_k_dim": 1, "stride_v_dim": 1, "stride_slot": 1,
            "HEADS": 8, "D": self.head_size, "DIMS": dims, "PAGE": PAGE,
            "ROWS": NUMBERS_PER_PROGRAM // dims, "UNIT": k8v4.rotation_unit(self.head_size),
        }  # fmt: skip
        return read_machine_code(_compile(quantise_and_store_kernel, target, constants))


@dataclass(frozen=True)
class AmdAttention:
    """Compiles the attention kernel to assembly for an AMD GPU, such as "gfx942"."""

    architecture: str
    head_size: int

    def compile(self) -> str:
        target = GPUTarget("hip", self.architecture, 64)
        tiling = tiling_for(GROUP, self.head_size, None)
        return str(compile_attention(target, tiling, self.head_size, PAGE).asm["amdgcn"])


@dataclass(frozen=True)
class SmallKernels:
    """Compiles every variant of the planning kernel, the merging kernel, and long prefills."""

    target: GPUTarget

    def compile(self) -> None:
        merging = {
            "GROUP": GROUP, "D": 96, "DIMS": 128, "PARTIAL_ROWS": 16, "PARTS": MERGED_AT_A_TIME,
            "SINKS": True, "LSE": True,
        }  # fmt: skip
        _compile(merge_kernel, self.target, merging, num_warps=2)
        for split, decodes in itertools.product((True, False), repeat=2):
            planning = {
                "GROUP": GROUP, "BLOCK_M": 16, "BLOCK_N": 64, "CAUSAL": True, "WINDOW": True,
                "DECODES": decodes, "SPLIT": split, "MIN_TILES": Tiling.min_split_tiles,
                "TILES": MIN_TILES_CAPACITY if split else 0, "ROWS": TABLE_ROWS,
            }  # fmt: skip
            _compile(plan_kernel, self.target, planning)
        fp16 = {"out_ptr": "*fp16", "k_ptr": "*fp16", "v_ptr": "*fp16", "part_ptr": "*fp16"}
        dims: dict[str, Any] = {"D": 96, "DIMS": 128}
        rows = {"HEADS": 32, "ROWS": 32, "UNIT": k8v4.rotation_unit(96)}
        _compile(round_query_kernel, self.target, dims | rows, fp16)
        dequantising = dims | {"HEADS": 8, "PAGE": PAGE, "BLOCK_N": 32}
        _compile(dequantise_kernel, self.target, dequantising, fp16)
        for first, last in itertools.product((True, False), repeat=2):
            merging = dims | rows | {
                "GROUP": GROUP, "FIRST": first, "LAST": last, "SINKS": True, "LSE": True,
                "WINDOW": True,
            }  # fmt: skip
            _compile(merge_piece_kernel, self.target, merging, fp16 | {"out_ptr": "*bf16"})
