# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels as the backend calls them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from vllm_hybrid_kv.attention.kernel_factory import require_known_answers
from vllm_hybrid_kv.kernels import cpu
from vllm_hybrid_kv.kernels.known_answer import Attend, Call, Variant, steps

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import AttentionSpec

    from vllm_hybrid_kv.attention.kernel_factory import Layer
    from vllm_hybrid_kv.attention.metadata import K8V4Metadata

_ROWS = (1, 2, 4, 8, 16, 65)
"""Most rows of each way in which the CPU kernels multiply; above 64 keys are not split."""


class CpuKernels:
    """Stores and attends on CPUs.

    Args:
        isa: The instructions that they use.
        debug: Whether they check block tables and slots.
    """

    def __init__(self, isa: str, *, debug: bool) -> None:
        self._isa = isa
        self._debug = debug

    def warm_up(
        self,
        layers: Mapping[str, Layer],
        spec: AttentionSpec,
        dtype: torch.dtype,
        device: torch.device,
        *,
        max_requests: int,
    ) -> None:
        """Compile what the layers of a KV group will call, and compare it with known answers."""

        def variant_of(layer: Layer) -> Variant:
            # The kernels take the number of KV heads as it comes; two show wrong strides.
            heads = min(layer.num_kv_heads, 2)
            return Variant(
                layer.head_size,
                heads * (layer.num_heads // layer.num_kv_heads),
                heads,
                spec.block_size,
                dtype,
                layer.sliding_window is not None,
                layer.soft_cap > 0,
                None if layer.sinks is None else layer.sinks.dtype,
            )

        def batches(layer: Layer) -> list[tuple[list[int], Attend]]:
            return [(steps(layer.num_heads // layer.num_kv_heads, _ROWS), self._attend_known)]

        other_isa = "" if self._isa == "portable" else " or with the setting cpu_isa=portable"
        require_known_answers(
            f"cpu:{self._isa}",
            layers,
            variant_of,
            batches,
            cpu.quantise_and_store,
            device,
            f"Serve the model with --kv-cache-dtype auto{other_isa}",
        )

    def _attend_known(self, call: Call) -> None:
        plan = cpu.plan_attention(
            call.seq_lens,
            call.query_start_loc,
            call.query.shape[1],
            call.cache.shape[1],
            call.query.shape[2],
            call.cache.shape[2],
            window=call.window,
            num_threads=2,  # one thread alone would not split the keys
        )
        cpu.paged_attention(**call._asdict(), plan=plan, isa=self._isa)

    def reserve(self, layer: Layer, device: torch.device) -> None:
        """Nothing: partial results are a few KiB for each thread."""

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Quantise tokens into their slots."""
        cpu.quantise_and_store(key, value, cache, slot_mapping, debug=self._debug)

    def attend(
        self,
        layer: Layer,
        metadata: K8V4Metadata,
        query: torch.Tensor,
        cache: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Attend to the cache."""
        kind = (layer.num_heads, layer.sliding_window)
        plan = metadata.plans.get(kind)
        if plan is None:
            plan = metadata.plans[kind] = cpu.plan_attention(
                metadata.seq_lens,
                metadata.query_start_loc,
                num_heads=layer.num_heads,
                num_kv_heads=layer.num_kv_heads,
                head_size=layer.head_size,
                page_size=cache.shape[2],
                causal=metadata.causal,
                window=layer.sliding_window,
            )
        cpu.paged_attention(
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
            isa=self._isa,
            debug=self._debug,
        )
