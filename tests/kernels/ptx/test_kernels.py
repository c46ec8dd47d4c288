# SPDX-License-Identifier: Apache-2.0
"""The kernels' PTX for each compute capability, executed, against the reference.

Triton compiles for a GPU that is not there and launches as on it; see `testing.ptx.launch`.
"""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton

from testing import processes
from testing.kernels.paged_batch import Outputs
from testing.ptx.launch import PTXDevice
from testing.ptx.machine import LOADED_TOO_EARLY
from testing.triton import prefill
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

CAPABILITIES = (80, 90, 100, 120)
TENSOR_MEMORY = (100, 512)
"""The compute capability and head size for which Triton emits `tcgen05`."""

SPLIT: dict[str, Any] = {"plan": {"split": True, "processors": 2}}
WHOLE: dict[str, Any] = {"plan": {"split": False}}
SINKS = torch.linspace(6, -3, 16)

# Compiling takes most of the time, so every case runs for some compute capabilities: those for
# which its kernel is different, or any. The long tests run the others.
CASES: dict[str, tuple[Case, tuple[int, ...]]] = {
    "64, group 1": (Case(64, 2, 2, 16, **DECODE, **SPLIT), (80,)),
    "64, group 12, window": (
        Case(64, 12, 1, 32, **DECODE, **SPLIT, options={"window": 50}), (120,)
    ),
    "96, group 3, window": (
        Case(96, 3, 1, 48, **DECODE, **SPLIT, dtype=torch.float16, options={"window": 50}), (90,)
    ),
    "128, pages of two tiles, group 16, sinks": (
        Case(128, 16, 1, 128, **DECODE, **SPLIT, options={"sinks": SINKS}), (100,)
    ),
    "256, group 7": (Case(256, 7, 1, 16, **DECODE, **SPLIT), (120,)),
    "256, group 8, soft cap, sinks": (
        Case(
            256, 8, 1, 16, **MIXED, **SPLIT, dtype=torch.float32,
            options={"soft_cap": 2.0, "sinks": SINKS[:8]},
        ),
        (90,),
    ),
    "512, group 2": (Case(512, 2, 1, 16, **DECODE, **SPLIT), CAPABILITIES),
    "verification, 128, group 5, window": (
        Case(128, 5, 1, 16, (290, 33, 8, 70), (4, 4, 4, 4), options={"window": 70}, **SPLIT), (100,)
    ),
    "64, requests without new tokens": (
        Case(
            64, 4, 1, 32, (40, 30, 64, 20, 10, 5), (19, 0, 0, 3, 0, 1),
            plan={"split": True, "processors": 1},
        ),
        (90,),
    ),
    "32 rows, 64, mixed": (
        Case(64, 4, 1, 32, (290, 1, 0, 20), (8, 1, 0, 7), **WHOLE), (90,)
    ),
    "64 rows, 128, prompt": (Case(128, 16, 1, 16, (100, 40), (30, 9), **WHOLE), (100,)),
    "96, not causal, window, soft cap": (
        Case(
            96, 6, 2, 48, **MIXED, **WHOLE, dtype=torch.float16,
            options={"causal": False, "window": 6, "soft_cap": 30.0},
        ),
        (120,),
    ),
}  # fmt: skip
EVERY = [(capability, name) for name in CASES for capability in CAPABILITIES]
SOME = [(capability, name) for name, (_, some) in CASES.items() for capability in some]

DECODING = Case(128, 8, 2, 16, **DECODE, **SPLIT)


def check(capability: int, case: Case, seed: int) -> Outputs:
    batch = make(case)
    with PTXDevice(capability, seed) as device:
        outputs = attend(batch, planned(batch, **(case.plan or {})))
    assert_close(outputs, expected(batch))
    assert "attend_kernel" in device.launches
    if (capability, case.head_size) != TENSOR_MEMORY:
        assert not device.memory.notes
    return outputs


@pytest.mark.parametrize(("capability", "name"), SOME)
def test_attention_equals_the_reference(capability: int, name: str) -> None:
    check(capability, CASES[name][0], seed=capability // 10 + list(CASES).index(name))


@pytest.mark.long
@pytest.mark.parametrize(("capability", "name"), [each for each in EVERY if each not in SOME])
def test_attention_equals_the_reference_on_other_gpus(capability: int, name: str) -> None:
    check(capability, CASES[name][0], seed=1)


@pytest.mark.long
@pytest.mark.parametrize("case", matrix())
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_combination_equals_the_reference(capability: int, case: Case) -> None:
    check(capability, case, seed=1)


@pytest.mark.long
@pytest.mark.parametrize("group", range(1, 17))
def test_every_group_of_heads_equals_the_reference(group: int) -> None:
    check(CAPABILITIES[group % 4], Case(64, group, 1, 16, **DECODE, **SPLIT), seed=group)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_order_of_programs_and_warps_does_not_change_a_bit(capability: int) -> None:
    results = [check(capability, DECODING, seed) for seed in range(3)]
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


@pytest.mark.parametrize("capability", [90, pytest.param(120, marks=pytest.mark.long)])
def test_hidden_bytes_have_no_influence(capability: int) -> None:
    """Tokens before the window and after the last token get zeros, NaN, infinities and 65504."""
    # Another test compiles the same decode kernel.
    case = CASES["96, group 3, window"][0]
    batch = make(replace(case, lengths=(150, 40), queries=(2, 1), plan=None))
    wanted = expected(batch)
    hidden = [(0, token) for token in (*range(99), *range(150, 192))]
    hidden += [(1, token) for token in range(40, 48)]
    results = []
    for half in HIDDEN_HALVES:
        for request, token in hidden:
            fill_token(batch, request, token, half)
        with PTXDevice(capability, seed=half):
            results.append(attend(batch, planned(batch)))
        assert_close(results[-1], wanted)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


DTYPES = {64: torch.bfloat16, 96: torch.float16, 128: torch.bfloat16, 256: torch.float32}
STORED = [(80, 64), (120, 96), (80, 128), (90, 128), (100, 128), (120, 128), (90, 256), (100, 512)]


@pytest.mark.parametrize(
    ("capability", "head_size"),
    [
        pytest.param(*each, marks=[] if each in STORED else pytest.mark.long)
        for each in itertools.product(CAPABILITIES, (64, 96, 128, 256, 512))
    ],
)
def test_storing_equals_the_reference_bit_for_bit(capability: int, head_size: int) -> None:
    dtype = DTYPES.get(head_size, torch.bfloat16)
    key, value = random_rows(37, 2, head_size, dtype)
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:37]
    slots[::9] = -1
    with PTXDevice(capability, seed=head_size):
        assert differing_bytes(key, value, slots, padding=16) == 0
        key, value = special_rows(head_size, dtype)
        assert differing_bytes(key, value, torch.arange(len(key))) == 0


PREFILLS: dict[str, tuple[int, Case, dict[str, int]]] = {
    "96, window, soft cap, sinks, several pieces": (
        80,
        Case(
            96, 6, 2, 48, (150, 30), (90, 30), dtype=torch.float16,
            options={"window": 40, "soft_cap": 5.0, "sinks": SINKS[:6]},
        ),
        {"rows": 32},
    ),
    "128, requests that share a piece": (
        90, Case(128, 4, 2, 16, (20, 31, 0, 9), (20, 9, 0, 1)), {}
    ),
    "256, sinks, several pieces": (
        100,
        Case(
            256, 4, 1, 16, (150,), (20,), dtype=torch.float32,
            options={"sinks": SINKS[:4].bfloat16()},
        ),
        {},
    ),
    "64, more pieces than two": (120, Case(64, 3, 1, 32, (200,), (30,)), {}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        pytest.param(each, name, marks=[] if each == usual else pytest.mark.long)
        for name, (usual, _, _) in PREFILLS.items()
        for each in CAPABILITIES
    ],
)
def test_long_prefills_equal_the_reference(capability: int, name: str) -> None:
    _, case, sizes = PREFILLS[name]
    batch = make(case)
    with PTXDevice(capability, seed=capability) as device:
        outputs = prefill.attend(batch, flash=prefill.visible_flash, **sizes)
    prefill.assert_close(batch, outputs, expected(batch))
    launched = {"round_query_kernel", "dequantise_kernel", "merge_piece_kernel"}
    assert set(device.launches) == launched


@pytest.mark.parametrize("seed", range(3))
def test_programs_agree_on_the_first_and_the_last_broken_token(seed: int) -> None:
    # Two programs of 64 tokens each meet one. Rows between the two tokens count as broken.
    batch = make(Case(64, 2, 1, 16, (120,), (120,), options={"window": 10}))
    for token in (20, 90):
        batch.scales(0, 0, "key")[token // 16][token % 16] = torch.inf
    with PTXDevice(CAPABILITIES[seed], seed=seed):
        out, _ = prefill.attend(batch, flash=prefill.visible_flash, rows=128, piece=128)
    broken = torch.zeros(120, dtype=torch.bool)
    broken[20:100] = True
    assert torch.equal(out.isnan().flatten(1).any(1), broken)


OTHER_TRITON = "HYBRID_KV_TEST_TRITON"


@pytest.mark.long
def test_the_kernels_of_another_triton_equal_the_reference() -> None:
    if not (folder := os.environ.get(OTHER_TRITON)):
        pytest.skip(
            f"{OTHER_TRITON} is not set; it names a folder that `pip install --no-deps --target` "
            "has filled with another Triton"
        )
    others = "not combination and not another_triton"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-k", others, __file__]
    found = processes.run(command, timeout_s=1800, PYTHONPATH=folder)
    assert found.returncode == 0, found.stdout[-4000:]


def test_what_ptx_leaves_undefined_but_ptxas_defines_is_noted() -> None:
    """Triton 3.9 moves the wait for the sums after their first use; see docs/internals.md."""
    batch = make(CASES["512, group 2"][0])
    capability, _ = TENSOR_MEMORY
    texts: list[str] = []
    with PTXDevice(capability, edit=lambda ptx: texts.append(ptx) or ptx) as device:
        attend(batch, planned(batch, **SPLIT["plan"]))
    assert any("tcgen05.mma" in text for text in texts)
    if triton.__version__.startswith("3.9."):
        assert device.memory.notes == {LOADED_TOO_EARLY}


def test_launches_compile_what_a_gpu_would_run() -> None:
    batch = make(DECODING)
    texts = []
    with PTXDevice(90, edit=lambda ptx: texts.append(ptx) or ptx):
        attend(batch, planned(batch, **(DECODING.plan or {})))
    assert [text.split(".entry ")[1].split("(")[0] for text in texts] == [
        "plan_kernel", "attend_kernel", "merge_kernel",
    ]  # fmt: skip
    assert all(".target sm_90a" in text for text in texts)
