# SPDX-License-Identifier: Apache-2.0
"""Copies the whole of a block, whichever layers it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch


def views_to_copy(kv_caches: Iterable[torch.Tensor], num_blocks: int) -> list[list[torch.Tensor]]:
    """Sort out which views of the KV cache have to be copied for a block to be copied whole.

    Layers of different KV groups share memory: a block holds attention's pages or a state. vLLM's
    `copy_kv_cache_blocks_inplace` takes views that begin at one address for one and the same, and
    copies the first. Where that is a layer's state, and the state is shorter than the page, the
    rest of an attention block is left behind.

    Args:
        kv_caches: The views of all layers, [num_blocks x kernel blocks a block, ...].
        num_blocks: Blocks of the pool.

    Returns:
        Lists of views, no two of which begin at one address in a list. Views that differ in no
        more than the layer are there once, and so is memory that is nothing but blocks, for vLLM
        copies that by whole blocks.
    """
    rounds: list[list[torch.Tensor]] = []
    seen: dict[tuple[torch.device, int], list[tuple[Any, ...]]] = {}
    whole: set[tuple[torch.device, int]] = set()
    for cache in kv_caches:
        views = seen.setdefault((cache.device, cache.data_ptr()), [])
        view = (cache.shape, cache.stride(), cache.dtype)
        storage = cache.untyped_storage()
        memory = (cache.device, storage.data_ptr())
        if view in views or memory in whole:
            continue
        if len(views) == len(rounds):
            rounds.append([])
        rounds[len(views)].append(cache)
        views.append(view)
        per_block = cache.shape[0] // num_blocks * cache.stride(0) * cache.element_size()
        if storage.nbytes() == num_blocks * per_block:
            whole.add(memory)
    return rounds


def copy_whole_blocks(original: Callable[..., None]) -> Callable[..., None]:
    """Return a `copy_kv_cache_blocks_inplace` that leaves nothing of a block behind.

    Args:
        original: vLLM's.
    """

    def copy_kv_cache_blocks_inplace(
        kv_caches: Iterable[torch.Tensor], num_blocks: int, kv_cache_block_copies: Sequence[Any]
    ) -> None:
        if kv_cache_block_copies:
            for views in views_to_copy(kv_caches, num_blocks):
                original(views, num_blocks, kv_cache_block_copies)

    return copy_kv_cache_blocks_inplace
