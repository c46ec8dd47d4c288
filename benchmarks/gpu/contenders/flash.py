# SPDX-License-Identifier: Apache-2.0
"""FlashAttention (vLLM's, flash-attn's and torch's) and torch's scaled_dot_product_attention."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.contenders import Batch, Contender, Unavailable, copies
from benchmarks.gpu.contenders.unified import packed_cache
from benchmarks.gpu.environment import VLLM, FlashAttentionKind
from benchmarks.gpu.shapes import PAGE, bf16_bytes, fp8_bytes


class VllmFlashBf16(Contender):
    """vLLM's compiled FlashAttention over pages: version 3 on Hopper, 2 before.

    With version 3 the work is scheduled once a step, with the splits of vLLM's full graphs.
    """

    name = "FlashAttention bf16"
    stored = "bf16"

    def __init__(self, batch: Batch, layers: int) -> None:
        if batch.device.type != "cuda":
            raise Unavailable("there is no GPU")
        if VLLM.flash_attention_kind() is not FlashAttentionKind.COMPILED:
            raise Unavailable("vLLM's compiled FlashAttention is not here")
        interface = VLLM.module("vllm.vllm_flash_attn")
        fa_utils = VLLM.module("vllm.v1.attention.backends.fa_utils")
        attention = VLLM.module("vllm.config.attention")
        shape = batch.shape
        self._attend: Any = interface.flash_attn_varlen_func
        self._batch = batch
        version = fa_utils.get_flash_attn_version(head_size=shape.heads.size)
        if self.stored == "fp8" and version != 3:
            raise Unavailable(f"FlashAttention {version} takes no fp8 cache")
        dtype = torch.float8_e4m3fn if self.stored == "fp8" else torch.bfloat16
        caches = copies(packed_cache(batch, dtype), layers)
        self._caches = [cache.split(shape.heads.size, dim=-1) for cache in caches]
        self._query = batch.query.to(dtype)
        self._out = torch.empty_like(batch.query)
        self._options: dict[str, Any] = {"fa_version": version}
        if version == 3:
            splits = attention.AttentionConfig().flash_attn_max_num_splits_for_cuda_graph
            self._options["num_splits"] = splits
            self._options["scheduler_metadata"] = interface.get_scheduler_metadata(
                batch_size=shape.batch,
                max_seqlen_q=shape.queries,
                max_seqlen_k=shape.length,
                num_heads_q=shape.heads.query,
                num_heads_kv=shape.heads.kv,
                headdim=shape.heads.size,
                cache_seqlens=batch.seq_lens,
                qkv_dtype=dtype,
                cu_seqlens_q=batch.starts,
                page_size=PAGE,
                causal=True,
                num_splits=splits,
            )
        if self.stored == "fp8":
            ones = torch.ones((shape.batch, shape.heads.kv), device=batch.device)
            self._options |= dict.fromkeys(("q_descale", "k_descale", "v_descale"), ones)
        self.note = f"version {version}"

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
            block_table=batch.block_table,
            **self._options,
        )
        return self._out


class VllmFlashFp8(VllmFlashBf16):
    """Version 3 on an fp8 cache."""

    name = "FlashAttention fp8"
    stored = "fp8"

    @staticmethod
    def token_bytes(head_size: int) -> int:
        return fp8_bytes(head_size)


class _Dense(Contender):
    """Attends to raw bf16 keys and values, one request after another, outside any page."""

    stored = "bf16"

    def __init__(self, batch: Batch, layers: int) -> None:
        self._batch = batch
        key, value = batch.dense()
        self._keys, self._values = copies(key, layers), copies(value, layers)
        self.note = "raw K and V, no pages"

    @staticmethod
    def token_bytes(head_size: int) -> int:
        return bf16_bytes(head_size)


class FlashAttnPackage(_Dense):
    """The package flash-attn; its pages would have to hold 256 tokens."""

    name = "flash-attn bf16"

    def __init__(self, batch: Batch, layers: int) -> None:
        try:
            package = importlib.import_module("flash_attn")
        except ImportError as error:
            raise Unavailable(f"flash_attn: {error}") from error
        self._attend: Any = package.flash_attn_with_kvcache
        super().__init__(batch, layers)

    def attend(self, layer: int) -> torch.Tensor:
        shape, batch = self._batch.shape, self._batch
        query = batch.query.view(shape.batch, shape.queries, shape.heads.query, shape.heads.size)
        out: torch.Tensor = self._attend(
            query,
            self._keys[layer],
            self._values[layer],
            cache_seqlens=batch.seq_lens,
            softmax_scale=batch.scale,
            causal=True,
        )
        return out.view(batch.query.shape)


class TorchFlash(_Dense):
    """The FlashAttention 2 that torch itself brings."""

    name = "torch's FlashAttention 2 bf16"

    def __init__(self, batch: Batch, layers: int) -> None:
        if batch.device.type != "cuda":
            raise Unavailable("there is no GPU")
        super().__init__(batch, layers)
        lengths = torch.arange(batch.shape.batch + 1, dtype=torch.int32, device=batch.device)
        self._key_starts = lengths * batch.shape.length

    def attend(self, layer: int) -> torch.Tensor:
        batch = self._batch
        # Causal is aligned to the last key: new tokens are a request's last ones.
        out: torch.Tensor = torch.ops.aten._flash_attention_forward(
            batch.query,
            self._keys[layer].flatten(0, 1),
            self._values[layer].flatten(0, 1),
            batch.starts,
            self._key_starts,
            batch.shape.queries,
            batch.shape.length,
            0.0,
            True,
            False,
            scale=batch.scale,
        )[0]
        return out


class Sdpa(_Dense):
    """torch's scaled_dot_product_attention with what torch picks; whole prompts only."""

    name = "torch's SDPA bf16"

    def __init__(self, batch: Batch, layers: int) -> None:
        if batch.shape.queries != batch.shape.length:
            raise Unavailable("is measured on whole prompts")
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
