# SPDX-License-Identifier: Apache-2.0
"""Checks the kernels' arguments, on every device, before a kernel touches memory.

The checks run at every call, so messages are formatted only for an error.
"""

from __future__ import annotations

import torch

from vllm_hybrid_kv.kernels import k8v4

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes of queries, keys, values and outputs."""


def attention_error(reason: str) -> ValueError:
    """Return the error of an invalid call of `paged_attention`."""
    return ValueError(f"k8v4 attention: {reason}")


def store_error(tensor: str, expected: str, got: object) -> ValueError:
    """Return the error of an invalid call of `quantise_and_store`."""
    return ValueError(f"quantise_and_store: {tensor} must be {expected}, got {got}")


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
    if query.dim() != 3 or query.dtype not in DTYPES:
        raise attention_error(
            f"query must be bf16, fp16 or fp32 [T, Hq, D], got {query.dtype} {tuple(query.shape)}"
        )
    tokens, num_heads, head_size = query.shape
    if cache.dim() != 4 or cache.dtype != torch.uint8:
        raise attention_error(
            f"cache must be uint8 [blocks, H, N, bytes], got {cache.dtype} {tuple(cache.shape)}"
        )
    _, num_kv_heads, page_size, slot = cache.shape
    if slot != k8v4.slot_bytes(head_size):
        raise attention_error(
            f"a slot of head size {head_size} has {k8v4.slot_bytes(head_size)} bytes, "
            f"the cache's have {slot}"
        )
    if cache.stride()[1:] != (page_size * slot, slot, 1):
        raise attention_error(f"pages of the cache must be contiguous, got {cache.stride()}")
    if num_kv_heads <= 0 or num_heads % num_kv_heads:
        raise attention_error(
            f"{num_heads} query heads are not a multiple of {num_kv_heads} KV heads"
        )
    if out.shape != query.shape or out.dtype != query.dtype:
        raise attention_error(
            f"out must be like query, {query.dtype} {tuple(query.shape)}, "
            f"got {out.dtype} {tuple(out.shape)}"
        )
    if query.stride(2) != 1 or out.stride(2) != 1:
        raise attention_error("the dims of query and out must be contiguous")
    if seq_lens.dtype != torch.int32 or seq_lens.dim() != 1 or not seq_lens.is_contiguous():
        raise attention_error("seq_lens must be contiguous int32 [B]")
    requests = seq_lens.shape[0]
    if (
        query_start_loc.dtype != torch.int32
        or query_start_loc.shape != (requests + 1,)
        or not query_start_loc.is_contiguous()
    ):
        raise attention_error(f"query_start_loc must be contiguous int32 [{requests + 1}]")
    if (
        block_table.dtype != torch.int32
        or block_table.dim() != 2
        or block_table.shape[0] < requests
        or (block_table.stride(1) != 1 and block_table.shape[1] > 1)
    ):
        raise attention_error(
            f"block_table must be int32 with at least {requests} rows, contiguous inside"
        )
    if sinks is not None and sinks.shape != (num_heads,):
        raise attention_error(f"sinks must hold {num_heads} numbers, one for each query head")
    if lse is not None and (lse.dtype != torch.float32 or lse.shape != (tokens, num_heads)):
        raise attention_error(f"lse must be float32 [{tokens}, {num_heads}]")
    # An address of another device is invalid here, and reading it ends the process.
    for tensor in (cache, block_table, seq_lens, query_start_loc, out, sinks, lse):
        if tensor is not None and tensor.device != query.device:
            raise attention_error(
                f"all tensors must be on query's device, {query.device}, got {tensor.device}"
            )
    if debug:
        _check_indices(cache, block_table, seq_lens, query_start_loc, tokens)


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
                f"request {request} of {length} tokens needs {pages} "
                f"pages of {page_size}, its block table has {table.shape[1]}"
            )
        blocks = table[request, :pages]
        if pages and not 0 <= int(blocks.min()) <= int(blocks.max()) < cache.shape[0]:
            raise attention_error(
                f"request {request} names a block outside the cache's "
                f"{cache.shape[0]}: {blocks.tolist()}"
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
    if key.dtype not in DTYPES:
        raise store_error("key", "bfloat16, float16 or float32", key.dtype)
    if value.dtype != key.dtype:
        raise store_error("value", f"of key's dtype, {key.dtype}", value.dtype)
    if key.dim() != 3:
        raise store_error("key", "[tokens, heads, head size]", list(key.shape))
    if value.shape != key.shape:
        raise store_error("value", f"of key's shape, {list(key.shape)}", list(value.shape))
    if slots.dtype not in (torch.int64, torch.int32):
        raise store_error("slot_mapping", "int64 or int32", slots.dtype)
    if slots.dim() != 1 or slots.shape[0] > key.shape[0]:
        expected = f"one slot for each of at most {key.shape[0]} tokens"
        raise store_error("slot_mapping", expected, f"shape {list(slots.shape)}")
    _check_pages(cache, key.shape[1], key.shape[2])
    if not key.device == value.device == slots.device == cache.device == device:
        tensors = {"key": key, "value": value, "slot_mapping": slots, "cache": cache}
        name = next(name for name, tensor in tensors.items() if tensor.device != device)
        raise store_error(name, f"on {device}", tensors[name].device)


def _check_pages(cache: torch.Tensor, num_heads: int, head_size: int) -> None:
    if cache.dtype != torch.uint8:
        raise store_error("cache", "uint8", cache.dtype)
    slot = k8v4.slot_bytes(head_size)
    shape = cache.shape
    if len(shape) != 4 or shape[1] != num_heads or shape[3] != slot:
        expected = f"[blocks, {num_heads}, page size, {slot}] for {num_heads} heads of {head_size}"
        raise store_error("cache", expected, list(shape))
    if shape[2] <= 0 or shape[2] % k8v4.TILE_TOKENS:
        expected = f"of pages of a multiple of {k8v4.TILE_TOKENS} tokens"
        raise store_error("cache", expected, shape[2])
    blocks, heads, tokens, last = cache.stride()
    head_bytes = shape[2] * slot
    if (
        (last, tokens) != (1, slot)
        or (num_heads > 1 and heads != head_bytes)
        or (shape[0] > 1 and blocks < num_heads * head_bytes)
    ):
        expected = f"contiguous within a block, strides [any, {head_bytes}, {slot}, 1]"
        raise store_error("cache", expected, list(cache.stride()))


def check_duplicates(slots: torch.Tensor) -> None:
    """Reject slots that are named twice, because either token could win.

    Raises:
        ValueError: A slot of `slots` is named twice.
    """
    named, counts = slots[slots >= 0].unique(return_counts=True)
    twice = named[counts > 1]
    if len(twice):
        raise store_error("slot_mapping", "without a slot twice", f"slot {int(twice[0])} again")
