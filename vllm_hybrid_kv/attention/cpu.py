# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels behind the attention backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_hybrid_kv.attention.backend import K8V4AttentionImpl, K8V4Metadata
from vllm_hybrid_kv.attention.kernel_factory import Kernels, group_of, variant_of
from vllm_hybrid_kv.kernels import cpu
from vllm_hybrid_kv.kernels.known_answer import Call, steps

_ROWS = (1, 2, 4, 8, 16, 65)
"""Row counts (tokens x heads per KV head) to test. They cover all code paths of the kernels: with
more than 64 rows, for example, the keys are not split."""


class CpuKernels(Kernels):
    """Runs the CPU kernels of one instruction set, `isa`."""

    def __init__(self, isa: str, *, debug: bool) -> None:
        super().__init__(cpu, debug=debug, isa=isa)
        self._isa = isa

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
        # The kernels loop over KV heads, so a test with two of them reveals wrong strides.
        variants = {
            name: variant_of(layer, spec.block_size, dtype, min(layer.num_kv_heads, 2))
            for name, layer in layers.items()
        }
        other_isa = "" if self._isa == "portable" else " or with the setting cpu_isa=portable"
        self.require_known_answers(
            f"cpu:{self._isa}",
            variants,
            lambda name: [(steps(group_of(layers[name]), _ROWS), self._attend_known)],
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

    def reserve(self, layer: K8V4AttentionImpl, device: torch.device) -> None:
        """Reserve nothing. The CPU kernels need only a few KiB per thread for partial results."""

    def plan(
        self, layer: K8V4AttentionImpl, metadata: K8V4Metadata, cache: torch.Tensor
    ) -> Sequence[Any]:
        plan = cpu.plan_attention(
            metadata.seq_lens,
            metadata.query_start_loc,
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_size=layer.head_size,
            page_size=cache.shape[2],
            causal=metadata.causal,
            window=layer.sliding_window,
        )
        return [plan]
