# SPDX-License-Identifier: Apache-2.0
"""The interface between the attention backend and the kernels of each device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from vllm_hybrid_kv.errors import HybridKVKernelError
from vllm_hybrid_kv.kernels import known_answer
from vllm_hybrid_kv.settings import INTERPRETER, Settings

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import AttentionSpec

    from vllm_hybrid_kv.attention.backend import K8V4AttentionImpl, K8V4Metadata


class Kernels(ABC):
    """Calls the kernels of one device type: `quantise_and_store` and `paged_attention` of `module`.

    In debug mode, the kernels check slots and block tables. This check waits for the GPU, so it is
    skipped while a CUDA graph is captured. `options` are passed on to `paged_attention`.
    """

    compile_first: Callable[[Callable[[], object]], None] | None = None
    """Compiles the kernels that a function launches, if they are compiled at run time."""

    def __init__(self, module: Any, *, debug: bool, **options: Any) -> None:
        self._module = module
        self._debug = debug
        self._options = options

    @abstractmethod
    def warm_up(
        self,
        layers: Mapping[str, K8V4AttentionImpl],
        spec: AttentionSpec,
        dtype: torch.dtype,
        device: torch.device,
        *,
        max_requests: int,
        decode_query_len: int,
    ) -> None:
        """Compile the kernels for the layers of a KV group, and test them against known answers.

        Queries, keys and values have the dtype `dtype`. A step has at most `max_requests` requests,
        and a decode at most `decode_query_len` new tokens.

        Raises:
            HybridKVKernelError: A kernel's result is wrong.
        """

    @abstractmethod
    def reserve(self, layer: K8V4AttentionImpl, device: torch.device) -> None:
        """Allocate a layer's scratch memory. Called while vLLM profiles, so that vLLM counts it."""

    @abstractmethod
    def plan(
        self, layer: K8V4AttentionImpl, metadata: K8V4Metadata, cache: torch.Tensor
    ) -> Sequence[Any]:
        """Plan how the kernels divide a step's work. Each plan is passed to `launch`."""

    def launch(
        self, plan: Any, layer: K8V4AttentionImpl, *batch: torch.Tensor, **options: Any
    ) -> None:
        """Attend from the requests that a plan serves; see the kernels' `paged_attention`."""
        self._module.paged_attention(*batch, plan=plan, **options, **self._options)

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
        layer: K8V4AttentionImpl,
        metadata: K8V4Metadata,
        query: torch.Tensor,
        cache: torch.Tensor,
        out: torch.Tensor,
        *,
        lse: torch.Tensor | None = None,
    ) -> None:
        """Attend to the cache; see the kernels' `paged_attention`."""
        capturing = is_capturing(query.device)
        # A captured graph must contain the planning itself. If it used an earlier plan, every
        # replay would use the lengths of the capture.
        flash = None if layer.flash is None else layer.flash.version
        key = (layer.num_heads, layer.sliding_window, flash, capturing)
        plans = metadata.plans.get(key)
        if plans is None:
            plans = metadata.plans[key] = self.plan(layer, metadata, cache)
        for plan in plans:
            self.launch(
                plan,
                layer,
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
                lse=lse,
                debug=self._debug and not capturing,
            )

    def require_known_answers(
        self,
        path: str,
        variants: Mapping[str, known_answer.Variant],
        batches: Callable[[str], Sequence[tuple[Sequence[int], known_answer.Attend]]],
        device: torch.device,
        advice: str,
    ) -> None:
        """Test every kernel variant that a layer needs, unless this process has tested it already.

        `variants` maps the name of a layer to its variant. `batches` maps the name of a layer to
        the batches to test. A batch is a pair: the new tokens of each request, and the attention
        kernel that computes the batch.
        """
        store = self._module.quantise_and_store
        for name, variant in variants.items():
            try:
                known_answer.require(
                    path, variant, batches(name), store, device, self.compile_first
                )
            except known_answer.WrongKernelError as error:
                alike = list(variants.values()).count(variant) - 1
                more = f" and {alike} more" if alike else ""
                raise HybridKVKernelError(f"layer {name}{more}: {error}. {advice}") from None


def is_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def group_of(layer: K8V4AttentionImpl) -> int:
    """Return how many query heads of a layer share a KV head."""
    return layer.num_heads // layer.num_kv_heads


def variant_of(
    layer: K8V4AttentionImpl, page_size: int, dtype: torch.dtype, num_kv_heads: int
) -> known_answer.Variant:
    """Return the kernel variant that a layer needs, reduced to `num_kv_heads` KV heads."""
    return known_answer.Variant(
        layer.head_size,
        num_kv_heads * group_of(layer),
        num_kv_heads,
        page_size,
        dtype,
        layer.sliding_window is not None,
        layer.soft_cap > 0,
        None if layer.sinks is None else layer.sinks.dtype,
    )


def kernels_for(device: torch.device, settings: Settings) -> Kernels:
    """Choose the kernels for a device.

    Raises:
        HybridKVSettingsError: This CPU lacks the instructions of the setting `cpu_isa`.
    """
    if device.type == "cpu" and (isa := settings.kernel_isa()) != INTERPRETER:
        from vllm_hybrid_kv.attention.cpu import CpuKernels

        return CpuKernels(isa, debug=settings.debug)
    from vllm_hybrid_kv.attention.gpu import GpuKernels

    return GpuKernels(debug=settings.debug)
