# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels behind the attention backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from vllm_hybrid_kv.attention.kernel_factory import Kernels, require_known_answers, variant_of
from vllm_hybrid_kv.kernels import cpu
from vllm_hybrid_kv.kernels.known_answer import Attend, Call, steps

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import AttentionSpec

    from vllm_hybrid_kv.attention.backend import K8V4Metadata
    from vllm_hybrid_kv.attention.kernel_factory import Layer

_ROWS = (1, 2, 4, 8, 16, 65)
"""The most rows of each code path of the CPU kernels. Above 64 rows, keys are not split."""


class CpuKernels(Kernels):
    """Stores and attends on CPUs.

    Args:
        isa: The instructions to use.
        debug: Whether to check block tables and slots.
    """

    def __init__(self, isa: str, *, debug: bool) -> None:
        super().__init__(cpu, debug=debug, isa=isa)
        self._isa = isa

    def warm_up(
        self,
        layers: Mapping[str, Layer],
        spec: AttentionSpec,
        dtype: torch.dtype,
        device: torch.device,
        *,
        max_requests: int,
    ) -> None:
        def batches(layer: Layer) -> list[tuple[list[int], Attend]]:
            return [(steps(layer.num_heads // layer.num_kv_heads, _ROWS), self._attend_known)]

        other_isa = "" if self._isa == "portable" else " or with the setting cpu_isa=portable"
        require_known_answers(
            f"cpu:{self._isa}",
            layers,
            # The kernels loop over KV heads; two are enough to expose wrong strides.
            lambda one: variant_of(one, spec.block_size, dtype, min(one.num_kv_heads, 2)),
            batches,
            cpu.quantise_and_store,
            device,
            f"Serve the model with --kv-cache-dtype auto{other_isa}",
        )

    def _attend_known(self, call: Call) -> None:
        _, num_heads, head_size = call["query"].shape
        plan = cpu.plan_attention(
            call["seq_lens"],
            call["query_start_loc"],
            num_heads,
            call["cache"].shape[1],
            head_size,
            call["cache"].shape[2],
            window=call["window"],
            num_threads=2,  # a single thread would not split the keys
        )
        cpu.paged_attention(**call, plan=plan, isa=self._isa)

    def reserve(self, layer: Layer, device: torch.device) -> None:
        """Do nothing, because partial results take a few KiB per thread."""

    def plan(self, layer: Layer, metadata: K8V4Metadata, cache: torch.Tensor) -> Any:
        return cpu.plan_attention(
            metadata.seq_lens,
            metadata.query_start_loc,
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_size=layer.head_size,
            page_size=cache.shape[2],
            causal=metadata.causal,
            window=layer.sliding_window,
        )
