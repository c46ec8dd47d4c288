# SPDX-License-Identifier: Apache-2.0
"""flash-attn, FlashInfer and torch's own attention."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.contenders import Batch, Contender, copies, require_gpu
from benchmarks.gpu.environment import Unavailable
from benchmarks.gpu.shapes import PAGE


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"{name}: {error}") from error


class _Dense(Contender):
    """Attends to raw bf16 keys and values, one request after another, without pages."""

    stored = "bf16"

    def __init__(self, batch: Batch, layers: int) -> None:
        self._batch = batch
        key, value = batch.dense()
        self._keys, self._values = copies(key, layers), copies(value, layers)
        self.note = "raw K and V, no pages"


class FlashAttnPackage(_Dense):
    """The package flash-attn; its pages would have to hold 256 tokens."""

    name = "flash-attn bf16"

    def __init__(self, batch: Batch, layers: int) -> None:
        self._attend = _package("flash_attn").flash_attn_with_kvcache
        super().__init__(batch, layers)

    def attend(self, layer: int) -> torch.Tensor:
        batch, heads = self._batch, self._batch.shape.heads
        out: torch.Tensor = self._attend(
            batch.query.view(batch.shape.batch, batch.shape.queries, heads.query, heads.size),
            self._keys[layer],
            self._values[layer],
            cache_seqlens=batch.seq_lens,
            softmax_scale=batch.scale,
            causal=True,
        )
        return out.view(batch.query.shape)


class TorchFlash(_Dense):
    """torch's own FlashAttention 2."""

    name = "torch's FlashAttention 2 bf16"

    def __init__(self, batch: Batch, layers: int) -> None:
        require_gpu(batch.device)
        super().__init__(batch, layers)
        lengths = torch.arange(batch.shape.batch + 1, dtype=torch.int32, device=batch.device)
        self._key_starts = lengths * batch.shape.length

    def attend(self, layer: int) -> torch.Tensor:
        batch = self._batch
        key, value = self._keys[layer].flatten(0, 1), self._values[layer].flatten(0, 1)
        # Causal is aligned to the last key: new tokens are a request's last ones.
        out: torch.Tensor = torch.ops.aten._flash_attention_forward(
            batch.query, key, value, batch.starts, self._key_starts,
            batch.shape.queries, batch.shape.length, 0.0, True, False, scale=batch.scale,
        )[0]  # fmt: skip
        return out


class Sdpa(_Dense):
    """torch's scaled_dot_product_attention with torch's choice of kernel; whole prompts only."""

    name = "torch's SDPA bf16"

    def __init__(self, batch: Batch, layers: int) -> None:
        if batch.shape.queries != batch.shape.length:
            raise Unavailable("is measured on whole prompts only")
        super().__init__(batch, layers)

    def attend(self, layer: int) -> torch.Tensor:
        shape = self._batch.shape
        dims = (shape.batch, shape.queries, shape.heads.query, shape.heads.size)
        out = F.scaled_dot_product_attention(
            self._batch.query.view(dims).transpose(1, 2),
            self._keys[layer].transpose(1, 2),
            self._values[layer].transpose(1, 2),
            is_causal=True,
            scale=self._batch.scale,
            enable_gqa=shape.heads.group > 1,
        )
        return out.transpose(1, 2).reshape(self._batch.query.shape)


class FlashInferBf16(Contender):
    """Planned once; with tensor cores for decode, and its prefill kernel for several tokens."""

    name = "FlashInfer bf16"
    stored = "bf16"

    def __init__(self, batch: Batch, layers: int) -> None:
        require_gpu(batch.device)
        flashinfer = _package("flashinfer")
        shape, heads = batch.shape, batch.shape.heads
        dtype = torch.float8_e4m3fn if self.stored == "fp8" else torch.bfloat16
        self._query = batch.query
        self._out = torch.empty_like(batch.query)
        self._caches = [
            tuple(half.contiguous() for half in halves)
            for halves in batch.packed_caches(dtype, layers)
        ]
        # More than in vLLM, so that lack of memory never reduces the number of splits.
        workspace = torch.empty(512 << 20, dtype=torch.uint8, device=batch.device)
        counts = torch.arange(shape.batch + 1, dtype=torch.int32) * shape.pages
        indices = batch.block_table[:, : shape.pages].reshape(-1).contiguous()
        last = torch.full((shape.batch,), (shape.length - 1) % PAGE + 1, dtype=torch.int32)
        pages = (counts, indices, last, heads.query, heads.kv, heads.size, PAGE)
        options: dict[str, Any] = {
            "q_data_type": torch.bfloat16,
            "kv_data_type": dtype,
            "sm_scale": batch.scale,
        }
        self._wrapper: Any
        if shape.queries == 1:
            self._wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                workspace, "NHD", use_tensor_cores=True
            )
            self._wrapper.plan(*pages, **options)
        else:
            self._wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
            self._wrapper.plan(batch.starts.cpu(), *pages, causal=True, **options)
        self.note = f"version {flashinfer.__version__}"

    def attend(self, layer: int) -> torch.Tensor:
        self._wrapper.run(self._query, self._caches[layer], out=self._out)
        return self._out


class FlashInferFp8(FlashInferBf16):
    """One scale for a whole tensor, queries in bf16."""

    name = "FlashInfer fp8"
    stored = "fp8"
