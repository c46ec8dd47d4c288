# SPDX-License-Identifier: Apache-2.0
"""Attention with decode context parallelism (DCP): each rank stores a part of every sequence.

The ranks of a DCP group have the same KV heads and different query heads. They gather their
queries, and each rank attends to the tokens that it stores. vLLM merges the results by their
log-sum-exp (LSE) and returns to each rank those of its own heads.

Runs of tokens alternate between ranks, so a token's index in its rank's pages is not its position,
and the kernels cannot mask these pages causally. A step with several new tokens per request
therefore has a second part: each rank quantises all new tokens into scratch pages, and attends
causally to them with its own heads. The codes equal those in the ranks' pages, so answers do not
depend on where a prompt is cut.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed.parallel_state import get_dcp_group
from vllm.v1.attention.backends.utils import get_dcp_local_seq_lens
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

from vllm_hybrid_kv.attention import kernel_factory
from vllm_hybrid_kv.attention.kernel_factory import Kernels
from vllm_hybrid_kv.kernels import k8v4

if TYPE_CHECKING:
    from vllm_hybrid_kv.attention.backend import K8V4AttentionImpl, K8V4Metadata

SCRATCH_PAGE = 64
"""Tokens of a scratch page."""

_LARGEST = torch.finfo(torch.float32).max


@dataclass
class _Parts:
    """The two parts of a step, with work plans of their own.

    Attributes:
        stored: The tokens that this rank stores: all of them in a step of decodes, otherwise those
            before the step. None if no request has tokens before the step.
        new: The step's tokens in scratch pages; None in a step of decodes.
        slots: int64 [tokens], their slots in the scratch pages; -1 for padding.
        pages: How many scratch pages the step needs at most.
    """

    stored: K8V4Metadata | None
    new: K8V4Metadata | None = None
    slots: torch.Tensor | None = None
    pages: int = 0


def combine_function() -> Callable[..., Any]:
    """Return vLLM's function that merges the ranks' results, as `--dcp-comm-backend` selects."""
    # These modules define Triton kernels, which only DCP needs.
    from vllm.v1.attention.ops.dcp import cp_lse_ag_out_rs, dcp_a2a_lse_reduce

    config = get_current_vllm_config_or_none()
    if config is not None and config.parallel_config.dcp_comm_backend == "a2a":
        return dcp_a2a_lse_reduce
    return cp_lse_ag_out_rs


def reserve(layer: K8V4AttentionImpl, query: torch.Tensor) -> None:
    """Allocate and free what the largest step needs, so that vLLM's memory profile counts it."""
    tokens, heads, head_size = query.shape
    # The gathered queries, their outputs, and a copy of these for the exchange between ranks.
    shape = (3, tokens, heads * layer.dcp_world_size, head_size)
    torch.empty(shape, dtype=query.dtype, device=query.device)


def attend(
    kernels: Kernels,
    layer: K8V4AttentionImpl,
    metadata: K8V4Metadata,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Attend from this rank's query heads to the tokens of all ranks.

    Args:
        kernels: The kernels of the device.
        layer: The layer.
        metadata: The step, with lengths of whole sequences.
        query: [T, num_heads, head_size], this rank's heads.
        key, value: [T, num_kv_heads, head_size], the step's tokens, unquantised.
        cache: The pages of this rank; they already contain the step's tokens that it stores.
        out: Like `query`; written, except for padding tokens.
    """
    # A captured graph must contain this computation of lengths, and the planning too.
    name = ("context parallel", kernel_factory.is_capturing(query.device))
    parts = metadata.plans.get(name)
    if parts is None:
        parts = metadata.plans[name] = _parts(layer, metadata)
    lse = None
    if parts.stored is not None:
        attended, lse = _attend_to_stored(kernels, layer, parts.stored, query, cache)
        if parts.new is None:
            out.copy_(attended)
    if parts.new is not None:
        new_out = torch.empty_like(out)
        new_lse = _attend_to_new(kernels, layer, parts, query, key, value, new_out)
        if lse is None:
            out.copy_(new_out)
            lse = new_lse
        else:
            lse = _merge(out, attended, lse, new_out, new_lse)
    if layer.sinks is not None:
        # A sink is a key whose value is zero. It counts once, not once in every part or rank.
        weight = torch.sigmoid(lse - layer.sinks.float())
        out.mul_(weight.unsqueeze(-1))


def _parts(layer: K8V4AttentionImpl, metadata: K8V4Metadata) -> _Parts:
    starts, lengths = metadata.query_start_loc, metadata.seq_lens
    decodes = metadata.max_query_len == 1
    counts = starts.diff()
    local = get_dcp_local_seq_lens(
        lengths if decodes else lengths - counts,
        layer.dcp_world_size,
        layer.dcp_rank,
        metadata.interleave_size,
    )
    stored = replace(metadata, seq_lens=local, causal=False, plans={})
    if decodes:
        return _Parts(stored)
    needed = (counts + SCRATCH_PAGE - 1) // SCRATCH_PAGE
    first = needed.cumsum(0) - needed
    width = -(-metadata.max_query_len // SCRATCH_PAGE)
    table = first[:, None] + torch.arange(width, device=first.device)
    tokens = torch.arange(metadata.num_tokens, dtype=torch.int32, device=starts.device)
    request = torch.searchsorted(starts[1:], tokens, right=True).clamp_max(len(counts) - 1)
    slots = first[request] * SCRATCH_PAGE + tokens - starts[request]
    return _Parts(
        stored if metadata.has_context else None,
        replace(metadata, seq_lens=counts, block_table=table.to(torch.int32), plans={}),
        torch.where(tokens < starts[-1], slots, -1).to(torch.int64),
        metadata.num_tokens // SCRATCH_PAGE + len(counts),
    )


def _attend_to_stored(
    kernels: Kernels,
    layer: K8V4AttentionImpl,
    metadata: K8V4Metadata,
    query: torch.Tensor,
    cache: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the tokens of all ranks' pages. Returns this rank's heads and their LSE [T, H]."""
    group = get_dcp_group()
    gathered = group.all_gather(query.contiguous(), dim=1)
    every_head = copy.copy(layer)
    every_head.num_heads, every_head.sinks = gathered.shape[1], None
    out = torch.empty_like(gathered)
    lse = torch.empty(gathered.shape[:2], dtype=torch.float32, device=query.device)
    kernels.attend(every_head, metadata, gathered, cache, out, lse=lse)
    attended, lse = layer.combine(out, _with_nan_kept(lse), group, return_lse=True)
    return attended, lse


def _attend_to_new(
    kernels: Kernels,
    layer: K8V4AttentionImpl,
    parts: _Parts,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """Attend to the step's tokens in scratch pages. Returns the LSE [T, H]."""
    assert parts.new is not None
    assert parts.slots is not None
    page = (layer.num_kv_heads, SCRATCH_PAGE, k8v4.slot_bytes(layer.head_size))
    pages = torch.empty((parts.pages, *page), dtype=torch.uint8, device=query.device)
    kernels.store(key, value, pages, parts.slots)
    own_heads = copy.copy(layer)
    own_heads.sinks = None
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    kernels.attend(own_heads, parts.new, query, pages, out, lse=lse)
    return _with_nan_kept(lse)


def _with_nan_kept(lse: torch.Tensor) -> torch.Tensor:
    """Give rows with a NaN the largest LSE.

    vLLM takes a NaN or infinite LSE for that of a rank without tokens, and would drop the NaN. The
    largest number makes the part with the NaN outweigh all others.
    """
    return lse.nan_to_num_(nan=_LARGEST, posinf=_LARGEST, neginf=-torch.inf)


def _merge(
    out: torch.Tensor,
    first: torch.Tensor,
    first_lse: torch.Tensor,
    second: torch.Tensor,
    second_lse: torch.Tensor,
) -> torch.Tensor:
    """Merge two parts into `out` and return the LSE. All LSEs are [T, H]."""
    lse = torch.empty_like(second_lse.T, memory_format=torch.contiguous_format)
    # vLLM's kernel takes LSEs as [H, T].
    merge_attn_states(
        out, first.contiguous(), first_lse.T.contiguous(), second, second_lse.T.contiguous(), lse
    )
    return lse.T
