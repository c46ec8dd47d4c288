# SPDX-License-Identifier: Apache-2.0
"""The memory layouts that Python and the compiled kernels share: records and a thread's scratch.

Python fills a record by name; numba code reads its fields by the same names.
"""

from __future__ import annotations

import functools
import operator
import struct
import threading
from typing import Any, NamedTuple, get_type_hints

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic

from vllm_hybrid_kv.kernels import k8v4

BFLOAT16, FLOAT16, FLOAT32 = range(3)
DTYPE_CODES = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float32: FLOAT32}


class AttentionCall(NamedTuple):
    """One call of attention: addresses, strides in bytes, and sizes."""

    query: int
    query_token_stride: int
    query_head_stride: int
    out: int
    out_token_stride: int
    out_head_stride: int
    dtype_code: int  # of queries and outputs
    lse: int  # 0: not wanted
    lse_token_stride: int
    lse_head_stride: int
    cache: int
    block_stride: int
    block_table: int
    block_table_stride: int
    sinks: int  # float32 [Hq], 0: none
    num_kv_heads: int
    group: int
    dims: int
    output_stride: int  # of a row of float32 dims, a multiple of 64
    page_size: int
    causal: int
    window: int  # 0: none
    items: int  # `WorkItem`s
    num_items: int
    partials: int
    counters: int  # int64: the next item, then finished parts of each divided request and head
    scale: float
    soft_cap: float  # 0: none
    unit: float  # `k8v4.rotation_unit`


class StoreCall(NamedTuple):
    """One call of quantise-and-store: addresses, strides in bytes, and sizes."""

    key: int
    key_token_stride: int
    key_head_stride: int
    value: int
    value_token_stride: int
    value_head_stride: int
    dtype_code: int  # of keys and values
    cache: int
    block_stride: int
    slots: int  # int64 [num_tokens]
    num_slots: int
    num_tokens: int
    num_heads: int
    head_size: int
    page_size: int
    unit: float  # `k8v4.rotation_unit`


class WorkItem(NamedTuple):
    """A block of rows (query tokens x heads of a group) of one request, and a range of keys."""

    request: int
    query_start: int  # the request's first query token in the batch
    query_length: int  # how many query tokens the request has
    length: int  # how many tokens the request has
    first_row: int
    rows: int
    first_key: int  # a multiple of CHUNK
    last_key: int
    parts: int  # how many items share the keys of these rows; if 1, the item writes the results
    divided: int  # index of the request among those with several parts
    first_partial: int  # index of the first part's first row of partial sums
    partial: int  # index of the item's own first row of partial sums


def dtype_of(record: type) -> np.dtype[Any]:
    """Return numpy's dtype of a record of int64 and float64 fields."""
    formats = {int: np.int64, float: np.float64}
    return np.dtype([(name, formats[kind]) for name, kind in get_type_hints(record).items()])


class CallBuffer(threading.local):
    """Memory for one record. Each thread has its own, at a fixed address."""

    def __init__(self, record: type) -> None:
        codes, fields = {int: "q", float: "d"}, get_type_hints(record)
        layout = struct.Struct("=" + "".join(codes[kind] for kind in fields.values()))
        memory = np.empty(layout.size, np.uint8)
        self._address = memory.ctypes.data
        self._pack = functools.partial(layout.pack_into, memory.data, 0)
        self._in_order = operator.itemgetter(*fields)

    def write(self, **fields: float) -> int:
        """Fill the memory with all fields of the record, and return its address."""
        self._pack(*self._in_order(fields))
        return self._address


def _record_at(record: type) -> Any:
    """Return a function for numba code that returns the record at an address."""
    kind = numba.from_dtype(dtype_of(record))

    @intrinsic
    def record_at(context: Any, address: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return builder.inttoptr(values[0], context.get_value_type(kind))

        return kind(types.int64), code

    return record_at


attention_call_at = _record_at(AttentionCall)
store_call_at = _record_at(StoreCall)
item_at = _record_at(WorkItem)
ITEM_BYTES = dtype_of(WorkItem).itemsize

TILE_ADDRESSES = np.dtype(
    [(name, np.int64) for name in ("keys", "values", "key_scales", "value_scales")]
)
"""Where the four parts of a tile are in memory."""

TILE_RECORD = TILE_ADDRESSES.itemsize

STATE_FIELDS = ("largest", "total", "offset", "weight_step", "query_step", "raised_by")
ROW_STATE = np.dtype([(name, np.float32) for name in STATE_FIELDS])
"""The state of a row. `largest`, `total`: the online softmax's maximum and its sum of weights.
`offset` must be added to every dim of the output. `weight_step`, `query_step`: the scales of the
last chunk's integer weights and of the query's codes. `raised_by` is subtracted from integer
scores, because every key byte is 128 larger than its code."""

STATE_BYTES = ROW_STATE.itemsize

ROW_BLOCK = 128
"""Maximum rows of a work item."""

CHUNK = 256
"""Maximum tokens of a chunk. A work item processes its keys chunk by chunk."""

TILE = k8v4.TILE_TOKENS

# Where each part of a thread's scratch memory begins. Rows of scores are an odd number of cache
# lines apart, so that the same column of different rows is in different sets of the cache.
MAX_DIMS = k8v4.MAX_HEAD_SIZE
SCORE_STRIDE = 4 * CHUNK + 64
QUERIES_AT = 0
SCORES_AT = QUERIES_AT + 2 * ROW_BLOCK * MAX_DIMS
WEIGHTS_AT = SCORES_AT + ROW_BLOCK * SCORE_STRIDE
OUTPUTS_AT = WEIGHTS_AT + ROW_BLOCK * SCORE_STRIDE
KEY_SCALES_AT = OUTPUTS_AT + 4 * ROW_BLOCK * MAX_DIMS
VALUE_SCALES_AT = KEY_SCALES_AT + 4 * CHUNK
TEMPORARY_AT = VALUE_SCALES_AT + 4 * CHUNK
SCRATCH_BYTES = TEMPORARY_AT + 64 * CHUNK + 16384
