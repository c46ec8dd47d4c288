# SPDX-License-Identifier: Apache-2.0
"""Run vLLM's kernels: its k8v4 (TurboQuant), Triton unified attention and FlashAttention."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.contenders import Batch, Contender, Ours, copies, require_gpu
from benchmarks.gpu.environment import Unavailable, has_flash_attention, vllm_module
from benchmarks.gpu.shapes import PAGE, Heads, token_bytes


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
            model_config=SimpleNamespace(max_model_len=batch.shape.longest),
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
        # vLLM puts decodes first.
        decodes = shape.new.count(1)
        self._metadata = self._backend.metadata(
            seq_lens=batch.seq_lens,
            slot_mapping=torch.zeros(tokens, dtype=torch.int64, device=batch.device),
            block_table=batch.block_table,
            query_start_loc=batch.starts,
            num_actual_tokens=tokens,
            max_query_len=shape.most_new,
            max_seq_len=shape.longest,
            is_prefill=shape.most_new > 1,
            num_decodes=decodes,
            num_decode_tokens=decodes,
            query_start_loc_cpu=batch.starts.cpu(),
            seq_lens_cpu=batch.seq_lens.cpu(),
        )
        self._new = batch.new()
        self._out = torch.empty_like(batch.query)
        if shape.most_new > 128:
            self.note = (
                f"FlashAttention {self._backend.implementation.fa_version}"
                if self._backend.has_flash_attention
                else "torch's scaled_dot_product_attention, because vLLM has no FlashAttention"
            )

    def attend(self, layer: int) -> torch.Tensor:
        cache = self._caches[layer].transpose(1, 2)
        own, implementation = self._backend.layer, self._backend.implementation
        implementation.forward(own, self.batch.query, *self._new, cache, self._metadata, self._out)
        return self._out


def our_backend(
    heads: Heads, dtype: torch.dtype, device: torch.device, *, test: bool, **parameters: Any
) -> tuple[Any, Any]:
    """Make our implementation of a layer and its metadata builder, without an engine.

    Args:
        heads: The layer's heads.
        dtype: Of queries, keys and values.
        device: The layer's device.
        test: Whether to run the known-answer test that runs when an engine starts.
        parameters: More parameters of the layer.
    """
    backend = vllm_module("vllm_hybrid_kv.attention.backend")
    config = vllm_module("vllm.config")
    specs = vllm_module("vllm.v1.kv_cache_interface")
    engine = config.VllmConfig(device_config=config.DeviceConfig(device=device.type))
    engine.model_config = SimpleNamespace(
        max_model_len=1 << 20, dtype=dtype, get_num_attention_heads=lambda parallel: heads.query
    )
    spec = specs.FullAttentionSpec(
        block_size=PAGE, num_kv_heads=heads.kv, head_size=heads.size, dtype=torch.uint8,
        kv_quant_mode=specs.KVQuantMode.TURBOQUANT_K8V4,
    )  # fmt: skip
    with config.set_current_vllm_config(engine):
        implementation = backend.K8V4AttentionImpl(
            heads.query, heads.size, heads.size**-0.5, heads.kv,
            kv_cache_dtype="turboquant_k8v4", **parameters,
        )  # fmt: skip
        if getattr(implementation, "flash", None) and not has_flash_attention():
            # This is a stand-in in Python.
            implementation.flash = None
        layers = {"layer": SimpleNamespace(impl=implementation)} if test else {}
        with mock.patch.object(backend, "get_layers_from_vllm_config", return_value=layers):
            return implementation, backend.K8V4MetadataBuilder(spec, [], engine, device)


class OursInVllm(Contender):
    """Our attention backend, as vLLM calls it: it may launch several kernels.

    vLLM runs mixed batches and prefills without a CUDA graph. A graph runs the same kernels, and
    excludes the time in which Python launches them.
    """

    name = "ours in vLLM"
    stored = "k8v4"

    def __init__(self, batch: Batch, layers: int) -> None:
        super().__init__(batch, layers)
        shape, tokens = batch.shape, batch.query.shape[0]
        interface = vllm_module("vllm.v1.attention.backend")
        self._implementation, builder = our_backend(
            shape.heads, batch.dtype, batch.device, test=False
        )
        flash = getattr(self._implementation, "flash", None)
        self.note = f"FlashAttention {flash.version}" if flash else "our kernels only"
        self._caches = Ours(batch, layers).caches
        self._new, self._out = batch.new(), torch.empty_like(batch.query)
        self._metadata = builder.build(0, interface.CommonAttentionMetadata(
            query_start_loc=batch.starts, query_start_loc_cpu=batch.starts.cpu(),
            seq_lens=batch.seq_lens, seq_lens_cpu_upper_bound=batch.seq_lens.cpu(),
            num_reqs=shape.batch, num_actual_tokens=tokens, max_query_len=shape.most_new,
            max_seq_len=shape.longest, block_table_tensor=batch.block_table, causal=True,
            slot_mapping=torch.zeros(tokens, dtype=torch.int64, device=batch.device),
        ))  # fmt: skip

    def attend(self, layer: int) -> torch.Tensor:
        cache, metadata = self._caches[layer], self._metadata
        self._implementation.forward(None, self.batch.query, *self._new, cache, metadata, self._out)
        for *key, _ in list(metadata.plans):
            # Otherwise a captured call would plan as for a batch of decodes.
            metadata.plans[(*key, True)] = metadata.plans[(*key, False)]
        return self._out


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
            "max_seqlen_q": batch.shape.most_new,
            "seqused_k": batch.seq_lens,
            "max_seqlen_k": batch.shape.longest,
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
                max_seqlen_q=shape.most_new,
                max_seqlen_k=shape.longest,
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
        rows = threshold * min(shape.most_new, 8)
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
