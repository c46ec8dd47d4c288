# SPDX-License-Identifier: Apache-2.0
"""Divide a batch's attention into work items; made once a step and shared by all its layers.

How a request is divided depends on that request, the heads and the number of threads, never on
what else is in the batch, so that a request's result does not either.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from vllm_hybrid_kv.kernels.cpu import drive
from vllm_hybrid_kv.kernels.inputs import attention_refusal

_ITEMS_PER_THREAD = 4
"""Items wanted for each thread from one request alone, for threads to even out."""

_MIN_PART = 256
"""Fewest tokens of a part, below which merging costs more than it gains."""

_MAX_PART_ROWS = 64
"""Requests with more rows than this have enough items without parts: a long prompt's chunks are not
divided along their keys, so that its bits are the same whatever its chunks."""


@dataclass(frozen=True, eq=False)
class Plan:
    """A division of one batch's attention; opaque to its users.

    Attributes:
        items: int64 [items, ITEM_COLUMNS], largest first; each is done once per KV head.
        merges: int64 [merges, MERGE_COLUMNS], at least one row.
        partial_rows: Rows of partial sums per KV head.
        num_merges: Merges per KV head.
        made_for: Requests, query tokens and the arguments that items depend on.
    """

    items: npt.NDArray[np.int64]
    merges: npt.NDArray[np.int64]
    partial_rows: int
    num_merges: int
    made_for: tuple[int, int, int, int, int, bool, int | None]
    items_address: int = field(init=False)
    merges_address: int = field(init=False)

    def __post_init__(self) -> None:
        """Look the addresses up once, for all layers that the plan serves."""
        object.__setattr__(self, "items_address", self.items.ctypes.data)
        object.__setattr__(self, "merges_address", self.merges.ctypes.data)


def part_tokens(length: int, num_kv_heads: int, num_threads: int) -> int:
    """Return how many tokens a part of a sequence has, a multiple of the largest chunk."""
    parts = max(1, -(-_ITEMS_PER_THREAD * num_threads // num_kv_heads)) if num_threads > 1 else 1
    part = max(_MIN_PART, -(-length // parts))
    return -(-part // drive.CHUNK) * drive.CHUNK


def block_rows(rows: int, num_kv_heads: int, num_threads: int) -> int:
    """Return how many rows an item of a request with so many has: more only if all have work."""
    items = rows * num_kv_heads // drive.ROW_BLOCK
    return drive.ROW_BLOCK if items >= _ITEMS_PER_THREAD * num_threads else _MAX_PART_ROWS


def plan_attention(
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    page_size: int,
    *,
    causal: bool = True,
    window: int | None = None,
    num_threads: int | None = None,
) -> Plan:
    """Divide the attention of a batch among threads.

    Partial sums take `rows * parts * num_kv_heads * (head_size + 16) * 4` bytes for each request
    that is divided along its keys: at most 64 rows, and parts that bring the items of one
    request to 4 a thread. Nothing depends on the largest length that a model allows.

    Args:
        seq_lens: int32 [B], tokens of each request including its new ones; exact.
        query_start_loc: int32 [B + 1], offsets of the requests' query tokens.
        num_heads: Query heads, a multiple of `num_kv_heads`.
        num_kv_heads: KV heads.
        head_size: Dims of a head.
        page_size: Tokens of a page.
        causal, window: As for `paged_attention`.
        num_threads: Threads to divide among; torch's number if None.

    Raises:
        ValueError: The offsets do not rise from 0 on, so that rows outside the output would be
            written.
    """
    threads = torch.get_num_threads() if num_threads is None else num_threads
    group = num_heads // num_kv_heads
    lengths, starts = seq_lens.tolist(), query_start_loc.tolist()
    if starts[0] < 0 or starts != sorted(starts):
        raise attention_refusal(f"query_start_loc must rise from 0, got {starts}")
    items: list[tuple[int, ...]] = []
    merges: list[tuple[int, int]] = []
    partial_rows = 0
    for request, length in enumerate(lengths):
        queries = starts[request + 1] - starts[request]
        rows = queries * group
        if rows <= 0:
            continue
        head = (request, starts[request], queries, length)
        if rows <= _MAX_PART_ROWS:
            first = 0
            if window is not None:
                first = max(0, length - queries - window + 1) // drive.CHUNK * drive.CHUNK
            part = part_tokens(length - first, num_kv_heads, threads)
            parts = max(1, -(-(length - first) // part))
            if parts == 1:
                items.append((*head, 0, rows, 0, length, -1, -1))
                continue
            for i in range(parts):
                from_key = first + i * part
                to_key = min(length, from_key + part)
                partial = partial_rows + i * rows
                items.append((*head, 0, rows, from_key, to_key, partial, len(merges)))
            merges.append((len(items) - parts, parts))
            partial_rows += parts * rows
        else:
            most = block_rows(rows, num_kv_heads, threads)
            for row in range(0, rows, most):
                items.append((*head, row, min(most, rows - row), 0, length, -1, -1))
    table = np.array(items, np.int64).reshape(-1, drive.ITEM_COLUMNS)
    order = np.argsort(-_cost(table, group, causal, window), kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(order.size)
    joined = np.array(merges or [(0, 0)], np.int64)
    if merges:
        joined[:, drive.MERGE_ITEM] = place[joined[:, drive.MERGE_ITEM]]
    return Plan(
        np.ascontiguousarray(table[order]),
        joined,
        partial_rows,
        len(merges),
        (len(lengths), starts[-1], num_heads, num_kv_heads, head_size, causal, window),
    )


def _cost(
    items: npt.NDArray[np.int64], group: int, causal: bool, window: int | None
) -> npt.NDArray[np.int64]:
    """Estimate items' times: keys that they read, more for more rows."""
    last_token = (items[:, drive.FIRST_ROW] + items[:, drive.ROWS] - 1) // group
    position = items[:, drive.LENGTH] - items[:, drive.QUERY_LENGTH] + last_token
    last = items[:, drive.LAST_KEY]
    first = items[:, drive.FIRST_KEY]
    if causal:
        last = np.minimum(last, position + 1)
    if window is not None:
        first = np.maximum(first, position - window - items[:, drive.ROWS] // group)
    return np.maximum(last - first, 0) * (8 + items[:, drive.ROWS])
