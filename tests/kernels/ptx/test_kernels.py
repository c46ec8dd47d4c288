# SPDX-License-Identifier: Apache-2.0
"""The kernels' PTX for each compute capability, executed, against the reference.

Triton compiles for a GPU that is not there and launches as on it; see `testing.ptx.launch`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from testing.ptx.launch import PTXDevice
from testing.triton.attention import (
    DECODE,
    HIDDEN_HALVES,
    MIXED,
    Case,
    assert_close,
    attend,
    expected,
    fill_token,
    make,
    planned,
)
from testing.triton.store import differing_bytes, random_rows, special_rows
from tests.kernels.triton.test_attention import matrix
from vllm_hybrid_kv.kernels.triton.attention import attend_kernel

CAPABILITIES = (80, 90, 100, 120)
TENSOR_MEMORY = (100, 512)
"""The compute capability and head size for which Triton emits `tcgen05`."""

SPLIT: dict[str, Any] = {"plan": {"split": True, "processors": 2}}
WHOLE: dict[str, Any] = {"plan": {"split": False}}
SINKS = torch.linspace(6, -3, 16)

CASES: dict[str, Case] = {
    "64, group 1": Case(64, 2, 2, 16, **DECODE, **SPLIT),
    "96, group 3, window": Case(
        96, 3, 1, 48, **DECODE, **SPLIT, dtype=torch.float16, options={"window": 50}
    ),
    "128, group 4": Case(128, 8, 2, 16, **DECODE, **SPLIT),
    "128, pages of two tiles, group 16, sinks": Case(
        128, 16, 1, 128, **DECODE, **SPLIT, options={"sinks": SINKS}
    ),
    "256, group 8, soft cap, sinks": Case(
        256, 8, 1, 16, **MIXED, **SPLIT, dtype=torch.float32,
        options={"soft_cap": 2.0, "sinks": SINKS[:8]},
    ),
    "512, group 2": Case(512, 2, 1, 16, **DECODE, **SPLIT),
    "verification, 128, group 5, window": Case(
        128, 5, 1, 16, (290, 33, 8, 70), (4, 4, 4, 4), options={"window": 70}, **SPLIT
    ),
    "32 rows, 64, mixed": Case(64, 4, 1, 32, (290, 1, 0, 20), (8, 1, 0, 7), **WHOLE),
    "64 rows, 128, prompt": Case(128, 16, 1, 16, (100, 40), (30, 9), **WHOLE),
    "96, not causal, window, soft cap": Case(
        96, 6, 2, 48, **MIXED, **WHOLE, dtype=torch.float16,
        options={"causal": False, "window": 6, "soft_cap": 30.0},
    ),
}  # fmt: skip


def skip_tensor_memory(capability: int, head_size: int) -> None:
    if (capability, head_size) == TENSOR_MEMORY:
        pytest.skip("tcgen05 is not implemented")


def check(capability: int, case: Case, seed: int) -> None:
    batch = make(case)
    with PTXDevice(capability, seed) as device:
        assert_close(attend(batch, planned(batch, **(case.plan or {}))), expected(batch))
    assert "attend_kernel" in device.launches


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_attention_equals_the_reference(capability: int, name: str) -> None:
    skip_tensor_memory(capability, CASES[name].head_size)
    check(capability, CASES[name], seed=capability // 10 + list(CASES).index(name))


@pytest.mark.long
@pytest.mark.parametrize("case", matrix())
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_combination_equals_the_reference(capability: int, case: Case) -> None:
    skip_tensor_memory(capability, case.head_size)
    check(capability, case, seed=1)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_order_of_programs_and_warps_does_not_change_a_bit(capability: int) -> None:
    case = CASES["128, group 4"]
    batch = make(case)
    results = []
    for seed in range(3):
        with PTXDevice(capability, seed):
            results.append(attend(batch, planned(batch, **case.plan)))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_hidden_bytes_have_no_influence(capability: int) -> None:
    """Tokens before the window and after the last one; zeros, NaN, infinities and 65504."""
    case = replace(CASES["96, group 3, window"], lengths=(150, 40), queries=(3, 1), plan=None)
    batch = make(case)
    wanted = expected(batch)
    hidden = [(0, token) for token in (*range(98), *range(150, 192))]
    hidden += [(1, token) for token in range(40, 48)]
    results = []
    for half in HIDDEN_HALVES:
        for request, token in hidden:
            fill_token(batch, request, token, half)
        with PTXDevice(capability):
            results.append(attend(batch, planned(batch)))
        assert_close(results[-1], wanted)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


DTYPES = {64: torch.bfloat16, 96: torch.float16, 128: torch.bfloat16, 256: torch.float32}


@pytest.mark.parametrize("head_size", [64, 96, 128, 256, 512])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_storing_equals_the_reference_bit_for_bit(capability: int, head_size: int) -> None:
    dtype = DTYPES.get(head_size, torch.bfloat16)
    key, value = random_rows(37, 3, head_size, dtype)
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:37]
    slots[::9] = -1
    with PTXDevice(capability, seed=head_size):
        assert differing_bytes(key, value, slots, padding=16) == 0
        key, value = special_rows(head_size, dtype)
        assert differing_bytes(key, value, torch.arange(len(key))) == 0


def test_launches_compile_what_a_gpu_would_run() -> None:
    case = CASES["128, group 4"]
    batch = make(case)
    texts = []
    with PTXDevice(90, edit=lambda ptx: texts.append(ptx) or ptx):
        attend(batch, planned(batch, **case.plan))
    assert [text.split(".entry ")[1].split("(")[0] for text in texts] == [
        "plan_kernel", attend_kernel.__name__, "merge_kernel",
    ]  # fmt: skip
    assert all(".target sm_90a" in text for text in texts)
