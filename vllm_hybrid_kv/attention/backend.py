# SPDX-License-Identifier: Apache-2.0
"""vLLM's attention backend interface over the k8v4 kernels.

One backend class, one metadata builder (`metadata.py`) and one implementation for every device;
`device.py` picks the kernels. A layer's cache is vLLM's
`[num_blocks, num_kv_heads, block_size, slot_bytes]` uint8 view; to the kernels each
`[block_size, slot_bytes]` region of it is one k8v4 region (see `kernels/k8v4.py`), whose inner
arrangement is none of vLLM's business: connectors and offloading move whole pages of bytes.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionLayer,
    AttentionType,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from vllm_hybrid_kv.attention import unsupported as refusal
from vllm_hybrid_kv.attention.kernel_factory import Kernels, kernels_for
from vllm_hybrid_kv.attention.metadata import K8V4Metadata, K8V4MetadataBuilder
from vllm_hybrid_kv.attention.unsupported import UnsupportedLayerError
from vllm_hybrid_kv.constants import BACKEND, CACHE_DTYPE
from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.state import STATE

if TYPE_CHECKING:
    from vllm.platforms.interface import DeviceCapability


ROCM_GPUS = ("gfx942", "gfx950")


def refuse_rocm_gpu(name: str) -> str | None:
    """Return why the kernels are not right on one of AMD's GPUs, or None if they are.

    Args:
        name: Architecture as ROCm names it, such as `gfx90a:sramecc+:xnack-`.
    """
    if name.split(":")[0] in ROCM_GPUS:
        return None
    # Value codes are fp16 subnormals: gfx90a multiplies them as zeros, and RDNA was never compiled.
    return f"k8v4 kernels run on {' and '.join(ROCM_GPUS)} of AMD's GPUs, not on {name}"


def _gfx_name() -> str:
    return str(torch.cuda.get_device_properties(0).gcnArchName)


class K8V4AttentionBackend(AttentionBackend):
    """Attention over a paged k8v4 KV cache, registered as vLLM's TURBOQUANT."""

    accept_output_buffer: bool = True
    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.bfloat16,
        torch.float16,
        torch.float32,
    ]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = [CACHE_DTYPE]

    @staticmethod
    def get_name() -> str:
        """Return the registry name that vLLM looks this backend up by."""
        return BACKEND

    @staticmethod
    def get_impl_cls() -> type[K8V4AttentionImpl]:
        """Return the class that runs one layer."""
        return K8V4AttentionImpl

    @staticmethod
    def get_builder_cls() -> type[K8V4MetadataBuilder]:
        """Return the class that prepares one step for a group of layers."""
        return K8V4MetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Return the page sizes in tokens: any multiple of a tile."""
        return [MultipleOf(k8v4.TILE_TOKENS)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Say whether heads of this size can be stored."""
        return k8v4.unsupported_head_size(head_size) is None

    @classmethod
    def supports_sink(cls) -> bool:
        """Attention sinks are computed."""
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Sliding windows are computed."""
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Bidirectional attention over the paged cache is computed."""
        return True

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        """Say whether Triton compiles for an NVIDIA GPU."""
        return (capability.major, capability.minor) >= (7, 5)

    @classmethod
    def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
        """Return why a layer on a GPU cannot be served, as vLLM asks every backend, in words."""
        reasons = super().validate_configuration(*args, **kwargs)
        if current_platform.is_rocm() and (reason := refuse_rocm_gpu(_gfx_name())) is not None:
            reasons.append(reason)
        if not cls.supports_kv_cache_dtype(kwargs.get("kv_cache_dtype")):
            return reasons
        refused = refusal.refuse_selection(SimpleNamespace(**kwargs))
        return reasons if refused is None else [*reasons, f"{refused}; {refused.advice}"]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Return the one layout in which a head's part of a block is contiguous."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Give a layer's spec the k8v4 slot, `slot_bytes(D)` bytes per token and KV head."""
        if spec.state_content_bytes is not None or not spec.kv_quant_mode.is_turboquant:
            return spec
        value_size = getattr(spec, "head_size_v", None) or spec.head_size
        if (refused := refusal.refuse_value_size(spec.head_size, value_size)) is not None:
            raise UnsupportedLayerError(refused)
        slot = k8v4.slot_bytes(spec.head_size)
        customised = replace(spec, state_content_bytes=slot)
        expected = spec.block_size * spec.num_kv_heads * slot
        if customised.real_page_size_bytes != expected:
            raise RuntimeError(
                f"vLLM counts {customised.real_page_size_bytes} bytes for a page of "
                f"{spec.block_size} tokens and {spec.num_kv_heads} KV heads of {slot} bytes, "
                f"not {expected}; this vLLM is not the one that the plugin knows"
            )
        return customised


class K8V4AttentionImpl(AttentionImpl[K8V4Metadata]):
    """Stores one layer's keys and values and attends to them."""

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
        """Take a layer's parameters from vLLM.

        Raises:
            UnsupportedLayerError: The layer needs what the kernels do not compute.
        """
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = float(scale)
        reason = refusal.refuse_implementation(
            num_heads=num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=head_size,
            alibi_slopes=alibi_slopes,
            attn_type=attn_type,
            extra=extra,
        )
        if kv_cache_dtype != CACHE_DTYPE:
            reason = refusal.refuse_cache_dtype(kv_cache_dtype, head_size)
        if reason is not None:
            raise UnsupportedLayerError(reason)
        self.kv_cache_dtype = kv_cache_dtype
        self.sliding_window = sliding_window
        self.soft_cap = float(logits_soft_cap or 0.0)
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        self._kernels: Kernels | None = None

    def _kernels_for(self, tensor: torch.Tensor) -> Kernels:
        # Not when the layer is made: its weights may move to another device after that.
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
            key: [T, num_kv_heads, head_size], T at least the number of slots.
            value: Likewise.
            kv_cache: uint8 [num_blocks, num_kv_heads, block_size, slot_bytes].
            slot_mapping: int64 slots; a negative one is not written.
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
        """Attend with a step's queries to the cache, which already holds their own tokens.

        Args:
            layer: The attention layer.
            query: [T, num_heads, head_size].
            key: Not read: its tokens are in the cache.
            value: Not read, likewise.
            kv_cache: uint8 [num_blocks, num_kv_heads, block_size, slot_bytes].
            attn_metadata: The step's metadata; None while vLLM profiles memory.
            output: [T, num_heads, head_size], written for all but padding tokens.
            output_scale: Must be None; no fused output quantisation.
            output_block_scale: Must be None, likewise.

        Returns:
            `output`.
        """
        if output_scale is not None or output_block_scale is not None:
            raise ValueError("the k8v4 backend does not fuse output quantisation")
        kernels = self._kernels_for(query)
        if attn_metadata is None:
            kernels.reserve(self, query.device)
            return output.fill_(0)
        tokens = attn_metadata.num_tokens
        kernels.attend(self, attn_metadata, query[:tokens], kv_cache, output[:tokens])
        return output
