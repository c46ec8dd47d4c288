# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels behind the attention backend."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized

from vllm_hybrid_kv.attention.backend import K8V4AttentionImpl, K8V4Metadata
from vllm_hybrid_kv.attention.kernel_factory import Kernels, variant_of
from vllm_hybrid_kv.kernels import triton
from vllm_hybrid_kv.kernels.known_answer import Attend, Call, steps


class GpuKernels(Kernels):
    """Runs the Triton kernels on a GPU, or in Triton's interpreter on a CPU."""

    def __init__(self, *, debug: bool) -> None:
        super().__init__(triton, debug=debug)

    def warm_up(
        self,
        layers: Mapping[str, K8V4AttentionImpl],
        spec: AttentionSpec,
        dtype: torch.dtype,
        device: torch.device,
        *,
        max_requests: int,
    ) -> None:
        # Triton's interpreter needs seconds for a hundred tokens, so test only decoding there.
        interpreted = device.type == "cpu"
        name = "interpreter" if interpreted else torch.cuda.get_device_name(device)
        self.test(layers, spec.block_size, dtype, device, name, decodes_only=interpreted)
        for layer in () if interpreted else layers.values():
            _warm_up_plans(layer, device, max_requests)

    def test(
        self,
        layers: Mapping[str, K8V4AttentionImpl],
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        name: str,
        *,
        decodes_only: bool = False,
    ) -> None:
        """Run every kernel that the layers may need, and compare the results with known answers."""

        def batches(group: int) -> list[tuple[list[int], Attend]]:
            if decodes_only:
                return [([1], _attend_known)]
            counts = steps(group, triton.MOST_ROWS)
            # Batches with many row tiles use a second kernel, which does not split the keys.
            whole = partial(_attend_known, split=False)
            return [*(([count], _attend_known) for count in counts), (counts[-1:], whole)]

        variants = {
            layer_name: variant_of(layer, page_size, dtype, layer.num_kv_heads)
            for layer_name, layer in layers.items()
        }
        advice = "Serve the model with --kv-cache-dtype auto or fp8"
        self.require_known_answers(f"triton:{name}", variants, batches, device, advice)

    def reserve(self, layer: K8V4AttentionImpl, device: torch.device) -> None:
        _scratch(layer, device)

    def plan(self, layer: K8V4AttentionImpl, metadata: K8V4Metadata, cache: torch.Tensor) -> Any:
        return triton.plan_attention(
            metadata.seq_lens,
            metadata.query_start_loc,
            metadata.num_tokens,
            layer.num_heads,
            layer.num_kv_heads,
            layer.head_size,
            max_query_len=metadata.max_query_len,
            causal=metadata.causal,
            window=layer.sliding_window,
            scratch=_scratch(layer, cache.device),
        )


def _scratch(layer: K8V4AttentionImpl, device: torch.device) -> torch.Tensor:
    """Return float32 scratch memory for one call of `paged_attention`.

    All layers share vLLM's workspace, which cannot grow after the warm-up. So the size depends on
    the layer and the device, but not on the batch.
    """
    numbers = triton.largest_scratch(layer.num_kv_heads, layer.head_size, device)
    if not is_workspace_manager_initialized():
        return torch.empty(numbers, dtype=torch.float32, device=device)
    (scratch,) = current_workspace_manager().get_simultaneous(((numbers,), torch.float32))
    return scratch


def _attend_known(call: Call, *, split: bool = True) -> None:
    starts = call["query_start_loc"]
    tokens, num_heads, head_size = call["query"].shape
    plan = triton.plan_attention(
        call["seq_lens"],
        starts,
        tokens,
        num_heads,
        call["cache"].shape[1],
        head_size,
        max_query_len=int(starts.diff().max()),
        window=call["window"],
        split=split,
    )
    triton.paged_attention(**call, plan=plan)


def _warm_up_plans(layer: K8V4AttentionImpl, device: torch.device, max_requests: int) -> None:
    """Compile every kernel that may plan the work of a decoding step."""
    for requests in triton.planned_requests(max_requests):
        starts = torch.arange(requests + 1, dtype=torch.int32, device=device)
        lengths = torch.ones(requests, dtype=torch.int32, device=device)
        triton.plan_attention(
            lengths,
            starts,
            requests,
            layer.num_heads,
            layer.num_kv_heads,
            layer.head_size,
            max_query_len=1,
            window=layer.sliding_window,
        )
