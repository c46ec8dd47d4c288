# SPDX-License-Identifier: Apache-2.0
"""Keeps the states at the ends of answers, where the next turns of conversations start."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import chain

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import MambaManager, SingleTypeKVCacheManager
from vllm.v1.request import Request

from vllm_hybrid_kv.coordinator.checkpoints import Checkpoint
from vllm_hybrid_kv.coordinator.traffic import Turn

INTERVAL = 64
"""Tokens between two copies of a state. A copy moves about as many bytes as one decoding step.
Linear attention computes in chunks of 64 tokens, so a request that resumes at a copy has the same
chunks as a request that starts at 0."""

MAX_SHARE = 32
"""Copies of states may take at most one block in 32."""


@dataclass
class Running:
    """The progress of a request that holds blocks.

    Attributes:
        latest: The last checkpoint that it registered, except at block boundaries. Before its first
            registration, the longest tracked checkpoint of its prompt.
        prompt_units: Number of its hash units that were added to `SeenPrefixes` when it started.
        turn: How its prompt continues a conversation.
        units: Number of its computed hash units.
        boundary: The checkpoint that it registered last at a block boundary.
        prompt_end: The checkpoint at the end of its prompt, if that is pinned.
        copies: The blocks with the latest copy of its states, one per group, or none.
        copied: Number of its computed tokens at the last copy of its states.
        windows: By group, the blocks of its windows at the last copy of its states.
        partial: Group, block and tokens of its checkpoints that end inside an attention block.
        cached: Number of its cached whole attention blocks when `partial` was last cached.
    """

    request: Request
    latest: Checkpoint | None
    prompt_units: int
    turn: Turn = Turn.FIRST
    units: int = 0
    boundary: Checkpoint | None = None
    prompt_end: Checkpoint | None = None
    copies: list[KVCacheBlock] = field(default_factory=list)
    copied: int = 0
    windows: dict[int, list[KVCacheBlock]] = field(default_factory=dict)
    partial: list[tuple[int, KVCacheBlock, int]] = field(default_factory=list)
    cached: int = -1


def first_needed(manager: SingleTypeKVCacheManager, tokens: int) -> int:
    """Return the first block of a group that a request needs to resume after `tokens` tokens."""
    skipped: int = manager.get_num_skipped_tokens(tokens)
    return max(skipped, 0) // manager.block_size


class DecodeSnapshots:
    """Copies the states of decoding requests, so that a copy is cached when a request ends.

    The end of an answer is not known in advance. So the state is copied every `INTERVAL` tokens.
    Each copy overwrites the previous one, in blocks that are held for the request. vLLM makes the
    copy at the start of a step, by copy-on-write. If a request lacks blocks, all copies are freed.

    A request that resumes at a copy also needs the windows before it (sliding windows, local
    chunks). While a request decodes, its windows move past these blocks. So they are held until the
    next copy. With its default retention interval 0, vLLM caches no windows of an answer, so they
    are cached with the copy.

    Attributes:
        interval: Tokens between two copies.
    """

    def __init__(
        self,
        managers: dict[int, MambaManager],
        windows: dict[int, SingleTypeKVCacheManager],
        pool: BlockPool,
        alignment: int,
    ) -> None:
        """Take the managers of the groups with states and with windows.

        Hits end at multiples of `alignment` tokens.
        """
        self.interval = math.lcm(INTERVAL, alignment)
        self._managers = managers
        self._windows = windows
        self._pool = pool
        self._max_copies = pool.num_gpu_blocks // MAX_SHARE
        # If hits end at whole blocks, vLLM keeps the states, so no copy is needed. With draft
        # tokens, it is unknown which block has the state after the accepted tokens.
        self._possible = all(
            alignment < manager.block_size and manager.num_speculative_blocks == 0
            for manager in managers.values()
        )

    def is_due(self, request: Request) -> bool:
        """Whether to copy the states of a request before this step."""
        tokens = request.num_computed_tokens
        due = tokens % self.interval == 0 and tokens > request.num_prompt_tokens
        return due and self._possible

    def copy(self, running: Running, num_requests: int) -> None:
        """Copy the states of a decoding request, if they are available and there is room.

        Call this before a step, when the request's blocks are allocated. At that time, the blocks
        hold the states after all computed tokens. A step scheduled ahead may overwrite them.
        `num_requests` is the number of requests that hold blocks.
        """
        request = running.request
        tokens = request.num_computed_tokens
        managers = list(self._managers.values())
        sources: list[KVCacheBlock] = [
            manager.req_to_blocks[request.request_id][(tokens - 1) // manager.block_size]
            for manager in managers
        ]
        if any(block.is_null for block in sources):
            return
        if not running.copies:
            free = len(self._pool.free_block_queue.unpinned)
            if num_requests * len(sources) > self._max_copies or free < len(sources):
                return
            running.copies = self._pool.get_new_blocks(len(sources))
        running.copied = tokens
        for manager, source, copy in zip(managers, sources, running.copies, strict=True):
            # vLLM releases both references after the step.
            source.ref_cnt += 1
            copy.ref_cnt += 1
            manager._pending_cow_copies.append((source, copy))
        self._hold_windows(running)

    def _hold_windows(self, running: Running) -> None:
        """Hold the blocks of a request's current windows instead of those at the previous copy."""
        previous = list(chain.from_iterable(running.windows.values()))
        for group, manager in self._windows.items():
            first, end = first_needed(manager, running.copied), running.copied // manager.block_size
            held = manager.req_to_blocks[running.request.request_id][first:end]
            for block in held:
                block.ref_cnt += 1
            running.windows[group] = held
        self._pool.free_blocks(previous)

    def cache(self, running: Running) -> bool:
        """Cache the latest copy of a request that ends, and the windows before it.

        Return False if the request was aborted before all tokens of the copy were known.
        """
        if running.copied // self._pool.hash_block_size > len(running.request.block_hashes):
            return False
        for (group, manager), copy in zip(self._managers.items(), running.copies, strict=True):
            self._pool.cache_partial_block(
                request=running.request,
                block=copy,
                num_tokens=running.copied,
                kv_cache_group_id=group,
                block_size=manager.block_size,
            )
        for group, window in running.windows.items():
            size = self._windows[group].block_size
            end = running.copied // size
            nulls = [self._pool.null_block] * (end - len(window))
            self._pool.cache_full_blocks(
                request=running.request,
                blocks=nulls + window,
                num_cached_blocks=len(nulls),
                num_full_blocks=end,
                block_size=size,
                kv_cache_group_id=group,
                block_mask=[block.block_hash is None for block in window],
            )
        return True

    def release(self, running: Running) -> None:
        """Free the blocks that are held for the copy of a request's states."""
        held = [*running.copies, *chain.from_iterable(running.windows.values())]
        running.copies = []
        running.windows = {}
        self._pool.free_blocks(held)
