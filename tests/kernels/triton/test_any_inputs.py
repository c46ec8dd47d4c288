# SPDX-License-Identifier: Apache-2.0
"""Whatever tensors the GPU kernels are given: what they are asked for, or one message."""

from __future__ import annotations

from testing.triton.processes import Interpreter


def stores(examples: int) -> None:
    _, calls, kernels = _here()
    calls.check_stores(kernels, examples)


def attention(examples: int) -> None:
    _, calls, kernels = _here()
    calls.check_attention_in_debug_mode(kernels, examples)


def _here():  # type: ignore[no-untyped-def]
    from tests.fuzz import kernel_calls
    from vllm_hybrid_kv.kernels import k8v4, triton

    layout = k8v4.Layout.LINEAR
    kernels = kernel_calls.Kernels(
        triton.quantise_and_store, triton.paged_attention, layout, refuses_slots=False
    )
    return triton, kernel_calls, kernels


def test_a_store_writes_its_slots_or_nothing(interpreter: Interpreter) -> None:
    interpreter(stores, 150)


def test_attention_in_debug_mode_reads_what_is_there_or_refuses(interpreter: Interpreter) -> None:
    interpreter(attention, 100)
