# SPDX-License-Identifier: Apache-2.0
"""Describe engine steps, make their metadata, and run `scenarios` in Triton's interpreter."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True)
class Step:
    """One step of an engine.

    Attributes:
        lengths: Tokens of each request, including its new ones.
        queries: New tokens of each request.
        bound: How much the host's lengths exceed the exact lengths. With asynchronous
            speculation the host counts every draft token as accepted.
        layer: Parameters of the layer.
        key_size: Standard deviation of the keys. vLLM's backend clips keys to 1.75 on GPUs that
            cannot convert to fp8.
    """

    lengths: tuple[int, ...]
    queries: tuple[int, ...]
    bound: int = 0
    layer: dict[str, Any] = field(default_factory=dict)
    key_size: float = 0.5


class Request(NamedTuple):
    """A request of a step: all of its tokens, its new ones, and its draft tokens among these."""

    length: int
    new: int
    drafts: int = 0
    prefilling: bool = False


TABLE_WIDTH = 32


def common_metadata(step: Step, page: int) -> tuple[Any, torch.Tensor]:
    """Return the input of metadata builders, and the slot of every token in pages of `page`."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.tensor([0, *step.queries]).cumsum(0).to(torch.int32)
    pages = [-(-length // page) for length in step.lengths]
    table = torch.zeros(len(pages), TABLE_WIDTH, dtype=torch.int32)
    order = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(1))
    slots, new_slots, first = [], [], 0
    for row, (count, length, new) in enumerate(zip(pages, step.lengths, step.queries, strict=True)):
        table[row, :count] = order[first : first + count]
        first += count
        position = torch.arange(length)
        own = table[row, position // page].long() * page + position % page
        slots.append(own)
        new_slots.append(own[length - new :])
    lengths = torch.tensor(step.lengths, dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=lengths,
        num_reqs=len(pages),
        num_actual_tokens=sum(step.queries),
        max_query_len=max(step.queries),
        max_seq_len=max(step.lengths) + step.bound,
        seq_lens_cpu_upper_bound=lengths + step.bound,
        block_table_tensor=table,
        slot_mapping=torch.cat(new_slots),
        causal=True,
    )
    return common, torch.cat(slots)


def call(function: str, *arguments: Any, module: str = "scenarios") -> Any:
    """Call a function of a module here, in a process that runs Triton's interpreter."""
    scenarios = importlib.import_module(f"testing.attention.{module}")
    return getattr(scenarios, function)(*arguments)
