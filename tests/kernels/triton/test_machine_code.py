# SPDX-License-Identifier: Apache-2.0
"""What the kernels compile to for GPUs that are not here."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import pytest
import stock
import triton
from triton.backends.compiler import GPUTarget

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.triton import ahead_of_time
from vllm_hybrid_kv.kernels.triton.ahead_of_time import (
    MachineCode,
    compile_attention,
    compile_merge,
    compile_plan,
    compile_quantise,
    cuda,
    read_machine_code,
)
from vllm_hybrid_kv.kernels.triton.plan import choose_tiling

# What the bounds are for. 3.6 compiles everything too, right in the interpreter; it issues up to
# 0.152 instructions a byte (8.0, D = 128, pages of 16) and spills up to 29 times at D = 256.
BOUNDS_FOR = (3, 9)

REASON = ahead_of_time.missing_tools() or (
    "Triton interprets here" if os.environ.get("TRITON_INTERPRET") == "1" else ""
)
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)

GROUP = 4
MOST_ISSUED_PER_BYTE = 0.13
"""An H100 can issue 0.268 warp instructions a byte at its full memory bandwidth; half of that
leaves room for what stalls."""
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
SHARED_BYTES |= {100: 227 * 1024, 120: 99 * 1024}


def attention(capability: int, head_size: int, rows: int, page_size: int) -> MachineCode:
    tiling = choose_tiling(rows, head_size, 100 <= capability < 120)
    compiled = compile_attention(cuda(capability), tiling, head_size, GROUP, page_size)
    return read_machine_code(compiled)


OLDER = tuple(map(int, triton.__version__.split(".")[:2])) < BOUNDS_FOR
bounded = pytest.mark.skipif(OLDER, reason=f"the bounds are for Triton {BOUNDS_FOR}")


def assert_fits(code: MachineCode, capability: int) -> None:
    kinds = code.kinds()
    assert kinds["spill"] == code.spill_bytes == code.stack_bytes == 0
    assert code.registers <= 255
    # Two programs share a multiprocessor's registers and memory, so that one waits alone.
    assert 2 * code.registers * 32 * code.num_warps <= 65536
    assert 2 * code.shared_bytes <= SHARED_BYTES[capability]


@bounded
@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize("head_size", [128, 256])
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_decode_reads_16_bytes_at_a_time_spills_nothing_and_issues_little(
    capability: int, head_size: int, page_size: int
) -> None:
    if page_size == 128 and (head_size == 256 or capability in (86, 89)):
        pytest.skip("compiles to the same as another case")
    code = attention(capability, head_size, GROUP, page_size)
    assert_fits(code, capability)
    kinds = code.kinds(code.main_loop())
    assert kinds["tensor core"] >= 32
    tokens = choose_tiling(GROUP, head_size).block_n
    planes = tokens * (head_size + head_size // 2)
    assert kinds["load 16"] * 16 * 32 * code.num_warps == planes
    # What is left are scales, zeros and block numbers.
    assert kinds["load 8"] == kinds["load 2"] == kinds["load 1"] == 0
    assert kinds["load 4"] <= 3
    issued = code.issued_per_byte(tokens * k8v4.slot_bytes(head_size))
    assert issued < MOST_ISSUED_PER_BYTE


@bounded
@pytest.mark.parametrize("rows", [32, 64])
@pytest.mark.parametrize("head_size", [128, 256])
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_many_new_tokens_spill_nothing(capability: int, head_size: int, rows: int) -> None:
    if rows == 64 and head_size == 256:
        pytest.skip("has the same size of program as 32 rows")
    code = attention(capability, head_size, rows, 16)
    assert_fits(code, capability)
    kinds = code.kinds(code.main_loop())
    assert kinds["tensor core"] >= 32
    assert kinds["load 2"] == kinds["load 1"] == 0


def test_compute_capability_7_5_compiles() -> None:
    code = attention(75, 64, GROUP, 16)
    assert code.kinds(code.main_loop())["load 16"] >= 1


@pytest.mark.parametrize("head_size", [128, 256])
def test_gfx942_compiles_from_the_same_source_without_spills(head_size: int) -> None:
    target = GPUTarget("hip", "gfx942", 64)
    compiled = compile_attention(target, choose_tiling(GROUP, head_size), head_size, GROUP, 16)
    assembly = compiled.asm["amdgcn"]
    spills = re.findall(r"\.[sv]gpr_spill_count: +(\d+)", assembly)
    assert spills
    assert set(spills) == {"0"}
    operations = Counter(re.findall(r"^\s+(v_mfma|global_load_\w+)", assembly, re.M))
    assert operations["v_mfma"] >= 32
    assert operations["global_load_dwordx4"] >= 12
    assert operations["global_load_ubyte"] == 0


@bounded
@pytest.mark.parametrize("head_size", [96, 128, 256])
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_storing_writes_16_bytes_at_a_time_and_spills_nothing(
    capability: int, head_size: int
) -> None:
    code = read_machine_code(compile_quantise(cuda(capability), head_size, 8, 16))
    kinds = code.kinds()
    assert kinds["spill"] == 0
    assert kinds["store 16"] >= 2  # keys and values
    assert kinds["store other"] <= 2  # scales and zeros
    assert kinds["load 16"] >= 2
    native = sum("F2FP" in name and "E4M3" in name for name in code.operations)
    assert (native > 0) == (capability >= 89)


@pytest.mark.parametrize(
    "target", [cuda(75), cuda(90), cuda(100), GPUTarget("hip", "gfx942", 64)], ids=str
)
def test_planning_and_merging_compile(target: GPUTarget) -> None:
    compile_merge(target, 96)
    for split in (True, False):
        for one_tile in (True, False):
            compile_plan(target, split=split, one_tile=one_tile)
        compile_plan(target, split=split, one_tile=True, smallest=True)


@bounded
@pytest.mark.parametrize(
    "modes",
    [
        {"WINDOW": True},
        {"CAUSAL": False},
        {"SOFT_CAP": True, "SINKS": True, "LSE": True},
        {"CAUSAL": False, "WINDOW": True, "SOFT_CAP": True, "SINKS": True, "LSE": True},
    ],
    ids="-".join,
)
def test_every_mode_compiles_without_spills(modes: dict[str, bool]) -> None:
    code = read_machine_code(compile_attention(cuda(90), choose_tiling(4, 96), 96, 4, 16, **modes))
    assert_fits(code, 90)


@pytest.mark.parametrize("head_size", [128, 256])
@pytest.mark.parametrize("capability", [80, 90])
def test_stocks_kernel_issues_many_times_as_much_for_a_byte(
    capability: int, head_size: int, tmp_path: Path
) -> None:
    compiled = stock.compile_decode(cuda(capability), head_size, GROUP, 16, tmp_path)
    code = read_machine_code(compiled)
    kinds = code.kinds(code.main_loop())
    first, last = code.main_loop()
    theirs = (last - first + 1) / stock.bytes_per_iteration(head_size, GROUP)
    ours = attention(capability, head_size, GROUP, 16).issued_per_byte(
        choose_tiling(GROUP, head_size).block_n * k8v4.slot_bytes(head_size)
    )
    print(f"cc {capability} D {head_size}: stock {theirs:.2f}, ours {ours:.3f} a byte; {kinds}")
    assert kinds["tensor core"] == 0
    assert kinds["load 1"] > 0
    assert theirs > 10 * ours
