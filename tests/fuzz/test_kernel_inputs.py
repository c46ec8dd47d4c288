# SPDX-License-Identifier: Apache-2.0
"""With random tensors, the CPU kernels give the right result or raise one clear error."""

from __future__ import annotations

import pytest
import torch

from tests.fuzz.kernel_calls import HEAD_SIZE, Kernels, check_attention_in_debug_mode, check_stores
from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.cpu import paged_attention, plan_attention, quantise_and_store

KERNELS = Kernels(quantise_and_store, paged_attention, k8v4.Layout.CPU_TILED, True)


def test_a_store_writes_its_slots_or_nothing() -> None:
    check_stores(KERNELS, 250)


def test_attention_in_debug_mode_reads_valid_blocks_or_refuses() -> None:
    check_attention_in_debug_mode(KERNELS, 200)


@pytest.mark.parametrize("starts", [[0, 9, 2], [-1, 1, 2], [0, 3, 1]])
def test_offsets_that_would_write_outside_the_output_are_refused_without_debug_mode(
    starts: list[int],
) -> None:
    offsets, lengths = torch.tensor(starts, dtype=torch.int32), torch.tensor([9, 9]).int()
    with pytest.raises(ValueError, match="query_start_loc must rise from 0"):
        plan_attention(lengths, offsets, 4, 2, HEAD_SIZE, 16)
