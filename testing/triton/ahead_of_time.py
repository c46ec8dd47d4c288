# SPDX-License-Identifier: Apache-2.0
"""Compile kernels for GPUs that are not there, and read the machine code.

Triton brings `ptxas`, `cuobjdump` and `nvdisasm`, so that registers, spills, the width of every
load and the instructions of the main loop are known without a GPU. How fast a kernel runs is not;
but a loop that needs more instructions a byte than a GPU can issue in the time in which its memory
delivers the byte will not reach the memory's bandwidth.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_hybrid_kv.kernels.triton.convert import KeyWords, ValueWords
from vllm_hybrid_kv.kernels.triton.rotation import rotation_unit
from vllm_hybrid_kv.kernels.triton.tuning import MIN_SPLIT_TILES, Tiling

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def missing_tools() -> str | None:
    """Return why machine code cannot be read here, or None if it can."""
    for tool in ("ptxas", "cuobjdump", "nvdisasm"):
        if not (_TOOLS / tool).exists():
            return f"this Triton ({triton.__version__}) comes without {tool}"
    return None


def cuda(capability: int) -> GPUTarget:
    """Return the target of a compute capability, 90 for 9.0."""
    return GPUTarget("cuda", capability, 32)


def compile_kernel(
    kernel: Any,
    target: GPUTarget,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    divisible: Iterable[str] = (),
    num_warps: int = 4,
    num_stages: int = 3,
) -> Any:
    """Compile a kernel for a target as a launch with such arguments would.

    Args:
        kernel: What `triton.jit` returned, where Triton does not interpret.
        target: The GPU.
        types: Triton's names of the types of the arguments, `*u8` or `i32`.
        constants: Values of the others.
        divisible: Arguments that are multiples of 16, pointers included, which a launch finds
            out for itself. Without it no load is wider than one element.
        num_warps: As at the launch.
        num_stages: As at the launch.
    """
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    given = {name: constants[name] for name in names if signature[name] == "constexpr"}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in sorted(divisible)}
    source = ASTSource(kernel, signature, given, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=target, options=options)


_ATTENTION_TYPES = {
    "query": "*bf16", "query_token": "i32", "query_head": "i32",
    "out": "*bf16", "out_token": "i32", "out_head": "i32",
    "lse": "*fp32", "lse_token": "i32", "lse_head": "i32",
    "cache": "*u8", "page_stride": "i64",
    "block_table": "*i32", "block_table_row": "i32",
    "seq_lens": "*i32", "query_start_loc": "*i32", "items": "*i32", "sinks": "*fp32",
    "partial_out": "*fp32", "partial_lse": "*fp32",
    "scale": "fp32", "window": "i32", "soft_cap": "fp32",
}  # fmt: skip
# What may be any number, and so must not be taken for a multiple of 16.
_ANY_NUMBER = {
    "lse_token", "lse_head", "page_stride", "block_table_row", "scale", "window", "soft_cap",
    "num_rows", "num_slots", "slot_stride", "key_dim", "value_dim",
}  # fmt: skip


def fastest_key_words(target: GPUTarget) -> KeyWords:
    """Return the way of widening keys that a target takes."""
    if target.backend != "cuda":
        return KeyWords.PORTABLE
    return KeyWords.NATIVE_PTX if target.arch >= 89 else KeyWords.INTEGER_PTX


def compile_attention(
    target: GPUTarget, tiling: Tiling, head_size: int, group: int, page_size: int, **modes: bool
) -> Any:
    """Compile the attention kernel for bf16 queries as `paged_attention` launches it.

    Args:
        target: The GPU.
        tiling: The size of a program.
        head_size: D.
        group: Query heads of a KV head.
        page_size: Tokens of a page.
        modes: CAUSAL (true if not given), WINDOW, SOFT_CAP, SINKS and LSE (false).
    """
    from vllm_hybrid_kv.kernels.triton.attend import attend_kernel

    constants = {
        "GROUP": group, "D": head_size, "PAGE": page_size,
        "DIMS": triton.next_power_of_2(head_size),
        "BLOCK_M": tiling.block_m, "BLOCK_N": tiling.block_n, "LANES": tiling.lanes,
        "PARTIAL_ROWS": tiling.block_m,
        "UNIT": rotation_unit(head_size),
        "KEY_WAY": int(fastest_key_words(target)),
        "VALUE_WAY": int(ValueWords.PTX if target.backend == "cuda" else ValueWords.PORTABLE),
        "CAUSAL": True, "WINDOW": False, "SOFT_CAP": False, "SINKS": False, "LSE": False,
    }  # fmt: skip
    return compile_kernel(
        attend_kernel, target, _ATTENTION_TYPES, constants | modes,
        divisible=set(_ATTENTION_TYPES) - _ANY_NUMBER,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip


def compile_quantise(target: GPUTarget, head_size: int, num_heads: int, page_size: int) -> Any:
    """Compile the quantising kernel for bf16 as `quantise_and_store` launches it.

    Args:
        target: The GPU.
        head_size: D.
        num_heads: H.
        page_size: Tokens of a page.
    """
    from vllm_hybrid_kv.kernels.triton.quantise import (
        NUMBERS_PER_PROGRAM,
        quantise_and_store_kernel,
    )

    types = {
        "key": "*bf16", "key_token": "i32", "key_head": "i32",
        "value": "*bf16", "value_token": "i32", "value_head": "i32",
        "cache": "*u8", "cache_block": "i64", "slots": "*i64",
        "num_rows": "i32", "num_slots": "i32",
    }  # fmt: skip
    dims = triton.next_power_of_2(head_size)
    constants = {
        # A launch makes constants of strides of 1.
        "key_dim": 1, "value_dim": 1, "slot_stride": 1,
        "HEADS": num_heads, "D": head_size, "DIMS": dims, "PAGE": page_size,
        "ROWS": NUMBERS_PER_PROGRAM // dims,
        "UNIT": rotation_unit(head_size),
        "NATIVE": target.backend == "cuda" and target.arch >= 89,
    }  # fmt: skip
    return compile_kernel(
        quantise_and_store_kernel, target, types, constants, divisible=set(types) - _ANY_NUMBER
    )  # fmt: skip


def compile_plan(target: GPUTarget, *, split: bool, one_tile: bool) -> Any:
    """Compile the planning kernel as `plan_attention` launches it.

    Args:
        target: The GPU.
        split: SPLIT.
        one_tile: ONE_TILE.
    """
    from vllm_hybrid_kv.kernels.triton.plan import FEWEST_TILES, ITEMS_AT_A_TIME, plan_kernel

    pointers = dict.fromkeys(("query_start_loc", "seq_lens", "items", "tiles_start"), "*i32")
    numbers = ("requests", "num_tiles", "steps", "tile_steps", "num_items", "target", "window")
    types = pointers | dict.fromkeys(numbers, "i32")
    constants = {
        "GROUP": 4, "BLOCK_M": 16, "BLOCK_N": 64, "CAUSAL": True, "WINDOW": True,
        "ONE_TILE": one_tile, "SPLIT": split, "MIN_TILES": MIN_SPLIT_TILES,
        "TILES": FEWEST_TILES if split else 0, "ITEMS": ITEMS_AT_A_TIME,
    }  # fmt: skip
    return compile_kernel(plan_kernel, target, types, constants, divisible=pointers)


def compile_merge(target: GPUTarget, head_size: int) -> Any:
    """Compile the merging kernel as `paged_attention` launches it.

    Args:
        target: The GPU.
        head_size: D.
    """
    from vllm_hybrid_kv.kernels.triton.attention import MERGED_AT_A_TIME
    from vllm_hybrid_kv.kernels.triton.merge import merge_kernel

    names = (
        "out", "out_token", "out_head", "lse", "lse_token", "lse_head", "query_start_loc",
        "items", "sinks", "partial_out", "partial_lse",
    )  # fmt: skip
    types = {name: _ATTENTION_TYPES[name] for name in names}
    constants = {
        "GROUP": 4, "D": head_size, "DIMS": triton.next_power_of_2(head_size), "PARTIAL_ROWS": 16,
        "PARTS": MERGED_AT_A_TIME, "SINKS": True, "LSE": True,
    }  # fmt: skip
    divisible = set(types) - _ANY_NUMBER
    return compile_kernel(
        merge_kernel, target, types, constants, divisible=divisible, num_warps=2
    )  # fmt: skip


_CLASSES = (
    ("tensor core", re.compile(r"[HIQU]?[A-Z]*MMA\b")),
    ("load 16", re.compile(r"(LDG|LDGSTS)\b.*\.128")),
    ("load 8", re.compile(r"(LDG|LDGSTS)\b.*\.64")),
    ("load 2", re.compile(r"LDG\b.*\.[US]16")),
    ("load 1", re.compile(r"LDG\b.*\.[US]8")),
    ("load 4", re.compile(r"(LDG|LDGSTS)\b")),
    ("store 16", re.compile(r"STG\b.*\.128")),
    ("store other", re.compile(r"STG\b")),
    ("spill", re.compile(r"(LDL|STL)\b")),
    ("shuffle", re.compile(r"(SHFL|REDUX)\b")),
    ("barrier", re.compile(r"BAR\b")),
    ("shared", re.compile(r"(LDS|STS|LDSM|STSM)\b")),
)


def kind_of(operation: str) -> str:
    """Return what an operation of NVIDIA's machine code does, as far as it is counted."""
    if operation.startswith(("FFMA", "DFMA")) or "IMMA" in operation:
        return "other"
    for name, pattern in _CLASSES:
        if pattern.match(operation):
            return name
    return "other"


@dataclass(frozen=True)
class MachineCode:
    """What a compiled kernel takes.

    Attributes:
        registers: Of a thread.
        stack_bytes: Of a thread.
        spill_bytes: Of a thread, in local memory.
        shared_bytes: Of a program; what is asked for at the launch.
        operations: Names of the instructions, predicates left out.
        loops: First and last instruction of each loop.
        num_warps: Warps of a program.
    """

    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    operations: tuple[str, ...]
    loops: tuple[tuple[int, int], ...]
    num_warps: int

    def kinds(self, loop: tuple[int, int] | None = None) -> Counter[str]:
        """Return how many instructions of each kind there are in a loop or in all."""
        first, last = loop or (0, len(self.operations) - 1)
        return Counter(kind_of(operation) for operation in self.operations[first : last + 1])

    def main_loop(self) -> tuple[int, int]:
        """Return the shortest of the loops with the most bytes loaded."""

        def loaded(loop: tuple[int, int]) -> int:
            kinds = self.kinds(loop)
            return sum(size * kinds[f"load {size}"] for size in (1, 2, 4, 8, 16))

        most = max(map(loaded, self.loops))
        return min(
            (loop for loop in self.loops if loaded(loop) == most),
            key=lambda loop: loop[1] - loop[0],
        )

    def issued_per_byte(self, bytes_per_iteration: int) -> float:
        """Return instructions that a program's warps issue for a byte in the main loop."""
        first, last = self.main_loop()
        return (last - first + 1) * self.num_warps / bytes_per_iteration


_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)([^;]*);")
_LABEL = re.compile(r"^(\.L_\w+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def read_machine_code(compiled: Any) -> MachineCode:
    """Return what a kernel compiled for an NVIDIA GPU takes.

    Args:
        compiled: From `compile_kernel`.

    Raises:
        subprocess.CalledProcessError: A tool does not know the GPU.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        listing = _run("nvdisasm", "-c", file.name)
    counts = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    operations: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in listing.splitlines():
        label = _LABEL.match(line)
        if label:
            labels[label[1]] = len(operations)
        found = _INSTRUCTION.match(line)
        if found:
            to = _TARGET.search(found[2])
            if found[1].startswith("BRA") and to:
                branches.append((len(operations), to[1]))
            operations.append(found[1])
    loops = tuple((labels[label], at) for at, label in branches if labels.get(label, at + 1) <= at)
    loops = tuple(loop for loop in loops if loop[1] > loop[0])  # the trap behind the last
    return MachineCode(
        int(counts["REG"]),
        int(counts["STACK"]),
        int(counts["LOCAL"]),
        int(compiled.metadata.shared),
        tuple(operations),
        loops,
        int(compiled.metadata.num_warps),
    )
