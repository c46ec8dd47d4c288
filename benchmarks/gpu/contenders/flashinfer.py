# SPDX-License-Identifier: Apache-2.0
"""FlashInfer over pages, where it is installed."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from benchmarks.gpu.contenders import Batch, Contender, Unavailable, copies
from benchmarks.gpu.contenders.unified import packed_cache
from benchmarks.gpu.shapes import PAGE, bf16_bytes, fp8_bytes

WORKSPACE_BYTES = 512 << 20
"""More than vLLM gives it, so that it never splits less for want of memory."""


class FlashInferBf16(Contender):
    """Planned once; with tensor cores for decode, and its prefill kernel for several tokens."""

    name = "FlashInfer bf16"
    stored = "bf16"

    def __init__(self, batch: Batch, layers: int) -> None:
        if batch.device.type != "cuda":
            raise Unavailable("there is no GPU")
        try:
            flashinfer = importlib.import_module("flashinfer")
        except ImportError as error:
            raise Unavailable(f"flashinfer: {error}") from error
        shape = batch.shape
        heads = shape.heads
        dtype = torch.float8_e4m3fn if self.stored == "fp8" else torch.bfloat16
        self._query = batch.query
        self._out = torch.empty_like(batch.query)
        caches = copies(packed_cache(batch, dtype), layers)
        self._caches = [
            tuple(half.contiguous() for half in cache.split(heads.size, dim=-1)) for cache in caches
        ]
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=batch.device)
        counts = torch.arange(shape.batch + 1, dtype=torch.int32) * shape.pages
        indices = batch.block_table[:, : shape.pages].reshape(-1).contiguous()
        last = torch.full((shape.batch,), (shape.length - 1) % PAGE + 1, dtype=torch.int32)
        options = {
            "q_data_type": torch.bfloat16,
            "kv_data_type": dtype,
            "sm_scale": batch.scale,
        }
        self._wrapper: Any
        if shape.queries == 1:
            self._wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                workspace, "NHD", use_tensor_cores=True
            )
            self._wrapper.plan(
                counts, indices, last, heads.query, heads.kv, heads.size, PAGE, **options
            )
        else:
            self._wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
            self._wrapper.plan(
                batch.starts.cpu(),
                counts,
                indices,
                last,
                heads.query,
                heads.kv,
                heads.size,
                PAGE,
                causal=True,
                **options,
            )
        self.note = f"version {flashinfer.__version__}"

    @staticmethod
    def token_bytes(head_size: int) -> int:
        return bf16_bytes(head_size)

    def attend(self, layer: int) -> torch.Tensor:
        self._wrapper.run(self._query, self._caches[layer], out=self._out)
        return self._out


class FlashInferFp8(FlashInferBf16):
    """One scale for a whole tensor, queries in bf16."""

    name = "FlashInfer fp8"
    stored = "fp8"

    @staticmethod
    def token_bytes(head_size: int) -> int:
        return fp8_bytes(head_size)
