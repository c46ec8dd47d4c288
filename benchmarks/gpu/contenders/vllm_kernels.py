# SPDX-License-Identifier: Apache-2.0
"""Run vLLM's kernels: its k8v4 (TurboQuant), Triton unified attention and FlashAttention."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.contenders import Batch, Contender, copies, require_gpu
from benchmarks.gpu.environment import Unavailable, has_flash_attention, vllm_module
from benchmarks.gpu.shapes import PAGE, token_bytes


class StockBackend:
    """vLLM's TurboQuant implementation of one layer, without an engine."""

    def __init__(self, batch: Batch) -> None:
        backend = vllm_module("vllm.v1.attention.backends.turboquant_attn")
        attention = vllm_module("vllm.config.attention")
        workspace = vllm_module("vllm.v1.worker.workspace")
        heads = batch.shape.heads
        # The constructor reads two parts of the engine's configuration: these defaults and, for
        # AMD's kernels, the length of the longest request.
        configuration = SimpleNamespace(
            attention_config=attention.AttentionConfig(),
            model_config=SimpleNamespace(max_model_len=batch.shape.length),
        )
        with mock.patch.object(backend, "get_current_vllm_config", return_value=configuration):
            self.implementation: Any = backend.TurboQuantAttentionImpl(
                heads.query, heads.size, batch.scale, heads.kv, kv_cache_dtype="turboquant_k8v4"
            )
        if not workspace.is_workspace_manager_initialized():
            workspace.init_workspace_manager(batch.device)
        self.layer: Any = SimpleNamespace()
        self.implementation._ensure_on_device(self.layer, batch.device)
        self.has_flash_attention = bool(backend._HAS_FLASH_ATTN)
        self.metadata: Any = backend.TurboQuantMetadata
        self.batch = batch

    def empty_cache(self) -> torch.Tensor:
        """Return a cache in vLLM's layout for k8v4: uint8 [blocks, PAGE, H, slot]."""
        heads = self.batch.shape.heads
        dims = (self.batch.pages, PAGE, heads.kv, token_bytes("k8v4", heads.size))
        return torch.zeros(dims, dtype=torch.uint8, device=self.batch.device)

    def store(
        self, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Quantise and store keys and values [n, H, D] as the backend does."""
        self.implementation._store_kv(key, value, cache, slots, self.layer)


class Stock(Contender):
    """vLLM's k8v4: two kernels for one new token per request, a loop over requests for several.

    Each of up to 128 new tokens of a request is decoded like a request of its own. With more,
    cached tokens are dequantised to fp16, copied next to the new keys and values, and
    FlashAttention or torch attends to them. Here, unlike in an engine, a graph captures the loop.
    """

    name = "stock k8v4"
    stored = "k8v4"

    def __init__(self, batch: Batch, layers: int) -> None:
        shape = batch.shape
        if shape.heads.size & (shape.heads.size - 1):
            raise Unavailable("its rotation needs a head size that is a power of two")
        super().__init__(batch, layers)
        self._backend = StockBackend(batch)
        first = self._backend.empty_cache()
        for key, value, slots in batch.stored():
            self._backend.store(key, value, first, slots)
        self._caches = copies(first, layers)
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
                self.note = (
                    f"FlashAttention {self._backend.implementation.fa_version}"
                    if self._backend.has_flash_attention
                    else "torch's scaled_dot_product_attention, because vLLM has no FlashAttention"
                )

    def attend(self, layer: int) -> torch.Tensor:
        own, implementation = self._backend.layer, self._backend.implementation
        cache, query, metadata = self._caches[layer], self.batch.query, self._metadata
        tables = own._tq_Pi, own._tq_centroids, own._tq_PiT
        if self.batch.shape.queries == 1:
            return implementation._decode_attention(query, cache, metadata, *tables, own)
        return implementation._prefill_attention(
            query, *self._new, cache, metadata, *tables, layer=own
        )


class _Paged(Contender):
    """A vLLM function that attends to packed caches. `options` are arguments of the function."""

    def _prepare(
        self, function: Any, batch: Batch, layers: int, dtype: torch.dtype, **options: Any
    ) -> None:
        self.batch, self._function = batch, function
        self._caches = batch.packed_caches(dtype, layers)
        self._out = torch.empty_like(batch.query)
        self._arguments = {
            # vLLM's attention layer quantises queries if the cache is fp8.
            "q": batch.query.to(dtype) if self.stored == "fp8" else batch.query,
            "out": self._out,
            "cu_seqlens_q": batch.starts,
            "max_seqlen_q": batch.shape.queries,
            "seqused_k": batch.seq_lens,
            "max_seqlen_k": batch.shape.length,
            "softmax_scale": batch.scale,
            "causal": True,
            "block_table": batch.block_table,
            **options,
        }

    def attend(self, layer: int) -> torch.Tensor:
        key, value = self._caches[layer]
        self._function(k=key, v=value, **self._arguments)
        return self._out


class VllmFlashBf16(_Paged):
    """vLLM's compiled FlashAttention over pages: version 3 on Hopper, 2 before.

    With version 3 the work is scheduled once a step, and split as in vLLM's full graphs.
    """

    name = "FlashAttention bf16"
    stored = "bf16"

    def __init__(self, batch: Batch, layers: int) -> None:
        require_gpu(batch.device)
        if not has_flash_attention():
            raise Unavailable("vLLM's compiled FlashAttention is not installed")
        interface = vllm_module("vllm.vllm_flash_attn")
        fa_utils = vllm_module("vllm.v1.attention.backends.fa_utils")
        attention = vllm_module("vllm.config.attention")
        shape, fp8 = batch.shape, self.stored == "fp8"
        version = fa_utils.get_flash_attn_version(head_size=shape.heads.size)
        if fp8 and version != 3:
            raise Unavailable(f"FlashAttention {version} supports no fp8 cache")
        dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
        options: dict[str, Any] = {"fa_version": version}
        if version == 3:
            splits = attention.AttentionConfig().flash_attn_max_num_splits_for_cuda_graph
            options["num_splits"] = splits
            options["scheduler_metadata"] = interface.get_scheduler_metadata(
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
        if fp8:
            ones = torch.ones((shape.batch, shape.heads.kv), device=batch.device)
            options |= dict.fromkeys(("q_descale", "k_descale", "v_descale"), ones)
        self.note = f"version {version}"
        self._prepare(interface.flash_attn_varlen_func, batch, layers, dtype, **options)


class VllmFlashFp8(VllmFlashBf16):
    """vLLM's FlashAttention 3 on an fp8 cache."""

    name = "FlashAttention fp8"
    stored = "fp8"


class UnifiedBf16(_Paged):
    """Triton unified attention; small batches of few new tokens are split into segments."""

    name = "unified bf16"
    stored = "bf16"

    def __init__(self, batch: Batch, layers: int) -> None:
        ops = vllm_module("vllm.v1.attention.ops.triton_unified_attention")
        modes = vllm_module("vllm.v1.kv_cache_interface").KVQuantMode
        fp8 = self.stored == "fp8"
        # This is e4m3fnuz on some AMD GPUs.
        fp8_dtype = vllm_module("vllm.platforms").current_platform.fp8_dtype()
        one = torch.ones(1, dtype=torch.float32, device=batch.device)
        scales = one.expand(batch.shape.batch, batch.shape.heads.kv)
        self._prepare(
            ops.unified_attention,
            batch,
            layers,
            fp8_dtype if fp8 else batch.dtype,
            window_size=(-1, -1),
            softcap=0,
            q_descale=one if fp8 else None,
            k_descale=scales,
            v_descale=scales,
            kv_quant_mode=modes.FP8_PER_TENSOR if fp8 else modes.NONE,
            **self._split_options(batch),
        )

    @staticmethod
    def _split_options(batch: Batch) -> dict[str, Any]:
        """Allocate the scratch memory of the split path, as vLLM's metadata builder does."""
        backend = vllm_module("vllm.v1.attention.backends.triton_attn")
        shape, device = batch.shape, batch.device
        # vLLM rounds the threshold to the size of a captured graph; 2 to 32 KV heads give one.
        threshold = backend.MIN_LAUNCH_GRID_SIZE_2D // shape.heads.kv
        segments = backend.NUM_PAR_SOFTMAX_SEGMENTS
        if device.type == "cuda" and torch.cuda.get_device_capability(device) == (12, 0):
            processors = torch.cuda.get_device_properties(device).multi_processor_count
            if shape.batch <= (processors - 1) // (segments * shape.heads.kv):
                segments = 64
        # vLLM 0.33 has a row for each token to verify, up to 8 per request.
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


class UnifiedFp8(UnifiedBf16):
    """Triton unified attention on an fp8 cache with one scale. Needs e4m3fn tensor cores."""

    name = "unified fp8"
    stored = "fp8"

    def __init__(self, batch: Batch, layers: int) -> None:
        device = batch.device
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
            raise Unavailable("vLLM's unified attention needs compute capability 8.9 for fp8")
        super().__init__(batch, layers)
