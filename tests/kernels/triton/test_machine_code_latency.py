# SPDX-License-Identifier: Apache-2.0
"""What the machine code of the decode loop says of latency; `test_machine_code.py` counts."""

from __future__ import annotations

import pytest
import triton

from testing.triton import performance_model as model
from testing.triton.compiling import Attention
from testing.triton.machine_code import missing_tools
from testing.triton.processes import Compiler
from vllm_hybrid_kv.kernels import k8v4

if reason := missing_tools():
    pytest.skip(reason, allow_module_level=True)

GPUS = {80: "A100", 89: "RTX 4090", 90: "H100", 100: "B200"}
DECODE = [Attention(capability, size) for capability in GPUS for size in (128, 256)]
# One new token of large heads, and verification of several tokens.
SEVERAL_ROWS = [
    Attention(90, 512),
    Attention(90, 128, 16),
    Attention(90, 256, 32),
    *(Attention(capability, 128, 32) for capability in (80, 90, 100)),
]
PREFILL = [Attention(capability, 128, 64) for capability in (80, 90, 100)]


@pytest.mark.parametrize("job", [*DECODE, *SEVERAL_ROWS], ids=str)
def test_decode_and_verification_prefetch_the_next_tile(job: Attention, compiler: Compiler) -> None:
    pending = compiler(job).pending_copies
    # A wait for all copies would leave none for the time of the products.
    assert pending
    assert min(pending) > 0


# `test_plan.py` has the other half: no batch has more programs than its tiling plans.
@pytest.mark.parametrize("job", [*DECODE, *SEVERAL_ROWS, *PREFILL], ids=str)
def test_the_planned_programs_of_a_multiprocessor_fit_it(
    job: Attention, compiler: Compiler
) -> None:
    resident = model.resident_programs(compiler(job), model.GPUS[GPUS[job.capability]])
    assert job.tiling.programs_per_processor <= resident


CYCLES = {(80, 128, 4): 1644, (80, 256, 4): 2411, (89, 128, 4): 4838, (89, 256, 4): 4789}
CYCLES |= {(90, 128, 4): 1576, (90, 256, 4): 2267, (100, 128, 4): 1357, (100, 256, 4): 1989}
CYCLES |= {(90, 128, 16): 1739}
"""Modelled cycles that a program alone on a multiprocessor takes for a tile, by compute capability,
head size and rows. After a change that raises or lowers them record the new ones here and in
benchmarks/results/gpu_predictions.md."""

MOST_LOOP_BYTES = {(128, 4): 8704, (256, 4): 11264, (128, 16): 10496}
"""By head size and rows, the code of the main loop. The model has no instruction cache."""


@pytest.mark.parametrize("job", [*DECODE, Attention(90, 128, 16)], ids=str)
def test_the_loop_is_as_short_and_as_fast_as_recorded(job: Attention, compiler: Compiler) -> None:
    code = compiler(job)
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        pytest.skip("recorded for Triton 3.9")
    assert 16 * code.loop_length <= MOST_LOOP_BYTES[job.head_size, job.rows]
    gpu = model.GPUS[GPUS[job.capability]]
    tile_bytes = job.tiling.block_n * k8v4.slot_bytes(job.head_size)
    share = model.read_bytes_per_cycle(gpu) / gpu.processors
    cycles = model.pace(code, gpu, 1, tile_bytes, share).cycles
    recorded = CYCLES[job.capability, job.head_size, job.rows]
    assert cycles == pytest.approx(recorded, rel=0.1)
