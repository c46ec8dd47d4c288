# SPDX-License-Identifier: Apache-2.0
"""Compile the kernels of an engine, or load them from disk, before its first request."""

from __future__ import annotations

import torch

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.cpu.attention import paged_attention
from vllm_hybrid_kv.kernels.cpu.quantise import SERIAL_ROWS, quantise_and_store


def warm_up(head_size: int, dtype: torch.dtype, isa: str | None = None) -> None:
    """Compile, or load from disk, what an engine's layers of this head size and dtype call.

    Every page size, group and length of a path is served by one kernel for attention, and by
    one for few new tokens and one for many, so that this is all there is to compile.

    Args:
        head_size: Dims of a head.
        dtype: bf16, fp16 or fp32, of queries, keys and values.
        isa: As for `paged_attention`.
    """
    query = torch.zeros(1, 1, head_size, dtype=dtype)
    cache = torch.zeros(1, 1, k8v4.TILE_TOKENS, k8v4.slot_bytes(head_size), dtype=torch.uint8)
    for tokens in (1, SERIAL_ROWS + 1):
        new = query.expand(tokens, 1, head_size)
        quantise_and_store(new, new, cache, torch.full((tokens,), -1))
    one = torch.ones(1, dtype=torch.int32)
    paged_attention(
        query, cache, torch.zeros(1, 1, dtype=torch.int32), one,
        torch.tensor([0, 1], dtype=torch.int32), torch.empty_like(query), scale=1.0, isa=isa,
    )  # fmt: skip
