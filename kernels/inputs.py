# SPDX-License-Identifier: Apache-2.0
"""Checks the kernels' arguments, on every device, before a kernel touches memory.

The checks run at every call, so messages are formatted only for an error.
"""

from __future__ import annotations

import functools

import torch

from vllm_hybrid_kv.kernels import k8v4

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes of queries, keys, values and outputs."""


def attention_error(reason: str) -> ValueError:
    """Return the error of an invalid call of `paged_attention`."""
    return ValueError(f"k8v4 attention: {reason}")


def _check(call: str, ok: bool, name: str, tensor: torch.Tensor, *expected: object) -> None:
    """Raise ValueError with the parts of `expected` and the tensor's properties unless `ok`."""
    if not ok:
        parts = (list(part) if isinstance(part, torch.Size) else part for part in expected)
        raise ValueError(
            f"{call}: {name} must be {' '.join(map(str, parts))}, got {tensor.dtype} "
            f"{list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"
        )


_attention = functools.partial(_check, "k8v4 attention")
_store = functools.partial(_check, "quantise_and_store")


def check_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    out: torch.Tensor,
    *,
    sinks: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    debug: bool = False,
) -> None:
    """Check the arguments of `paged_attention`.

    Args:
        query, cache, block_table, seq_lens, query_start_loc, out, sinks, lse: As for
            `paged_attention`.
        debug: Also check that lengths and block numbers stay inside the tensors, which reads them
            all, and waits for a GPU.

    Raises:
        ValueError: A shape, dtype, stride, device or, with `debug`, an index is invalid.
    """
    _attention(query.dim() == 3 and query.dtype in DTYPES, "query", query,
               "bf16, fp16 or fp32 [tokens, query heads, head size]")  # fmt: skip
    _, num_heads, head_size = query.shape
    _attention(cache.dim() == 4 and cache.dtype == torch.uint8, "cache", cache,
               "uint8 [blocks, KV heads, page size, slot bytes]")  # fmt: skip
    _, num_kv_heads, page_size, slot = cache.shape
    _attention(slot == k8v4.slot_bytes(head_size), "cache", cache, "made of slots of",
               k8v4.slot_bytes(head_size), "bytes for head size", head_size)  # fmt: skip
    _attention(cache.stride()[1:] == (page_size * slot, slot, 1), "cache", cache,
               "contiguous within a block")  # fmt: skip
    _attention(num_kv_heads > 0 and num_heads % num_kv_heads == 0, "query", query,
               "of a number of heads that is a multiple of the cache's", num_kv_heads)  # fmt: skip
    _attention(out.shape == query.shape and out.dtype == query.dtype, "out", out,
               "of query's dtype and shape,", query.dtype, query.shape)  # fmt: skip
    for name, rows in (("query", query), ("out", out)):
        _attention(rows.stride(2) == 1, name, rows,
                   "contiguous in its last dim (call its contiguous())")  # fmt: skip
    _attention(
        seq_lens.dtype == torch.int32 and seq_lens.dim() == 1 and seq_lens.is_contiguous(),
        "seq_lens", seq_lens, "contiguous int32 [requests]",
    )  # fmt: skip
    requests = seq_lens.shape[0]
    starts = query_start_loc
    _attention(
        starts.dtype == torch.int32 and starts.shape == (requests + 1,) and starts.is_contiguous(),
        "query_start_loc", starts, "contiguous int32 [requests + 1] for", requests, "requests",
    )  # fmt: skip
    _attention(
        block_table.dtype == torch.int32
        and block_table.dim() == 2
        and block_table.shape[0] >= requests
        and (block_table.stride(1) == 1 or block_table.shape[1] < 2),
        "block_table", block_table, "int32 with contiguous rows, at least", requests,
    )  # fmt: skip
    if sinks is not None:
        _attention(sinks.shape == (num_heads,), "sinks", sinks,
                   "one number for each of", num_heads, "query heads")  # fmt: skip
    if lse is not None:
        _attention(lse.dtype == torch.float32 and lse.shape == query.shape[:2], "lse", lse,
                   "float32", query.shape[:2])  # fmt: skip
    # An address of another device is invalid here, and reading it ends the process.
    for name, tensor in (
        ("cache", cache), ("block_table", block_table), ("seq_lens", seq_lens),
        ("query_start_loc", starts), ("out", out), ("sinks", sinks), ("lse", lse),
    ):  # fmt: skip
        if tensor is not None and tensor.device != query.device:
            _attention(False, name, tensor, "on query's device,", query.device)
    if debug:
        _check_indices(cache, block_table, seq_lens, query_start_loc, query.shape[0])


def _check_indices(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    tokens: int,
) -> None:
    starts = query_start_loc.tolist()
    if starts[0] != 0 or starts != sorted(starts) or starts[-1] > tokens:
        raise attention_error(
            f"query_start_loc must rise from 0 to at most {tokens} query tokens, got {starts}"
        )
    page_size = cache.shape[2]
    table = block_table.cpu()
    for request, length in enumerate(seq_lens.tolist()):
        pages = -(-length // page_size)
        if length < 0 or pages > table.shape[1]:
            raise attention_error(
                f"seq_lens must be lengths that the block table's {table.shape[1]} pages of "
                f"{page_size} tokens hold, got {length} tokens of request {request}"
            )
        blocks = table[request, :pages]
        if pages and not 0 <= int(blocks.min()) <= int(blocks.max()) < cache.shape[0]:
            raise attention_error(
                f"block_table must name blocks of the cache, 0 to {cache.shape[0] - 1}, "
                f"got {blocks.tolist()} for request {request}"
            )


def check_store(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    device: torch.device,
) -> None:
    """Check the arguments of `quantise_and_store`, except for the contents of `slots`.

    Args:
        key, value, cache, slots: As for `quantise_and_store`.
        device: The kernel's device.

    Raises:
        ValueError: A shape, dtype, stride or device is invalid.
    """
    _store(key.dim() == 3 and key.dtype in DTYPES, "key", key,
           "bf16, fp16 or fp32 [tokens, KV heads, head size]")  # fmt: skip
    _store(value.shape == key.shape and value.dtype == key.dtype, "value", value,
           "of key's dtype and shape,", key.dtype, key.shape)  # fmt: skip
    tokens, num_heads, head_size = key.shape
    valid = slots.dtype in (torch.int64, torch.int32) and slots.dim() == 1
    _store(valid and slots.shape[0] <= tokens, "slot_mapping", slots,
           "int64 or int32, one slot for each of at most", tokens, "tokens")  # fmt: skip
    slot = k8v4.slot_bytes(head_size)
    shape = cache.shape
    valid = cache.dtype == torch.uint8 and len(shape) == 4
    _store(valid and (shape[1], shape[3]) == (num_heads, slot), "cache", cache,
           "uint8 [blocks,", num_heads, "KV heads, page size,", slot, "bytes]")  # fmt: skip
    _store(shape[2] > 0 and shape[2] % k8v4.TILE_TOKENS == 0, "cache", cache,
           "made of pages of a multiple of", k8v4.TILE_TOKENS, "tokens")  # fmt: skip
    block_stride, head_stride, *strides = cache.stride()
    head_bytes = shape[2] * slot
    contiguous = strides == [slot, 1] and (num_heads < 2 or head_stride == head_bytes)
    contiguous = contiguous and (shape[0] < 2 or block_stride >= num_heads * head_bytes)
    _store(contiguous, "cache", cache, "contiguous within a block, with", head_bytes,
           "bytes between heads and", slot, "between tokens")  # fmt: skip
    for name, tensor in (("key", key), ("value", value), ("cache", cache), ("slot_mapping", slots)):
        if tensor.device != device:
            _store(False, name, tensor, "on", device)


def check_duplicates(slots: torch.Tensor) -> None:
    """Reject slots that are named twice, because either token could win.

    Raises:
        ValueError: A slot of `slots` is named twice.
    """
    named, counts = slots[slots >= 0].unique(return_counts=True)
    twice = named[counts > 1]
    if len(twice):
        raise ValueError(
            f"quantise_and_store: slot_mapping names slot {int(twice[0])} twice; "
            "give each token its own slot"
        )
