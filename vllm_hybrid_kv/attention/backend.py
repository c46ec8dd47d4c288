# SPDX-License-Identifier: Apache-2.0
"""Implements vLLM's attention backend interface with the k8v4 kernels, for every device.

A layer's cache is vLLM's uint8 view `[num_blocks, num_kv_heads, block_size, slot_bytes]`. The
kernels treat each `[block_size, slot_bytes]` part as one k8v4 region (see `kernels/k8v4.py`). How
a region is arranged does not matter to vLLM, because connectors and offloading move whole pages.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
    max_decode_query_len,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout, KVCacheSpec

from vllm_hybrid_kv.attention import context_parallel, flash, unsupported
from vllm_hybrid_kv.attention.kernel_factory import Kernels, kernels_for
from vllm_hybrid_kv.constants import BACKEND, CACHE_DTYPE
from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.state import STATE

COMPUTE_CAPABILITY = (8, 0)
"""The lowest compute capability that we support. Below it, Triton has no int8 tensor cores."""

ROCM_GPUS = ("gfx942", "gfx950")


def refuse_compute_capability() -> str:
    """Say which compute capability the k8v4 kernels need, and which instructions need it."""
    major, minor = COMPUTE_CAPABILITY
    return (
        f"the k8v4 kernels need compute capability {major}.{minor} for int8 products of tensor "
        "cores"
    )


def refuse_rocm_gpu(name: str) -> str | None:
    """Say why an AMD GPU (such as `gfx90a:sramecc+:xnack-`) is not supported, or return None."""
    if name.split(":")[0] in ROCM_GPUS:
        return None
    return (
        f"of AMD's GPUs the k8v4 kernels run on {' and '.join(ROCM_GPUS)}, not on {name}: older "
        "ones multiply the fp16 subnormals of value codes as zeros, and RDNA has no MFMA int8"
    )


def refuse_nvidia_gpu(capability: DeviceCapability) -> str | None:
    """Say why NVIDIA GPUs of a compute capability are not supported, or return None."""
    if (capability.major, capability.minor) >= COMPUTE_CAPABILITY:
        return None
    lowest = "{}.{}".format(*COMPUTE_CAPABILITY)
    return (
        f"the k8v4 kernels run on NVIDIA GPUs of compute capability {lowest} and newer, and this "
        f"one has {capability.major}.{capability.minor}: Triton cannot compile int8 tensor-core "
        "products for it"
    )


class K8V4AttentionBackend(AttentionBackend):
    """Attention over a paged k8v4 KV cache, registered as vLLM's TURBOQUANT."""

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = [CACHE_DTYPE]

    @staticmethod
    def get_name() -> str:
        return BACKEND

    @staticmethod
    def get_impl_cls() -> type[K8V4AttentionImpl]:
        return K8V4AttentionImpl

    @staticmethod
    def get_builder_cls() -> type[K8V4MetadataBuilder]:
        return K8V4MetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(k8v4.TILE_TOKENS)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return k8v4.unsupported_head_size(head_size) is None

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        # Accept checkpoints with scales per head, but ignore the scales: k8v4 computes its own.
        return True

    @classmethod
    def validate_configuration(
        cls, *args: Any, device_capability: DeviceCapability, **kwargs: Any
    ) -> list[str]:
        """Return why this backend cannot serve a layer: vLLM's own reasons, then the GPU's."""
        reasons = super().validate_configuration(
            *args, device_capability=device_capability, **kwargs
        )
        if current_platform.is_rocm():
            refusal = refuse_rocm_gpu(torch.cuda.get_device_properties(0).gcnArchName)
        else:
            refusal = refuse_nvidia_gpu(device_capability)
        return reasons if refusal is None else [*reasons, refusal]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Return the only layout in which a head's part of a block is contiguous."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Return a k8v4 layer's spec with slots of `slot_bytes(head_size)` bytes."""
        if spec.state_content_bytes is not None or not spec.kv_quant_mode.is_turboquant:
            return spec
        if spec.head_size_v not in (None, spec.head_size):
            refusal = unsupported.refuse_value_size(spec.head_size, spec.head_size_v)
            raise unsupported.UnsupportedLayerError(refusal)
        return replace(spec, state_content_bytes=k8v4.slot_bytes(spec.head_size))


@dataclass
class K8V4Metadata(AttentionMetadata):
    """The metadata that the layers of a KV group share in a step. All tensors are on the device.

    The model runner also has lengths on the host. They are exact for prefills. For other requests
    they are upper bounds, because they count rejected draft tokens as accepted, and this backend
    does not use them.

    Attributes:
        num_tokens: Tokens of the step, including padding up to the size of a captured graph.
        decode_query_len: Requests with at most so many new tokens count as decodes.
        max_query_len: An upper bound of the new tokens of any request, at least
            `decode_query_len`.
        query_start_loc: int32 [B + 1], the index of each request's first token in the step.
        seq_lens: int32 [B], exact lengths including the step's tokens.
        block_table: int32 [B, max blocks].
        causal: Whether a query attends only to its own and earlier positions.
        starts_on_host: `query_start_loc` as a list, or empty if there are only decodes.
        lengths_on_host: The lengths on the host. Empty if there are only decodes, or if the runner
            has no lengths on the host.
        interleave_size: With decode context parallelism, how many tokens in a row a rank stores.
        has_context: Whether any request has tokens before the step, by the host's upper bounds, so
            that all ranks have the same value.
        plans: The kernels' work plans. The first layer that needs a plan makes it, and layers with
            the same key (see `Kernels.attend`) share it.
    """

    num_tokens: int
    decode_query_len: int
    max_query_len: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    causal: bool
    starts_on_host: list[int]
    lengths_on_host: list[int]
    plans: dict[Hashable, Any]
    interleave_size: int = 1
    has_context: bool = True


class K8V4MetadataBuilder(AttentionMetadataBuilder[K8V4Metadata]):
    """Builds a step's metadata for both model runners of vLLM.

    The first layer plans the work on the device, from tensors that the runner writes for every
    step. A captured graph contains the planning, so replays use the current lengths.
    """

    # KV groups with equal specs differ only in their block tables, so they can share metadata.
    supports_update_block_table = True
    supports_draft_decode_metadata_update = True

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._decode_query_len = max_decode_query_len(vllm_config)
        self._parallel_config = vllm_config.parallel_config
        layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase, layer_names)
        ranks = self._parallel_config.decode_context_parallel_size
        for name, layer in layers.items():
            refusal = unsupported.refuse_sharding(
                layer.impl.dcp_world_size, ranks if kv_cache_spec.dcp_sharded else 1
            )
            if refusal is not None:
                raise unsupported.UnsupportedLayerError(refusal, f"layer {name}")
        # Compile and test the kernels while the engine starts, not during its first request.
        kernels_for(device, STATE.settings).warm_up(
            {name: layer.impl for name, layer in layers.items()},
            kv_cache_spec,
            vllm_config.model_config.dtype,
            device,
            max_requests=vllm_config.scheduler_config.max_num_seqs,
            decode_query_len=self._decode_query_len,
        )

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        if current_platform.is_cuda_alike():
            return AttentionCGSupport.UNIFORM_BATCH
        return AttentionCGSupport.NEVER

    @classmethod
    def get_varlen_cudagraph_max_query_len(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> int | None:
        """Return how many new tokens a request may have in a replayed decode graph."""
        return max_decode_query_len(vllm_config)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> K8V4Metadata:
        """Return the metadata of one step.

        Raises:
            ValueError: The batch mixes causal and bidirectional requests.
        """
        common = common_attn_metadata
        if isinstance(common.causal, torch.Tensor):
            raise ValueError(
                f"layers {', '.join(self.layer_names)}: a batch that mixes causal and "
                f"bidirectional requests cannot be served from a {CACHE_DTYPE} cache; serve the "
                "model with --kv-cache-dtype auto"
            )
        starts: list[int] = []
        lengths: list[int] = []
        if common.max_query_len > self._decode_query_len:
            starts = common.query_start_loc_cpu.tolist()
            if common.seq_lens_cpu_upper_bound is not None:
                lengths = common.seq_lens_cpu_upper_bound.tolist()
        return K8V4Metadata(
            num_tokens=common.num_actual_tokens,
            decode_query_len=self._decode_query_len,
            # With adaptive verification, the host's count of a request's drafts may be too low.
            max_query_len=max(common.max_query_len, self._decode_query_len),
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            causal=common.causal,
            starts_on_host=starts,
            lengths_on_host=lengths,
            plans={},
            interleave_size=self._parallel_config.cp_kv_cache_interleave_size,
            has_context=self._parallel_config.decode_context_parallel_size == 1
            or _has_context(common),
        )

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> K8V4Metadata:
        """Build metadata for a graph capture, with sequences as short as possible."""
        metadata = self.build(0, common_attn_metadata)
        # vLLM sets `seq_lens` to the longest lengths, which would make the warm-up runs slow.
        metadata.seq_lens.fill_(metadata.max_query_len)
        # The requests above have no context, but those of replays may.
        return replace(metadata, has_context=True)

    def update_block_table(
        self, metadata: K8V4Metadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> K8V4Metadata:
        """Return metadata for another KV group of the same spec. Both groups share the plans."""
        return replace(metadata, block_table=blk_table)

    def update_draft_decode_metadata(self, metadata: K8V4Metadata) -> None:
        """Drop the plans, because each drafted token makes the sequences longer."""
        metadata.plans.clear()


def _has_context(common: CommonAttentionMetadata) -> bool:
    lengths = common.seq_lens_cpu_upper_bound
    if lengths is None:
        return True
    counts = common.query_start_loc_cpu.diff()
    return bool((lengths[: len(counts)] > counts).any())


class K8V4AttentionImpl(AttentionImpl[K8V4Metadata]):
    """Stores one layer's keys and values in k8v4 pages, and computes attention over them.

    Raises:
        UnsupportedLayerError: The kernels do not implement a parameter of the layer.
    """

    supports_dcp = True
    can_return_lse_for_decode = True
    # vLLM requires this for speculative decoding with DCP.
    supports_mtp_with_cp_non_trivial_interleave_size = True

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **extra: Any,
    ) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = float(scale)
        refusal = unsupported.refuse_context_parallel(
            self.dcp_world_size, head_size=head_size, window=sliding_window
        ) or unsupported.refuse_implementation(
            kv_cache_dtype=kv_cache_dtype,
            num_heads=num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=head_size,
            alibi_slopes=alibi_slopes,
            attn_type=attn_type,
            extra=extra,
        )
        if refusal is not None:
            raise unsupported.UnsupportedLayerError(refusal)
        self.kv_cache_dtype = kv_cache_dtype
        self.sliding_window = sliding_window
        self.soft_cap = float(logits_soft_cap or 0.0)
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        self.flash = flash.choose(head_size, soft_cap=self.soft_cap > 0)
        if self.dcp_world_size > 1:
            self.combine = context_parallel.combine_function()
        self._kernels: Kernels | None = None

    def _kernels_for(self, tensor: torch.Tensor) -> Kernels:
        # The constructor cannot choose kernels, because weights may move to another device later.
        if self._kernels is None:
            self._kernels = kernels_for(tensor.device, STATE.settings)
        return self._kernels

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Quantise a step's keys and values into their slots.

        Args:
            layer: The attention layer.
            key, value: [T, num_kv_heads, head_size]; T is at least the number of slots.
            kv_cache: uint8 [num_blocks, num_kv_heads, block_size, slot_bytes].
            slot_mapping: int64, the slot of each token. Tokens with a negative slot are not stored.
        """
        self._kernels_for(kv_cache).store(key, value, kv_cache, slot_mapping)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: K8V4Metadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend from a step's queries to the cache, which already holds the step's own tokens.

        Args:
            layer: The attention layer.
            query: [T, num_heads, head_size].
            key, value: Read only with decode context parallelism; else the cache holds them.
            kv_cache: uint8 [num_blocks, num_kv_heads, block_size, slot_bytes].
            attn_metadata: The step's metadata; None while vLLM profiles memory.
            output: [T, num_heads, head_size], written for all but padding tokens.
            output_scale, output_block_scale: None, because output quantisation is not fused.

        Returns:
            `output`.
        """
        kernels = self._kernels_for(query)
        if attn_metadata is None:
            kernels.reserve(self, query.device)
            if self.dcp_world_size > 1:
                context_parallel.reserve(self, query)
            return output.fill_(0)
        tokens = attn_metadata.num_tokens
        if self.dcp_world_size > 1:
            new = (query[:tokens], key[:tokens], value[:tokens])
            context_parallel.attend(kernels, self, attn_metadata, *new, kv_cache, output[:tokens])
        else:
            kernels.attend(self, attn_metadata, query[:tokens], kv_cache, output[:tokens])
        return output
