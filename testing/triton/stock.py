# SPDX-License-Identifier: Apache-2.0
"""The installed vLLM's own k8v4 decode kernel, compiled as its launcher does."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from triton.backends.compiler import GPUTarget

from testing.triton import ahead_of_time
from vllm_hybrid_kv.kernels import k8v4

BLOCK_KV = 4
"""Tokens of an iteration, as in `triton_turboquant_decode_attention`."""


def _vllm() -> Path | None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


VLLM = _vllm()
"""Where vLLM is installed."""


def kernel(folder: Path) -> Any:
    """The kernel alone: on a CPU vLLM puts something in Triton's place, which does not compile."""
    assert VLLM is not None
    file = VLLM / "v1" / "attention" / "ops" / "triton_turboquant_decode.py"
    found = re.search(
        r"^@triton\.jit\ndef _tq_decode_stage1\(.*?(?=^# -----)", file.read_text(), re.S | re.M
    )
    assert found is not None, file
    module_file = folder / "stock_decode.py"
    module_file.write_text("import triton\nimport triton.language as tl\n\n\n" + found[0])
    module_spec = importlib.util.spec_from_file_location("stock_decode", module_file)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module._tq_decode_stage1


def compile_decode(
    target: GPUTarget, head_size: int, group: int, page_size: int, folder: Path
) -> Any:
    types = {
        "Q_rot_ptr": "*bf16", "KV_cache_ptr": "*u8", "Block_table_ptr": "*i32",
        "Seq_lens_ptr": "*i32", "Centroids_ptr": "*fp32", "Mid_o_ptr": "*fp32",
        "stride_qb": "i32", "stride_qh": "i32", "stride_cache_block": "i32",
        "stride_cache_pos": "i32", "stride_cache_head": "i32", "stride_bt_b": "i32",
        "stride_mid_b": "i32", "stride_mid_h": "i32", "stride_mid_s": "i32",
    }  # fmt: skip
    constants = {
        "NUM_KV_HEADS": 8, "HEAD_DIM": head_size, "BLOCK_SIZE": page_size, "NUM_KV_SPLITS": 32,
        "KV_GROUP_SIZE": group, "MSE_BITS": 4, "MSE_BYTES": head_size // 2, "KPS": head_size,
        "VQB": 4, "VAL_DATA_BYTES": head_size // 2, "ATTN_SCALE": head_size**-0.5,
        "BLOCK_D": head_size, "BLOCK_KV": BLOCK_KV, "KEY_FP8": 1, "NORM_CORRECTION": 0,
        "FP8_E4B15": int(target.arch < 89),
    }  # fmt: skip
    pointers = {name for name, kind in types.items() if kind.startswith("*")}
    return ahead_of_time.compile_kernel(
        kernel(folder), target, types, constants,
        divisible=pointers | {"stride_qb", "stride_qh", "stride_cache_block"},
        num_warps=1, num_stages=1,
    )  # fmt: skip


def bytes_per_iteration(head_size: int, group: int) -> float:
    """KV bytes of an iteration that no other query head of the group reads as well."""
    return BLOCK_KV * k8v4.slot_bytes(head_size) / group
