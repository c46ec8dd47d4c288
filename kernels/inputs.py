# SPDX-License-Identifier: Apache-2.0
"""Check the arguments of the kernels, on every device, before a kernel touches memory.

The checks run at every call, so they format a message only if one fails.
"""

from __future__ import annotations

import torch

from vllm_hybrid_kv.kernels import k8v4

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""The dtypes that queries, keys, values and outputs may have."""

ATTENTION, STORE = "k8v4 attention", "quantise_and_store"


def attention_error(reason: str) -> ValueError:
    """Build the exception to raise for an invalid call of `paged_attention`."""
    return ValueError(f"{ATTENTION}: {reason}")


def invalid(call: str, name: str, tensor: torch.Tensor, *expected: object) -> ValueError:
    """Build the exception for an invalid tensor. `expected` is the text after "must be"."""
    parts = (list(part) if isinstance(part, torch.Size) else part for part in expected)
    return ValueError(
        f"{call}: {name} must be {' '.join(map(str, parts))}, got {tensor.dtype} "
        f"{list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"
    )


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
        debug: Also check that lengths and block numbers stay inside the tensors. This reads them
            all, so it waits for a GPU.

    Raises:
        ValueError: A shape, dtype, stride, device or, with `debug`, an index is invalid.
    """
    shape, dtype = query.shape, query.dtype
    if len(shape) != 3 or dtype not in DTYPES or query.stride(2) != 1:
        raise invalid(ATTENTION, "query", query, "bf16, fp16 or fp32 [tokens, query heads, head",
                      "size], contiguous in its last dim")  # fmt: skip
    _, num_heads, head_size = shape
    slot = k8v4.slot_bytes(head_size)
    if cache.dim() != 4 or cache.dtype != torch.uint8 or cache.shape[3] != slot:
        raise invalid(ATTENTION, "cache", cache, "uint8 [blocks, KV heads, page size,", slot,
                      "bytes] for head size", head_size)  # fmt: skip
    _, num_kv_heads, page_size, _ = cache.shape
    if cache.stride()[1:] != (page_size * slot, slot, 1):
        raise invalid(ATTENTION, "cache", cache, "contiguous within a block")
    if page_size <= 0 or page_size % k8v4.TILE_TOKENS:
        raise invalid(ATTENTION, "cache", cache, "of a page size that is a multiple of",
                      k8v4.TILE_TOKENS)  # fmt: skip
    if num_kv_heads <= 0 or num_heads % num_kv_heads:
        raise invalid(ATTENTION, "query", query,
                      "[T, Hq, D] with Hq a multiple of the cache's KV heads,",
                      num_kv_heads)  # fmt: skip
    if out.shape != shape or out.dtype != dtype or out.stride(2) != 1:
        raise invalid(ATTENTION, "out", out, "of query's dtype and shape,", dtype, shape,
                      "contiguous in its last dim")  # fmt: skip
    if seq_lens.dtype != torch.int32 or seq_lens.dim() != 1 or not seq_lens.is_contiguous():
        raise invalid(ATTENTION, "seq_lens", seq_lens, "contiguous int32 [requests]")
    starts, requests = query_start_loc, seq_lens.shape[0]
    fits = starts.dtype == torch.int32 and starts.shape == (requests + 1,)
    if not fits or not starts.is_contiguous():
        raise invalid(ATTENTION, "query_start_loc", starts, "contiguous int32 [requests + 1] for",
                      requests, "requests")  # fmt: skip
    if (
        block_table.dtype != torch.int32
        or block_table.dim() != 2
        or block_table.shape[0] < requests
        or (block_table.stride(1) != 1 and block_table.shape[1] > 1)
    ):
        raise invalid(ATTENTION, "block_table", block_table,
                      "int32 with contiguous rows, at least", requests)  # fmt: skip
    if sinks is not None and sinks.shape != (num_heads,):
        raise invalid(ATTENTION, "sinks", sinks, "one number for each of", num_heads, "query heads")
    if lse is not None and (lse.dtype != torch.float32 or lse.shape != shape[:2]):
        raise invalid(ATTENTION, "lse", lse, "float32", shape[:2])
    # A kernel that reads the memory of another device crashes the process.
    for name, tensor in (
        ("cache", cache), ("block_table", block_table), ("seq_lens", seq_lens),
        ("query_start_loc", starts), ("out", out), ("sinks", sinks), ("lse", lse),
    ):  # fmt: skip
        if tensor is not None and tensor.device != query.device:
            raise invalid(ATTENTION, name, tensor, "on query's device,", query.device)
    if debug:
        _check_indices(cache, block_table, seq_lens, query_start_loc, shape[0])


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
    if key.dim() != 3 or key.dtype not in DTYPES:
        raise invalid(STORE, "key", key, "bf16, fp16 or fp32 [tokens, KV heads, head size]")
    if value.shape != key.shape or value.dtype != key.dtype:
        raise invalid(STORE, "value", value, "of key's dtype and shape,", key.dtype, key.shape)
    tokens, num_heads, head_size = key.shape
    is_integer = slots.dtype in (torch.int64, torch.int32)
    if not is_integer or slots.dim() != 1 or slots.shape[0] > tokens:
        raise invalid(STORE, "slot_mapping", slots, "int64 or int32, one slot for each of at most",
                      tokens, "tokens")  # fmt: skip
    slot, shape = k8v4.slot_bytes(head_size), cache.shape
    fits = cache.dtype == torch.uint8 and len(shape) == 4
    if not fits or shape[1] != num_heads or shape[3] != slot:
        raise invalid(STORE, "cache", cache, "uint8 [blocks,", num_heads, "KV heads, page size,",
                      slot, "bytes] for head size", head_size)  # fmt: skip
    if shape[2] <= 0 or shape[2] % k8v4.TILE_TOKENS:
        raise invalid(STORE, "cache", cache, "of a page size that is a multiple of",
                      k8v4.TILE_TOKENS)  # fmt: skip
    blocks, heads, token, last = cache.stride()
    head_bytes = shape[2] * slot
    if (
        (last, token) != (1, slot)
        or (num_heads > 1 and heads != head_bytes)
        or (shape[0] > 1 and blocks < num_heads * head_bytes)
    ):
        raise invalid(STORE, "cache", cache, "contiguous within a block, with", head_bytes,
                      "bytes between heads and", slot, "between tokens")  # fmt: skip
    if not key.device == value.device == slots.device == cache.device == device:
        tensors = {"key": key, "value": value, "slot_mapping": slots, "cache": cache}
        name = next(name for name, tensor in tensors.items() if tensor.device != device)
        raise invalid(STORE, name, tensors[name], "on", device)


def check_duplicates(slots: torch.Tensor) -> None:
    """Reject a slot that two tokens name, because it could end up with either token.

    Raises:
        ValueError: A slot occurs twice in `slots`.
    """
    named, counts = slots[slots >= 0].unique(return_counts=True)
    twice = named[counts > 1]
    if len(twice):
        raise ValueError(
            f"{STORE}: slot_mapping names slot {int(twice[0])} twice; give each token its own slot"
        )
