# SPDX-License-Identifier: Apache-2.0
"""Divides a batch's attention into work items. All layers use the one plan of a step.

The division of a request depends only on the request, the heads and the number of threads. A
request's result therefore does not depend on the rest of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_hybrid_kv.kernels.cpu.records import CHUNK, ROW_BLOCK, Merge, WorkItem, dtype_of
from vllm_hybrid_kv.kernels.inputs import attention_error

_ITEMS_PER_THREAD = 4
"""Work items per thread that one request should have, to balance the threads."""

_MIN_PART = 256
"""The minimum tokens of a part, which is the range of keys of one work item. With shorter parts,
merging costs more than parallelism gains."""

_MAX_PART_ROWS = 64
"""The maximum query rows of a request whose keys are divided into parts. A request with more rows
has enough work items without parts. Keys of prefill chunks are not divided, so that a prompt's
result is the same, bit for bit, with any chunk size."""


@dataclass(frozen=True, eq=False)
class Plan:
    """The work items of one batch's attention; opaque to callers.

    Attributes:
        items: `WorkItem`s, largest first; each is computed once per KV head.
        merges: `Merge`s; one unused row if there are none.
        partial_rows: Rows of partial sums per KV head.
        num_merges: Merges per KV head.
        made_for: The number of requests, the number of query tokens, and the arguments that the
            work items depend on. A call of attention must have the same.
    """

    items: npt.NDArray[Any]
    merges: npt.NDArray[Any]
    partial_rows: int
    num_merges: int
    made_for: tuple[int, int, int, int, int, bool, int | None]
    items_address: int = field(init=False)
    merges_address: int = field(init=False)

    def __post_init__(self) -> None:
        # Read the addresses once for all layers, because numpy's `ctypes` attribute is slow.
        object.__setattr__(self, "items_address", self.items.ctypes.data)
        object.__setattr__(self, "merges_address", self.merges.ctypes.data)


def _part_tokens(length: int, num_kv_heads: int, num_threads: int) -> int:
    """Return the tokens of a part of a sequence, a multiple of `CHUNK`."""
    parts = max(1, -(-_ITEMS_PER_THREAD * num_threads // num_kv_heads)) if num_threads > 1 else 1
    part = max(_MIN_PART, -(-length // parts))
    return -(-part // CHUNK) * CHUNK


def _block_rows(rows: int, num_kv_heads: int, num_threads: int) -> int:
    """Return the rows of a work item: `ROW_BLOCK` if that leaves enough items for all threads."""
    items = rows * num_kv_heads // ROW_BLOCK
    return ROW_BLOCK if items >= _ITEMS_PER_THREAD * num_threads else _MAX_PART_ROWS


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
    whose keys are divided. Such a request has at most 64 rows and about 4 work items per thread.
    No size depends on `max_model_len`.

    Args:
        seq_lens: int32 [B], tokens of each request including its new ones; not an upper bound.
        query_start_loc: int32 [B + 1], offsets of the requests' query tokens.
        num_heads: Query heads, a multiple of `num_kv_heads`.
        num_kv_heads: KV heads.
        head_size: Dims of a head.
        page_size: Tokens of a page.
        causal, window: As for `paged_attention`.
        num_threads: Threads to divide among; None for torch's number of threads.

    Raises:
        ValueError: The offsets are negative or not sorted, so that the kernels would write outside
            the output.
    """
    threads = torch.get_num_threads() if num_threads is None else num_threads
    group = num_heads // num_kv_heads
    lengths, starts = seq_lens.tolist(), query_start_loc.tolist()
    if starts[0] < 0 or starts != sorted(starts):
        raise attention_error(f"query_start_loc must rise from 0, got {starts}")
    items: list[WorkItem] = []
    merges: list[Merge] = []
    partial_rows = 0
    for request, length in enumerate(lengths):
        queries = starts[request + 1] - starts[request]
        rows = queries * group
        if rows <= 0:
            continue
        whole = WorkItem(request, starts[request], queries, length, 0, rows, 0, length, -1, -1)
        if rows > _MAX_PART_ROWS:
            most = _block_rows(rows, num_kv_heads, threads)
            for row in range(0, rows, most):
                items.append(whole._replace(first_row=row, rows=min(most, rows - row)))
            continue
        first = 0
        if window is not None:
            first = max(0, length - queries - window + 1) // CHUNK * CHUNK
        part = _part_tokens(length - first, num_kv_heads, threads)
        parts = max(1, -(-(length - first) // part))
        if parts == 1:
            items.append(whole)
            continue
        merges.append(Merge(len(items), parts))
        for from_key in range(first, length, part):
            items.append(
                whole._replace(
                    first_key=from_key,
                    last_key=min(length, from_key + part),
                    partial=partial_rows,
                    merge=len(merges) - 1,
                )
            )
            partial_rows += rows
    table = np.array(items, dtype_of(WorkItem))
    order = np.argsort(-_cost(table, group, causal, window), kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(order.size)
    joined = np.array(merges or [Merge(0, 0)], dtype_of(Merge))
    if merges:
        joined["first_item"] = place[joined["first_item"]]
    return Plan(
        table[order],
        joined,
        partial_rows,
        len(merges),
        (len(lengths), starts[-1], num_heads, num_kv_heads, head_size, causal, window),
    )


def _cost(
    items: npt.NDArray[Any], group: int, causal: bool, window: int | None
) -> npt.NDArray[np.int64]:
    """Estimate the relative time of each work item from its keys and rows."""
    last_token = (items["first_row"] + items["rows"] - 1) // group
    position = items["length"] - items["query_length"] + last_token
    last, first = items["last_key"], items["first_key"]
    if causal:
        last = np.minimum(last, position + 1)
    if window is not None:
        first = np.maximum(first, position - window - items["rows"] // group)
    return np.maximum(last - first, 0) * (8 + items["rows"])
