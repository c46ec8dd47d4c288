# SPDX-License-Identifier: Apache-2.0
"""Whatever tensors they get, the GPU kernels give a correct result or raise before they write."""

from __future__ import annotations

from testing.triton.processes import interpreted


def _kernels():  # type: ignore[no-untyped-def]
    # Import late, in the interpreter's process, because importing hypothesis takes a second.
    from tests.fuzz import kernel_calls
    from vllm_hybrid_kv.kernels import k8v4, triton

    kernels = kernel_calls.Kernels(
        triton.quantise_and_store, triton.paged_attention, k8v4.Layout.LINEAR, refuses_slots=False
    )
    return kernel_calls, kernels


@interpreted
def test_a_store_writes_its_slots_or_nothing() -> None:
    calls, kernels = _kernels()
    calls.check_stores(kernels, examples=150)


@interpreted
def test_attention_in_debug_mode_is_correct_or_raises() -> None:
    calls, kernels = _kernels()
    calls.check_attention_in_debug_mode(kernels, examples=100)
