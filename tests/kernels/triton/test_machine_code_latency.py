# SPDX-License-Identifier: Apache-2.0
"""What the machine code of the decode loop says of latency; `test_machine_code.py` counts."""

from __future__ import annotations

import pytest

from testing.triton import performance_model as model
from testing.triton.compiling import Attention
from testing.triton.machine_code import missing_tools
from testing.triton.processes import Compiler

if reason := missing_tools():
    pytest.skip(reason, allow_module_level=True)

GPUS = {80: "A100", 89: "RTX 4090", 90: "H100", 100: "B200"}
DECODE = [Attention(capability, size) for capability in GPUS for size in (128, 256)]


@pytest.mark.parametrize("job", DECODE, ids=str)
def test_decode_prefetches_the_next_tile(job: Attention, compiler: Compiler) -> None:
    pending = compiler(job).pending_copies
    # A wait for all copies would leave none for the time of the products.
    assert pending
    assert min(pending) > 0


@pytest.mark.parametrize("job", DECODE, ids=str)
def test_the_planned_programs_of_a_multiprocessor_fit_it(
    job: Attention, compiler: Compiler
) -> None:
    resident = model.resident_programs(compiler(job), model.GPUS[GPUS[job.capability]])
    assert job.tiling.programs_per_processor <= resident
