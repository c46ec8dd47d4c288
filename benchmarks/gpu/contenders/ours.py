# SPDX-License-Identifier: Apache-2.0
"""This project's kernels."""

from __future__ import annotations

import torch

from benchmarks.gpu.contenders import Batch, Contender, copies
from benchmarks.gpu.measure import Call
from benchmarks.gpu.shapes import PAGE, k8v4_bytes
from vllm_hybrid_kv.kernels.triton import paged_attention, plan_attention, quantise_and_store
from vllm_hybrid_kv.kernels.triton.plan import Plan
from vllm_hybrid_kv.kernels.triton.tuning import Tiling


class Ours(Contender):
    """k8v4 pages; the batch is planned once a step, on the device."""

    name = "ours"
    stored = "k8v4"

    def __init__(self, batch: Batch, layers: int, tiling: Tiling | None = None) -> None:
        heads = batch.shape.heads
        self._batch = batch
        dims = (batch.pages, heads.kv, PAGE, k8v4_bytes(heads.size))
        first = torch.zeros(dims, dtype=torch.uint8, device=batch.device)
        for key, value, slots in batch.stored():
            quantise_and_store(key, value, first, slots)
        self._caches = copies(first, layers)
        self._kept: list[Plan] = []
        self.use(tiling)
        self._out = torch.empty_like(batch.query)

    def use(self, tiling: Tiling | None) -> None:
        """Plan with a size of program; with the one that the device has of its own if None."""
        self._tiling = tiling
        self._plan = self._planned(None)

    def keep_plan(self) -> None:
        """Keep the memory of the plan, which a captured graph goes on reading."""
        self._kept.append(self._plan)

    def forget_plans(self) -> None:
        """Let go of what was kept."""
        self._kept.clear()

    def _planned(self, into: Plan | None) -> Plan:
        batch = self._batch
        heads = batch.shape.heads
        return plan_attention(
            batch.seq_lens,
            batch.starts,
            batch.query.shape[0],
            heads.query,
            heads.kv,
            heads.size,
            max_query_len=batch.shape.queries,
            tiling=self._tiling,
            into=into,
        )

    @staticmethod
    def token_bytes(head_size: int) -> int:
        return k8v4_bytes(head_size)

    @property
    def once_a_step(self) -> Call | None:
        return lambda: self._planned(self._plan)

    def attend(self, layer: int) -> torch.Tensor:
        batch = self._batch
        paged_attention(
            batch.query,
            self._caches[layer],
            batch.block_table,
            batch.seq_lens,
            batch.starts,
            self._out,
            scale=batch.scale,
            plan=self._plan,
        )
        return self._out
