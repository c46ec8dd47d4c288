# SPDX-License-Identifier: Apache-2.0
"""Divide a batch's attention into work items. All layers of a step share one plan.

How a request is divided depends only on the request, the heads and the number of threads. A
request's result therefore does not depend on the rest of the batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vllm_hybrid_kv.kernels.cpu.records import CHUNK, ROW_BLOCK, WorkItem, dtype_of
from vllm_hybrid_kv.kernels.inputs import attention_error

_ITEMS_PER_THREAD = 4
"""Divide a request into about this many work items per thread, to balance the threads."""

_MIN_PART = 256
"""A part of a request's keys has at least this many tokens. With shorter parts, merging costs more
than dividing saves."""

_MAX_PART_ROWS = 64
"""Divide the keys of a request into parts only up to this many query rows. A request with more rows
has enough work items without parts. The keys of prefill chunks are not divided, so a prompt's
result is the same, bit for bit, with any chunk size."""


class Plan(NamedTuple):
    """The work items of one batch's attention; opaque to callers."""

    items: npt.NDArray[Any]  # `WorkItem`s, largest first; each is computed once per KV head
    items_address: int  # read once for all layers, because numpy's `ctypes` attribute is slow
    partial_rows: int  # rows of partial sums per KV head
    num_divided: int  # requests whose keys are divided
    made_for: tuple[int, int, int, int, int, bool, int | None]
    """Requests, query tokens, heads, KV heads, head size, causal and window of the planned batch.
    `paged_attention` rejects the plan for any other batch."""


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
        seq_lens: int32 [B], the exact number of tokens of each request including its new ones.
        query_start_loc: int32 [B + 1], offsets of the requests' query tokens.
        num_heads: Query heads, a multiple of `num_kv_heads`.
        num_kv_heads: KV heads.
        head_size: Dims of a head.
        page_size: Tokens of a page.
        causal, window: As for `paged_attention`.
        num_threads: Threads to divide the work among; None for torch's number of threads.

    Raises:
        ValueError: The offsets are negative or not sorted, so that the kernels would write outside
            the output.
    """
    threads = torch.get_num_threads() if num_threads is None else num_threads
    group = num_heads // num_kv_heads
    most_parts = -(-_ITEMS_PER_THREAD * threads // num_kv_heads) if threads > 1 else 1
    lengths, starts = seq_lens.tolist(), query_start_loc.tolist()
    if starts[0] < 0 or starts != sorted(starts):
        raise attention_error(f"query_start_loc must rise from 0, got {starts}")
    items: list[WorkItem] = []
    num_divided = partial_rows = 0
    for request, length in enumerate(lengths):
        queries = starts[request + 1] - starts[request]
        rows = queries * group
        if rows <= 0:
            continue
        whole = WorkItem(request, starts[request], queries, length, 0, rows, 0, length, 1, 0, 0, 0)
        if rows > _MAX_PART_ROWS:
            enough = rows * num_kv_heads // ROW_BLOCK >= _ITEMS_PER_THREAD * threads
            most = ROW_BLOCK if enough else _MAX_PART_ROWS
            for row in range(0, rows, most):
                items.append(whole._replace(first_row=row, rows=min(most, rows - row)))
            continue
        first = 0
        if window is not None:
            first = max(0, length - queries - window + 1) // CHUNK * CHUNK
        part = max(_MIN_PART, -(-(length - first) // most_parts))
        part = -(-part // CHUNK) * CHUNK
        keys = range(first, length, part)
        if len(keys) <= 1:
            items.append(whole)
            continue
        whole = whole._replace(parts=len(keys), divided=num_divided, first_partial=partial_rows)
        num_divided += 1
        for key in keys:
            last = min(length, key + part)
            items.append(whole._replace(first_key=key, last_key=last, partial=partial_rows))
            partial_rows += rows
    table = np.array(items, dtype_of(WorkItem))
    table = table[np.argsort(-_cost(table, group, causal, window), kind="stable")]
    made_for = (len(lengths), starts[-1], num_heads, num_kv_heads, head_size, causal, window)
    return Plan(table, table.ctypes.data, partial_rows, num_divided, made_for)


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
