# SPDX-License-Identifier: Apache-2.0
"""vLLM's Triton unified attention on bf16 and fp8 caches, launched as its backend does."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.contenders import Batch, Contender, Unavailable, copies
from benchmarks.gpu.environment import VLLM
from benchmarks.gpu.shapes import PAGE, bf16_bytes, fp8_bytes


def packed_cache(batch: Batch, dtype: torch.dtype) -> torch.Tensor:
    """Return a filled cache as vLLM lays it out: [blocks, PAGE, H, K's dims and V's dims]."""
    heads = batch.shape.heads
    cache = torch.zeros(
        (batch.pages * PAGE, heads.kv, 2 * heads.size), dtype=dtype, device=batch.device
    )
    # Bits are written, for torch cannot index fp8 numbers.
    bits = cache.view(torch.uint8) if dtype.itemsize == 1 else cache
    for key, value, slots in batch.stored():
        both = torch.cat([key, value], dim=-1).to(dtype)
        bits[slots] = both.view(torch.uint8) if dtype.itemsize == 1 else both
    return cache.view(batch.pages, PAGE, heads.kv, 2 * heads.size)


class UnifiedBf16(Contender):
    """Small batches of few new tokens are split over the sequence in 16 segments, as there."""

    name = "unified bf16"
    stored = "bf16"

    def __init__(self, batch: Batch, layers: int) -> None:
        ops = VLLM.module("vllm.v1.attention.ops.triton_unified_attention")
        backend = VLLM.module("vllm.v1.attention.backends.triton_attn")
        modes = VLLM.module("vllm.v1.kv_cache_interface").KVQuantMode
        self._attend: Any = ops.unified_attention
        self._batch = batch
        fp8 = self.stored == "fp8"
        # e4m3fnuz on some of AMD's.
        fp8_dtype = VLLM.module("vllm.platforms").current_platform.fp8_dtype()
        dtype = fp8_dtype if fp8 else batch.dtype
        caches = copies(packed_cache(batch, dtype), layers)
        self._caches = [cache.split(batch.shape.heads.size, dim=-1) for cache in caches]
        self._out = torch.empty_like(batch.query)
        # vLLM's attention layer hands fp8 queries to this backend where the cache is fp8.
        self._query = batch.query.to(dtype) if fp8 else batch.query
        one = torch.ones(1, dtype=torch.float32, device=batch.device)
        scales = one.expand(batch.shape.batch, batch.shape.heads.kv)
        self._options = {
            "q_descale": one if fp8 else None,
            "k_descale": scales,
            "v_descale": scales,
            "kv_quant_mode": modes.FP8_PER_TENSOR if fp8 else modes.NONE,
            **self._split(backend),
        }

    def _split(self, backend: Any) -> dict[str, Any]:
        """Return the scratch memory of the split path, as the metadata builder makes it."""
        shape, device = self._batch.shape, self._batch.device
        # Full graphs take the nearest size that is captured, which for 2 to 32 KV heads is this.
        threshold = backend.MIN_LAUNCH_GRID_SIZE_2D // shape.heads.kv
        segments = backend.NUM_PAR_SOFTMAX_SEGMENTS
        if device.type == "cuda" and torch.cuda.get_device_capability(device) == (12, 0):
            processors = torch.cuda.get_device_properties(device).multi_processor_count
            if shape.batch <= (processors - 1) // (segments * shape.heads.kv):
                segments = 64
        # vLLM 0.33 has a row for each token to verify, of up to 8 a request.
        rows = threshold * min(shape.queries, 8)
        dims = (rows, shape.heads.query, segments)
        padded = 1 << (shape.heads.size - 1).bit_length()
        return {
            "seq_threshold_3D": threshold,
            "num_par_softmax_segments": segments,
            "softmax_segm_output": torch.empty((*dims, padded), device=device),
            "softmax_segm_max": torch.empty(dims, device=device),
            "softmax_segm_expsum": torch.empty(dims, device=device),
        }

    @staticmethod
    def token_bytes(head_size: int) -> int:
        return bf16_bytes(head_size)

    def attend(self, layer: int) -> torch.Tensor:
        key, value = self._caches[layer]
        batch = self._batch
        self._attend(
            q=self._query,
            k=key,
            v=value,
            out=self._out,
            cu_seqlens_q=batch.starts,
            max_seqlen_q=batch.shape.queries,
            seqused_k=batch.seq_lens,
            max_seqlen_k=batch.shape.length,
            softmax_scale=batch.scale,
            causal=True,
            window_size=(-1, -1),
            block_table=batch.block_table,
            softcap=0,
            **self._options,
        )
        return self._out


class UnifiedFp8(UnifiedBf16):
    """One scale for a whole tensor; needs tensor cores that take e4m3fn."""

    name = "unified fp8"
    stored = "fp8"

    def __init__(self, batch: Batch, layers: int) -> None:
        device = batch.device
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
            raise Unavailable("vLLM's unified attention takes fp8 from compute capability 8.9 on")
        super().__init__(batch, layers)

    @staticmethod
    def token_bytes(head_size: int) -> int:
        return fp8_bytes(head_size)
