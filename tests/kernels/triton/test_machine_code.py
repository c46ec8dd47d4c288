# SPDX-License-Identifier: Apache-2.0
"""What the kernels compile to for GPUs that are not here.

Every `job` of a selected test begins to compile with the first test of this folder. The figures
of decode are printed, ours beside stock's, by `python tests/kernels/triton/machine_code_table.py`.
"""

from __future__ import annotations

import re
from collections import Counter

import pytest
import triton
from triton.backends.compiler import GPUTarget

from testing.triton import ahead_of_time, stock
from testing.triton.ahead_of_time import MachineCode, cuda
from testing.triton.compiling import (
    AmdAttention,
    Attention,
    Quantise,
    SmallKernels,
    StockDecode,
    figures,
)
from testing.triton.processes import Compiler

REASON = ahead_of_time.missing_tools()
if REASON:
    pytest.skip(REASON, allow_module_level=True)

# What the bounds are for. Older versions compile everything too; docs/gpu-kernels.md has how well.
BOUNDS_FOR = (3, 9)

MOST_ISSUED_PER_BYTE = 0.13
"""An H100 can issue 0.268 warp instructions a byte at its full memory bandwidth; half of that
leaves room for what stalls."""
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
SHARED_BYTES |= {100: 227 * 1024, 120: 99 * 1024}


def bounds_only() -> None:
    """Leave the rest of a test, having compiled, to the version that its bounds are for."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < BOUNDS_FOR:
        pytest.skip(f"compiles; the bounds are for Triton {BOUNDS_FOR}")


def assert_fits(code: MachineCode, capability: int, kept: int = 0) -> None:
    """Assert that nothing is spilt, and that two programs fit.

    Args:
        code: The kernel's.
        capability: Compute capability.
        kept: Values that may lie in memory from before the loops until behind them.
    """
    kinds = code.kinds()
    assert kinds["spill"] == 2 * kept
    assert sum(code.kinds(loop)["spill"] for loop in code.loops) == code.spill_bytes == 0
    assert code.stack_bytes == 8 * kept
    assert code.registers <= 255
    # Two programs share a multiprocessor's registers and memory, so that one waits alone.
    assert 2 * code.registers * 32 * code.num_warps <= 65536
    assert 2 * code.shared_bytes <= SHARED_BYTES[capability]


# Pages of 128 tokens take a way of their own up to D = 128, and 8.6 and 8.9 the same as 8.0.
DECODE = [
    *(Attention(capability, size) for capability in SHARED_BYTES for size in (128, 256)),
    *(Attention(capability, 128, page_size=128) for capability in (80, 90, 100, 120)),
]


@pytest.mark.parametrize("job", DECODE, ids=str)
def test_decode_reads_16_bytes_at_a_time_spills_nothing_and_issues_little(
    job: Attention, compiler: Compiler
) -> None:
    code = compiler(job)
    bounds_only()
    assert_fits(code, job.capability)
    kinds = code.kinds(code.main_loop())
    assert kinds["tensor core"] >= 32
    planes = job.tiling.block_n * (job.head_size + job.head_size // 2)
    assert kinds["load 16"] * 16 * 32 * code.num_warps == planes
    # What is left are scales, zeros and block numbers.
    assert kinds["load 8"] == kinds["load 2"] == kinds["load 1"] == 0
    assert kinds["load 4"] <= 3
    assert figures(job, code).issued_per_byte < MOST_ISSUED_PER_BYTE


@pytest.mark.parametrize("job", [Attention(90, 512), Attention(120, 512)], ids=str)
def test_heads_of_512_dims_read_16_bytes_at_a_time_and_spill_nothing(
    job: Attention, compiler: Compiler
) -> None:
    code = compiler(job)
    bounds_only()
    assert_fits(code, job.capability)
    kinds = code.kinds(code.main_loop())
    planes = job.tiling.block_n * (job.head_size + job.head_size // 2)
    assert kinds["load 16"] * 16 * 32 * code.num_warps == planes
    assert kinds["tensor core"] >= 32


# Programs of 32 and of 64 rows; with 256 dims 64 rows are two of 32, and on 10.0 four of 16.
MANY_TOKENS = [
    *(Attention(capability, 128, rows) for capability in (80, 90, 100, 120) for rows in (32, 64)),
    *(Attention(capability, 256, 32) for capability in (80, 90, 120)),
]


@pytest.mark.parametrize("job", MANY_TOKENS, ids=str)
def test_many_new_tokens_spill_nothing(job: Attention, compiler: Compiler) -> None:
    code = compiler(job)
    bounds_only()
    # Turning back what was summed takes registers behind the loops, which 256 dims do not leave.
    assert_fits(code, job.capability, kept=int((job.capability, job.head_size) == (80, 256)))
    kinds = code.kinds(code.main_loop())
    assert kinds["tensor core"] >= 32
    assert kinds["load 2"] == kinds["load 1"] == 0


MODES = [
    Attention(90, 96, modes=("WINDOW",)),
    Attention(90, 96, causal=False),
    Attention(90, 96, modes=("SOFT_CAP", "SINKS", "LSE")),
    Attention(90, 96, causal=False, modes=("WINDOW", "SOFT_CAP", "SINKS", "LSE")),
]


@pytest.mark.parametrize("job", MODES, ids=str)
def test_every_mode_compiles_without_spills(job: Attention, compiler: Compiler) -> None:
    code = compiler(job)
    bounds_only()
    assert_fits(code, job.capability)


@pytest.mark.parametrize("job", [Attention(75, 64)], ids=str)
def test_compute_capability_7_5_compiles(job: Attention, compiler: Compiler) -> None:
    code = compiler(job)
    assert code.kinds(code.main_loop())["load 16"] >= 1


AMD = [AmdAttention("gfx942", 128), AmdAttention("gfx942", 256), AmdAttention("gfx950", 128)]


@pytest.mark.parametrize("job", AMD, ids=str)
def test_amds_gpus_compile_from_the_same_source_without_spills(
    job: AmdAttention, compiler: Compiler
) -> None:
    assembly = compiler(job)
    spills = re.findall(r"\.[sv]gpr_spill_count: +(\d+)", assembly)
    assert spills
    # As on compute capability 8.0, see `test_many_new_tokens_spill_nothing`.
    most = 4 if job == AmdAttention("gfx942", 256) else 0
    assert max(map(int, spills)) <= most
    operations = Counter(re.findall(r"^\s+(v_mfma|global_load_\w+)", assembly, re.M))
    assert operations["v_mfma"] >= 32
    assert operations["global_load_dwordx4"] >= 12
    assert operations["global_load_ubyte"] == 0


STORING = [
    Quantise(75, 128),
    Quantise(80, 96),
    Quantise(86, 256),
    Quantise(89, 128),
    Quantise(90, 256),
    Quantise(90, 512),
    Quantise(100, 96),
    Quantise(120, 128),
]


@pytest.mark.parametrize("job", STORING, ids=str)
def test_storing_writes_16_bytes_at_a_time_and_spills_nothing(
    job: Quantise, compiler: Compiler
) -> None:
    code = compiler(job)
    bounds_only()
    kinds = code.kinds()
    assert kinds["spill"] == 0
    assert kinds["store 16"] >= 2  # keys and values
    assert kinds["store other"] <= 2  # scales and zeros
    assert kinds["load 16"] >= 2
    native = sum("F2FP" in name and "E4M3" in name for name in code.operations)
    assert (native > 0) == (job.capability >= 89)


SMALL = [
    SmallKernels(target)
    for target in (*map(cuda, (75, 80, 90, 100, 120)), GPUTarget("hip", "gfx942", 64))
]


@pytest.mark.parametrize("job", SMALL, ids=str)
def test_planning_and_merging_compile(job: SmallKernels, compiler: Compiler) -> None:
    compiler(job)


@pytest.mark.skipif(stock.VLLM is None, reason="vLLM is not installed")
@pytest.mark.parametrize(
    "job",
    [StockDecode(capability, size) for capability in SHARED_BYTES for size in (128, 256)],
    ids=str,
)
def test_stocks_kernel_issues_many_times_as_much_for_a_byte(
    job: StockDecode, compiler: Compiler
) -> None:
    ours = Attention(job.capability, job.head_size)
    found = figures(job, compiler(job))
    assert found.tensor_core == 0
    assert found.wide < 1
    assert found.issued_per_byte > 10 * figures(ours, compiler(ours)).issued_per_byte
