# SPDX-License-Identifier: Apache-2.0
"""vLLM's own k8v4, TurboQuant, by way of its backend's own code."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.contenders import Batch, Contender, Unavailable, copies
from benchmarks.gpu.environment import VLLM
from benchmarks.gpu.shapes import PAGE, k8v4_bytes

PRESET = "turboquant_k8v4"


class Backend:
    """vLLM's TurboQuant implementation of one layer, outside an engine."""

    def __init__(self, batch: Batch) -> None:
        backend = VLLM.module("vllm.v1.attention.backends.turboquant_attn")
        attention = VLLM.module("vllm.config.attention")
        workspace = VLLM.module("vllm.v1.worker.workspace")
        heads = batch.shape.heads
        # What its constructor asks an engine's configuration for: these defaults, and the longest
        # request, for AMD's kernels only.
        configuration = SimpleNamespace(
            attention_config=attention.AttentionConfig(),
            model_config=SimpleNamespace(max_model_len=batch.shape.length),
        )
        with mock.patch.object(backend, "get_current_vllm_config", return_value=configuration):
            self.implementation: Any = backend.TurboQuantAttentionImpl(
                heads.query, heads.size, batch.scale, heads.kv, kv_cache_dtype=PRESET
            )
        if not workspace.is_workspace_manager_initialized():
            workspace.init_workspace_manager(batch.device)
        self.layer: Any = SimpleNamespace()
        self.implementation._ensure_on_device(self.layer, batch.device)
        self.has_flash_attention = bool(backend._HAS_FLASH_ATTN)
        self.metadata: Any = backend.TurboQuantMetadata

    def store(
        self, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Quantise and store as its backend does.

        Args:
            key: [n, H, D].
            value: [n, H, D].
            cache: uint8 [blocks, PAGE, H, slot bytes].
            slots: int64 [n].
        """
        self.implementation._store_kv(key, value, cache, slots, self.layer)

    def prefill_way(self) -> str:
        """Return what it attends to raw keys and values with."""
        if not self.has_flash_attention:
            return "torch's scaled_dot_product_attention, for vLLM has no FlashAttention here"
        return (
            f"FlashAttention {self.implementation.fa_version}, {VLLM.flash_attention_kind().value}"
        )


def empty_cache(batch: Batch) -> torch.Tensor:
    """Return a cache as vLLM lays it out for its k8v4: uint8 [blocks, PAGE, H, slot]."""
    heads = batch.shape.heads
    dims = (batch.pages, PAGE, heads.kv, k8v4_bytes(heads.size))
    return torch.zeros(dims, dtype=torch.uint8, device=batch.device)


class Stock(Contender):
    """Decode by its two kernels; several new tokens by its loop over requests.

    Of up to 128 new tokens a request each is decoded as a request of its own; with more, what is
    cached is dequantised to fp16, copied beside the new keys and values, and attended to by
    FlashAttention or torch. Its loop is captured in a graph here, which it is not in an engine.
    """

    name = "stock k8v4"
    stored = "k8v4"

    def __init__(self, batch: Batch, layers: int) -> None:
        if batch.shape.heads.size & (batch.shape.heads.size - 1):
            raise Unavailable("its rotation wants a head size that is a power of two")
        self._batch = batch
        self._backend = Backend(batch)
        first = empty_cache(batch)
        for key, value, slots in batch.stored():
            self._backend.store(key, value, first, slots)
        self._caches = copies(first, layers)
        shape = batch.shape
        tokens = batch.query.shape[0]
        decode = shape.queries == 1
        self._metadata = self._backend.metadata(
            seq_lens=batch.seq_lens,
            slot_mapping=torch.zeros(tokens, dtype=torch.int64, device=batch.device),
            block_table=batch.block_table,
            query_start_loc=batch.starts,
            num_actual_tokens=tokens,
            max_query_len=shape.queries,
            max_seq_len=shape.length,
            is_prefill=not decode,
            num_decodes=shape.batch if decode else 0,
            num_decode_tokens=shape.batch if decode else 0,
            query_start_loc_cpu=batch.starts.cpu(),
            seq_lens_cpu=batch.seq_lens.cpu(),
        )
        if not decode:
            self._new = batch.new()
            if shape.queries > 128:
                self.note = self._backend.prefill_way()

    @staticmethod
    def token_bytes(head_size: int) -> int:
        return k8v4_bytes(head_size)

    def attend(self, layer: int) -> torch.Tensor:
        own, cache = self._backend.layer, self._caches[layer]
        attend = self._backend.implementation
        query, metadata = self._batch.query, self._metadata
        rotation, centroids, rotated = own._tq_Pi, own._tq_centroids, own._tq_PiT
        if self._batch.shape.queries == 1:
            return attend._decode_attention(
                query, cache, metadata, rotation, centroids, rotated, own
            )
        return attend._prefill_attention(
            query, *self._new, cache, metadata, rotation, centroids, rotated, layer=own
        )
