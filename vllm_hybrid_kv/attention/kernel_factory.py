# SPDX-License-Identifier: Apache-2.0
"""The interface between the attention backend and the kernels of each device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from vllm_hybrid_kv.errors import HybridKVKernelError
from vllm_hybrid_kv.kernels import known_answer
from vllm_hybrid_kv.settings import INTERPRETER, Settings

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import AttentionSpec

    from vllm_hybrid_kv.attention.backend import K8V4Metadata


class Layer(Protocol):
    """The parameters of a layer that the kernels need.

    Attributes:
        num_heads: Query heads.
        num_kv_heads: KV heads.
        head_size: Dims of a head.
        scale: Factor of the scores.
        sliding_window: Tokens that a query sees back, including its own, or None.
        soft_cap: Bound of the scores; 0 if there is no bound.
        sinks: [num_heads], scores of the sinks, or None.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    sliding_window: int | None
    soft_cap: float
    sinks: torch.Tensor | None


class Kernels(ABC):
    """Stores and attends on one kind of device.

    Args:
        module: The package of the kernels, with `quantise_and_store` and `paged_attention`.
        debug: Whether to check slots and block tables, which waits for a GPU. Nothing is checked
            while a graph is captured.
        options: More arguments of `paged_attention`.
    """

    def __init__(self, module: Any, *, debug: bool, **options: Any) -> None:
        self._module = module
        self._debug = debug
        self._options = options

    @abstractmethod
    def warm_up(
        self,
        layers: Mapping[str, Layer],
        spec: AttentionSpec,
        dtype: torch.dtype,
        device: torch.device,
        *,
        max_requests: int,
    ) -> None:
        """Compile what the layers of a KV group will call, and compare it with known answers.

        Args:
            layers: The layers by name.
            spec: Their KV cache spec.
            dtype: Dtype of queries, keys and values.
            device: The layers' device.
            max_requests: The most requests of a step.

        Raises:
            HybridKVKernelError: A kernel's result is wrong.
        """

    @abstractmethod
    def reserve(self, layer: Layer, device: torch.device) -> None:
        """Allocate the scratch memory of any step of a layer, while vLLM profiles memory."""

    @abstractmethod
    def plan(self, layer: Layer, metadata: K8V4Metadata, cache: torch.Tensor) -> Any:
        """Return how the kernels divide the work of a step."""

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Quantise tokens into their slots; see the kernels' `quantise_and_store`."""
        debug = self._debug and not is_capturing(cache.device)
        self._module.quantise_and_store(key, value, cache, slot_mapping, debug=debug)

    def attend(
        self,
        layer: Layer,
        metadata: K8V4Metadata,
        query: torch.Tensor,
        cache: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Attend to the cache; see the kernels' `paged_attention`."""
        capturing = is_capturing(query.device)
        # A graph must make the plan itself; an earlier plan would hold the lengths at capture.
        key = (layer.num_heads, layer.sliding_window, capturing)
        plan = metadata.plans.get(key)
        if plan is None:
            plan = metadata.plans[key] = self.plan(layer, metadata, cache)
        self._module.paged_attention(
            query,
            cache,
            metadata.block_table,
            metadata.seq_lens,
            metadata.query_start_loc,
            out,
            scale=layer.scale,
            causal=metadata.causal,
            window=layer.sliding_window,
            soft_cap=layer.soft_cap,
            sinks=layer.sinks,
            plan=plan,
            debug=self._debug and not capturing,
            **self._options,
        )


def is_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def variant_of(
    layer: Layer, page_size: int, dtype: torch.dtype, num_kv_heads: int
) -> known_answer.Variant:
    """Return the kernels that a layer calls, tested with `num_kv_heads` and pages in tokens."""
    return known_answer.Variant(
        layer.head_size,
        num_kv_heads * (layer.num_heads // layer.num_kv_heads),
        num_kv_heads,
        page_size,
        dtype,
        layer.sliding_window is not None,
        layer.soft_cap > 0,
        None if layer.sinks is None else layer.sinks.dtype,
    )


def require_known_answers(
    path: str,
    layers: Mapping[str, Layer],
    variant_of: Callable[[Layer], known_answer.Variant],
    batches: Callable[[Layer], Sequence[tuple[Sequence[int], known_answer.Attend]]],
    store: known_answer.Store,
    device: torch.device,
    advice: str,
) -> None:
    """Test the kernels of each different layer once; see `known_answer.require`.

    Args:
        path: Name of the kernels.
        layers: The layers by name.
        variant_of: The kernels that a layer calls.
        batches: The new tokens of a batch's requests, and its attention kernel.
        store: The store kernel.
        device: The kernels' device.
        advice: The remedy for wrong kernels.

    Raises:
        HybridKVKernelError: A kernel's result is wrong.
    """
    for name, layer in layers.items():
        variant = variant_of(layer)
        try:
            known_answer.require(path, variant, batches(layer), store, device)
        except known_answer.WrongKernelError as error:
            alike = sum(variant_of(other) == variant for other in layers.values()) - 1
            more = f" and {alike} more" if alike else ""
            raise HybridKVKernelError(f"layer {name}{more}: {error}. {advice}") from None


def kernels_for(device: torch.device, settings: Settings) -> Kernels:
    """Return the kernels that run on a device.

    Raises:
        HybridKVSettingsError: This CPU lacks the instructions of the setting `cpu_isa`.
    """
    if device.type == "cpu" and (isa := settings.kernel_isa()) != INTERPRETER:
        from vllm_hybrid_kv.attention.cpu import CpuKernels

        return CpuKernels(isa, debug=settings.debug)
    from vllm_hybrid_kv.attention.gpu import GpuKernels

    return GpuKernels(debug=settings.debug)
