# SPDX-License-Identifier: Apache-2.0
"""Publishes KV events in which every hash stands for one block of the event's tokens.

    len(block_hashes) x block_size = len(token_ids)

Block i of an event holds tokens i x block_size to (i + 1) x block_size of `token_ids`. Its hash is
the hash of the whole prefix that ends there. `parent_block_hash` is the hash of the prefix before
`token_ids`, or None at the start of a prompt.

vLLM 0.32 and 0.33 publish one event for all blocks that a step completes. Of states and windows,
only some of these blocks are cached. The event then has the tokens of all blocks, but the hashes of
the cached blocks only (vllm-project/vllm#44451).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock, make_block_hash_with_group_id
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.request import Request


def runs(flags: Iterable[bool]) -> Iterator[tuple[int, int]]:
    """Yield the start and the end of each run of true flags."""
    end = 0
    for flag, run in groupby(flags):
        start, end = end, end + len(list(run))
        if flag:
            yield start, end


def cache_runs(
    original: Callable[..., None],
    request: Request,
    blocks: Sequence[KVCacheBlock],
    num_cached_blocks: int,
    num_full_blocks: int,
    block_size: int,
    kv_cache_group_id: int,
    block_mask: Sequence[bool] | None = None,
) -> None:
    """Cache each run of contiguous blocks with `original`, which publishes an event for each run.

    `original` is a pool's `cache_full_blocks`. The other arguments are those of `original`.
    """
    new = blocks[num_cached_blocks:num_full_blocks]
    mask = [True] * len(new) if block_mask is None else block_mask
    cached = [flag and not block.is_null for flag, block in zip(mask, new, strict=True)]
    for start, end in runs(cached):
        original(
            request=request,
            blocks=blocks,
            num_cached_blocks=num_cached_blocks + start,
            num_full_blocks=num_cached_blocks + end,
            block_size=block_size,
            kv_cache_group_id=kv_cache_group_id,
        )


def publish_hit(
    manager: SingleTypeKVCacheManager, request: Request, blocks: Sequence[KVCacheBlock]
) -> None:
    """Publish an event for each cached run of the blocks that a request hits in one group.

    vLLM treats all blocks of a hit as whole and cached. It publishes hashes of null blocks, and
    raises an IndexError if the hit ends inside a block and the prompt in the same block.
    """
    pool, hashes = manager.block_pool, request.block_hashes
    unit, group = pool.hash_block_size, manager.kv_cache_group_id
    scale = manager.block_size // unit

    def is_cached(block: KVCacheBlock, end: int) -> bool:
        """Whether the block is cached for the request's first `end` hash units."""
        if end > len(hashes):
            return False
        key = make_block_hash_with_group_id(hashes[end - 1], group)
        found: bool = pool.cached_block_hash_to_block.contain(key, block.block_id)
        return found

    whole = [is_cached(block, (index + 1) * scale) for index, block in enumerate(blocks)]
    found = [(manager.block_size, start, end) for start, end in runs(whole)]
    if not whole[-1]:
        # The hit ends inside the last block, which may be cached for several prefixes.
        ends = range((len(blocks) - 1) * scale + 1, len(blocks) * scale)
        found += [(unit, end - 1, end) for end in ends if is_cached(blocks[-1], end)]
    for block_size, start, end in found:
        pool.emit_cached_block_events(request, end, block_size, group)
        _remove_leading_blocks(pool.kv_event_queue[-1], start)


def _remove_leading_blocks(event: Any, count: int) -> None:
    if count == 0:
        return
    event.parent_block_hash = event.block_hashes[count - 1]
    event.token_ids = event.token_ids[count * event.block_size :]
    # vLLM 0.32 has no `lookahead_token_ids`.
    for name in ("block_hashes", "extra_keys", "lookahead_token_ids"):
        if (by_block := getattr(event, name, None)) is not None:
            setattr(event, name, by_block[count:])
