# SPDX-License-Identifier: Apache-2.0
"""Check the kernels' machine code, compiled for GPUs that this machine does not have.

`conftest.py` compiles the parameter `job` of every selected test in the background.
"""

from __future__ import annotations

import re
from collections import Counter

import pytest
import triton
from triton.backends.compiler import GPUTarget

from testing.triton.compiling import (
    AmdAttention,
    Attention,
    Quantise,
    SmallKernels,
)
from testing.triton.machine_code import MachineCode, cuda, int8_operands, missing_tools
from testing.triton.processes import Compiler
from vllm_hybrid_kv.kernels import k8v4

if reason := missing_tools():
    pytest.skip(reason, allow_module_level=True)

# Older versions of Triton can compile everything, but to less efficient code.
BOUNDS_FOR = (3, 9)

MOST_ISSUED_PER_BYTE = {(64, 128): 0.09, (64, 256): 0.07, (32, 256): 0.09}
"""Warp instructions per byte of cache, by keys of a tile and head size. At full memory bandwidth an
H100 can issue 0.268; half of that leaves room for stalls. See
benchmarks/results/gpu_predictions.md."""


MOST_BARRIERS = 11
"""Limit for the main loop. At each barrier, the warps of a program wait for each other."""
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
SHARED_BYTES |= {100: 227 * 1024, 120: 99 * 1024}


def skip_bounds_of_other_versions() -> None:
    if tuple(map(int, triton.__version__.split(".")[:2])) < BOUNDS_FOR:
        pytest.skip(f"compiles; the bounds are for Triton {BOUNDS_FOR}")


def assert_fits(code: MachineCode, capability: int) -> None:
    """Assert that two programs fit a multiprocessor, and that no loop over keys spills.

    Between row tiles a few registers may spill: on 10.0 ptxas takes no more than 168 of them.
    """
    innermost = [
        loop
        for loop in code.loops
        if not any(loop[0] <= a and b <= loop[1] and loop != (a, b) for a, b in code.loops)
    ]
    assert sum(code.counts(loop)["spill"] for loop in innermost) == code.spill_bytes == 0
    assert code.counts()["spill"] <= 6
    assert code.registers <= 255
    # With two programs, one can work while the other waits.
    assert 2 * code.registers * 32 * code.num_warps <= 65536
    assert 2 * code.shared_bytes <= SHARED_BYTES[capability]


def num_products(job: Attention) -> int:
    """Count a tile's products: scores with 32 dims, values with 16 keys, both 16 by 8 numbers."""
    dims, tiling = triton.next_power_of_2(job.head_size), job.tiling
    return tiling.block_n // 16 * (dims // 32 + dims // 16) * tiling.block_m // 8


def assert_multiplies_keys_as_they_are_stored(code: MachineCode, job: Attention) -> None:
    """Assert that tensor cores compute scores from int8 keys, with no key converted first."""
    first, last = code.main_loop()
    products = [name for name in code.operations[first : last + 1] if name.startswith("IMMA")]
    assert all(name.startswith("IMMA.16832.S8.S8") for name in products)
    # One instruction multiplies 16 keys by 8 rows over 32 dims.
    dims = triton.next_power_of_2(job.head_size)
    tiling = job.tiling
    assert len(products) * code.num_warps == (
        tiling.block_n // 16 * (tiling.block_m // 8) * (dims // 32)
    )
    operands, loaded = int8_operands(code.ptx)
    assert len(operands) >= len(products)
    for registers in operands:
        assert registers <= loaded


def assert_loads_codes_16_bytes_at_a_time(code: MachineCode, job: Attention) -> None:
    counts = code.counts(code.main_loop())
    code_bytes = job.tiling.block_n * (job.head_size + job.head_size // 2)
    assert counts["load 16"] * 16 * 32 * code.num_warps == code_bytes


# Pages of 128 tokens use the ONE_PAGE shortcut up to D = 128. GPUs 8.6 and 8.9 run 8.0's code.
DECODE = [
    *(Attention(capability, size) for capability in SHARED_BYTES for size in (128, 256)),
    *(Attention(capability, 128, page_size=128) for capability in (80, 90, 100, 120)),
]


@pytest.mark.parametrize("job", DECODE, ids=str)
def test_decode_multiplies_int8_loads_16_bytes_at_a_time_and_issues_few_instructions(
    job: Attention, compiler: Compiler
) -> None:
    code = compiler(job)
    skip_bounds_of_other_versions()
    assert_fits(code, job.capability)
    assert_loads_codes_16_bytes_at_a_time(code, job)
    counts = code.counts(code.main_loop())
    assert counts["tensor core"] * code.num_warps == num_products(job)
    # The other loads are scales and block numbers. For tiles of 32 keys Triton copies each of them
    # twice, in two layouts.
    assert counts["load 8"] == counts["load 2"] == counts["load 1"] == 0
    assert counts["load 4"] <= (6 if job.tiling.block_n == 32 else 3)
    tile_bytes = job.tiling.block_n * k8v4.slot_bytes(job.head_size)
    most_issued = MOST_ISSUED_PER_BYTE[job.tiling.block_n, job.head_size]
    assert code.issued_per_byte(tile_bytes) < most_issued
    assert code.barriers <= MOST_BARRIERS
    assert_multiplies_keys_as_they_are_stored(code, job)


OTHERS = [
    Attention(90, 512),
    Attention(120, 512),
    # Programs with 16, 32 and 64 rows.
    Attention(90, 128, 16),
    Attention(90, 256, 32),
    *(Attention(capability, 128, rows) for capability in (80, 90, 100, 120) for rows in (32, 64)),
    Attention(90, 96, modes=("WINDOW",)),
    Attention(90, 96, causal=False),
    Attention(90, 96, modes=("SOFT_CAP", "SINKS", "LSE")),
    Attention(90, 96, causal=False, modes=("WINDOW", "SOFT_CAP", "SINKS", "LSE")),
]


@pytest.mark.parametrize("job", OTHERS, ids=str)
def test_large_heads_many_new_tokens_and_all_modes_spill_nothing(
    job: Attention, compiler: Compiler
) -> None:
    code = compiler(job)
    skip_bounds_of_other_versions()
    assert_fits(code, job.capability)
    counts = code.counts(code.main_loop())
    # For large heads, Triton also uses warp-group instructions on 9.0. Each replaces several.
    least = 24 if job.head_size >= 256 else num_products(job) // code.num_warps
    assert counts["tensor core"] >= least
    assert counts["load 2"] == counts["load 1"] == 0
    if job.head_size == 512:
        assert_loads_codes_16_bytes_at_a_time(code, job)


AMD = [AmdAttention("gfx942", 128), AmdAttention("gfx942", 256), AmdAttention("gfx950", 128)]


@pytest.mark.parametrize("job", AMD, ids=str)
def test_the_same_source_compiles_for_amd_without_spills_to_memory(
    job: AmdAttention, compiler: Compiler
) -> None:
    assembly = compiler(job)
    # Values that do not fit the registers of their kind go to other registers, none to memory.
    assert re.findall(r"\.private_segment_fixed_size: +(\d+)", assembly) == ["0"]
    spills = re.findall(r"\.[sv]gpr_spill_count: +(\d+)", assembly)
    assert spills
    assert max(map(int, spills)) <= 20
    operations = Counter(re.findall(r"^\s+(v_mfma_[if]32|global_load_\w+)", assembly, re.M))
    # Scores are int8 products, and values are multiplied in fp16.
    assert operations["v_mfma_i32"] >= 16
    assert operations["v_mfma_f32"] >= 32
    integer = re.findall(r"^\s+(v_mfma_i32\w+)", assembly, re.M)
    assert all(name.endswith("_i8") for name in integer)
    assert operations["global_load_dwordx4"] >= 12
    assert operations["global_load_ubyte"] == 0


STORING = [
    Quantise(*job)
    for job in (
        (80, 96), (80, 128), (86, 256), (89, 128), (90, 256), (90, 512), (100, 96), (120, 128),
    )
]  # fmt: skip


@pytest.mark.parametrize("job", STORING, ids=str)
def test_storing_writes_16_bytes_at_a_time_and_spills_nothing(
    job: Quantise, compiler: Compiler
) -> None:
    code = compiler(job)
    skip_bounds_of_other_versions()
    counts = code.counts()
    assert counts["spill"] == 0
    assert counts["store 16"] >= 2  # keys and values
    assert counts["store other"] <= 2  # scales
    assert counts["load 16"] >= 2


SMALL = [
    SmallKernels(target)
    for target in (*map(cuda, (80, 90, 100, 120)), GPUTarget("hip", "gfx942", 64))
]


@pytest.mark.parametrize("job", SMALL, ids=str)
def test_planning_and_merging_compile(job: SmallKernels, compiler: Compiler) -> None:
    compiler(job)
