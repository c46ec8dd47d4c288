# SPDX-License-Identifier: Apache-2.0
"""This project's kernels."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.gpu.contenders import Batch, Contender, copies
from benchmarks.gpu.measure import Call
from benchmarks.gpu.shapes import PAGE, token_bytes
from vllm_hybrid_kv.kernels.triton import (
    LaunchPlan,
    paged_attention,
    plan_attention,
    quantise_and_store,
)
from vllm_hybrid_kv.kernels.triton.tuning import Tiling


def empty_cache(batch: Batch) -> torch.Tensor:
    heads = batch.shape.heads
    dims = (batch.pages, heads.kv, PAGE, token_bytes("k8v4", heads.size))
    return torch.zeros(dims, dtype=torch.uint8, device=batch.device)


class Ours(Contender):
    """k8v4 pages; the batch is planned once a step, on the device."""

    name = "ours"
    stored = "k8v4"

    def __init__(self, batch: Batch, layers: int) -> None:
        self._batch = batch
        first = empty_cache(batch)
        for key, value, slots in batch.stored():
            quantise_and_store(key, value, first, slots)
        self._caches = copies(first, layers)
        self._plan = self.plan()
        self._out = torch.empty_like(batch.query)

    def plan(self, tiling: Tiling | None = None, into: LaunchPlan | None = None) -> LaunchPlan:
        """Plan the batch, with the device's own tile sizes if None."""
        batch = self._batch
        heads = batch.shape.heads
        return plan_attention(
            batch.seq_lens, batch.starts, batch.query.shape[0], heads.query, heads.kv, heads.size,
            max_query_len=batch.shape.queries, tiling=tiling, into=into,
        )  # fmt: skip

    @property
    def once_a_step(self) -> Call | None:
        return lambda: self.plan(into=self._plan)

    def attend(self, layer: int, plan: LaunchPlan | None = None) -> torch.Tensor:
        batch = self._batch
        paged_attention(
            batch.query, self._caches[layer], batch.block_table, batch.seq_lens, batch.starts,
            self._out, scale=batch.scale, plan=plan or self._plan,
        )  # fmt: skip
        return self._out


class OursOneToken(Ours):
    """Ours with one new token a request, to compare with several."""

    name = "ours, one token"

    def __init__(self, batch: Batch, layers: int) -> None:
        super().__init__(Batch(replace(batch.shape, queries=1), batch.device), layers)
