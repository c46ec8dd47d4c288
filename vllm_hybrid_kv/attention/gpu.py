# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels as the backend calls them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized

from vllm_hybrid_kv.kernels import k8v4, triton

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import AttentionSpec

    from vllm_hybrid_kv.attention.device import Layer
    from vllm_hybrid_kv.attention.metadata import K8V4Metadata


class GpuKernels:
    """Stores and attends on GPUs, or in Triton's interpreter.

    Args:
        debug: Whether slots and block tables are checked, which waits for the device; not while
            a graph is captured.
    """

    def __init__(self, *, debug: bool) -> None:
        self._debug = debug

    def warm_up(
        self,
        layers: Sequence[Layer],
        spec: AttentionSpec,
        dtype: torch.dtype,
        device: torch.device,
        *,
        max_requests: int,
    ) -> None:
        """Compile what the layers of a KV group will call, by calling it on two empty pages."""
        if device.type == "cpu":
            return  # nothing is compiled for the interpreter
        kinds = {
            (layer.num_heads, layer.sliding_window, layer.soft_cap > 0, layer.sinks is None): layer
            for layer in layers
        }
        slot = k8v4.slot_bytes(spec.head_size)
        cache = torch.zeros(
            (2, spec.num_kv_heads, spec.block_size, slot), dtype=torch.uint8, device=device
        )
        for layer in kinds.values():
            _warm_up_layer(layer, cache, dtype, max_requests)

    def reserve(self, layer: Layer, device: torch.device) -> None:
        """Take the scratch memory that any step of a layer may need from vLLM's workspace."""
        _scratch(layer, device)

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Quantise tokens into their slots."""
        debug = self._debug and not _capturing(cache.device)
        triton.quantise_and_store(key, value, cache, slot_mapping, debug=debug)

    def attend(
        self,
        layer: Layer,
        metadata: K8V4Metadata,
        query: torch.Tensor,
        cache: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Attend to the cache."""
        capturing = _capturing(query.device)
        # A graph must make the plan itself: one from before it would hold the lengths of then.
        kind = (layer.num_heads, layer.sliding_window, capturing)
        plan = metadata.plans.get(kind)
        if plan is None:
            plan = metadata.plans[kind] = triton.plan_attention(
                metadata.seq_lens,
                metadata.query_start_loc,
                metadata.num_tokens,
                layer.num_heads,
                layer.num_kv_heads,
                layer.head_size,
                max_query_len=metadata.max_query_len,
                causal=metadata.causal,
                window=layer.sliding_window,
                scratch=_scratch(layer, query.device),
            )
        triton.paged_attention(
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
        )


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _scratch(layer: Layer, device: torch.device) -> torch.Tensor:
    """Return float32 scratch memory for one call of `paged_attention`.

    vLLM's workspace is shared by all layers and is locked once it has warmed up. Its size here
    depends on the layer and the device alone, so that what was reserved while vLLM profiled
    memory is enough for every batch.
    """
    numbers = triton.largest_scratch(layer.num_kv_heads, layer.head_size, device)
    if not is_workspace_manager_initialized():
        return torch.empty(numbers, dtype=torch.float32, device=device)
    (scratch,) = current_workspace_manager().get_simultaneous(((numbers,), torch.float32))
    return scratch


def _warm_up_layer(
    layer: Layer, cache: torch.Tensor, dtype: torch.dtype, max_requests: int
) -> None:
    """Call the kernels of a layer with every size of program, on zeros."""
    device = cache.device
    group = layer.num_heads // layer.num_kv_heads
    shape = (layer.num_heads, layer.num_kv_heads, layer.head_size)
    window = layer.sliding_window
    most = -(-triton.MOST_ROWS[-1] // group)
    query = torch.zeros((most, layer.num_heads, layer.head_size), dtype=dtype, device=device)
    tokens = query[:, : layer.num_kv_heads]
    triton.quantise_and_store(tokens, tokens, cache, torch.arange(most, device=device) % 16)
    block_table = torch.zeros((1, -(-most // cache.shape[2])), dtype=torch.int32, device=device)
    for rows in triton.MOST_ROWS:
        queries = most if rows == triton.MOST_ROWS[-1] else max(1, rows // group)
        # Apart from each other, as in vLLM: the address of a tensor decides too what is compiled.
        starts = torch.tensor([0, queries], dtype=torch.int32, device=device)
        lengths = torch.tensor([queries], dtype=torch.int32, device=device)
        # Batches of many row tiles are not split; one request would be.
        for split in (True, False) if queries == most else (True,):
            plan = triton.plan_attention(
                lengths, starts, queries, *shape, max_query_len=queries, window=window, split=split
            )
            triton.paged_attention(
                query[:queries],
                cache,
                block_table,
                lengths,
                starts,
                torch.empty_like(query[:queries]),
                scale=layer.scale,
                window=window,
                soft_cap=layer.soft_cap,
                sinks=layer.sinks,
                plan=plan,
            )
    for requests in triton.planned_requests(max_requests):
        starts = torch.arange(requests + 1, dtype=torch.int32, device=device)
        lengths = torch.ones(requests, dtype=torch.int32, device=device)
        triton.plan_attention(lengths, starts, requests, *shape, max_query_len=1, window=window)
