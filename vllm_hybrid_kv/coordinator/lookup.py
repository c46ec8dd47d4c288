# SPDX-License-Identifier: Apache-2.0
"""Finds the longest prefix of a request that the KV groups of one spec can serve.

Lengths are in tokens. A hit is a multiple of `alignment`: the hash unit if partial hits are on,
otherwise a multiple of every group's block size. Every kind of group defines which multiples it can
serve. Every kind can serve 0.

* Full attention: all whole blocks before the length are cached. If the length is inside a block,
  a block that holds at least the tokens up to the length is cached.
* Sliding window: the blocks with the `window - 1` tokens before the length are cached.
* Chunked local attention: the blocks from the start of the next token's chunk are cached.
* Mamba: the state after exactly that many tokens is cached.

An attention group with draft layers (EAGLE, MTP) can serve a length only if one more unit after it
is cached: a hash unit if partial hits are on, otherwise a block (`eagle_proof_margin`). The reason
is that a draft layer's last key and value depend on the following token, which must be equal, too.
Mamba groups have no draft layers.

If full attention can serve a length, it can serve every shorter length. Other kinds may not.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from itertools import compress, islice

from vllm.utils.math_utils import cdiv, round_down
from vllm.v1.core.kv_cache_coordinator import SpecGroup
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import (
    ChunkedLocalAttentionManager,
    FullAttentionManager,
    MambaManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
)


class GroupLookup(ABC):
    """One lookup of a request in the KV groups of one spec. Later evictions invalidate it."""

    def __init__(
        self,
        group: SpecGroup,
        manager: SingleTypeKVCacheManager,
        block_hashes: Sequence[BlockHash],
        alignment: int,
    ) -> None:
        """Prepare the lookup of `block_hashes`, a request's hashes, one for each hash unit.

        `manager` is the manager of one of the groups. Its pool must have a `GroupedBlockMap`.
        """
        pool = manager.block_pool
        self.group = group
        self.manager = manager
        self.block_hashes = block_hashes
        self.alignment = alignment
        self.unit = pool.hash_block_size
        self.block_size = manager.block_size
        """Tokens per block, over all ranks of decode context parallelism."""
        self.num_hashed = len(block_hashes) * self.unit
        """How many tokens of the request have hashes, and so can be looked up."""
        self.lookahead = min(alignment, manager.block_size) if group.use_eagle else 0
        """Tokens that draft layers require beyond the length that they serve."""
        self.cached = list(map(pool.cached_block_hash_to_block.group, group.group_ids))
        """The cached blocks of each group, by hash."""

    @abstractmethod
    def longest(self, limit: int) -> int:
        """Return the greatest length up to `limit` that all the groups can serve."""

    @abstractmethod
    def blocks(self, length: int) -> list[list[KVCacheBlock]]:
        """Return the blocks of a length that `longest` returned, a list for each group.

        Each list covers the length, with null blocks where the group needs none.
        """

    def _hashes(self, first: int, end: int) -> Sequence[BlockHash]:
        """Return the hashes of blocks `first` to `end`. A block has the hash of its last unit."""
        scale = self.block_size // self.unit
        if scale == 1:
            return self.block_hashes[first:end]
        return self.block_hashes[(first + 1) * scale - 1 : end * scale : scale]


class FullAttentionLookup(GroupLookup):
    """Full attention. One scan of the blocks answers all later calls for shorter lengths."""

    _reach: int | None = None

    def longest(self, limit: int) -> int:
        """Return the greatest length up to `limit`, which must not increase between calls."""
        if self._reach is None:
            self._reach = self._scan(min(limit + self.lookahead, self.num_hashed))
        return round_down(max(0, min(limit, self._reach - self.lookahead)), self.alignment)

    def blocks(self, length: int) -> list[list[KVCacheBlock]]:
        """Return the blocks. Call this only once, because it changes the scanned lists in place."""
        count = cdiv(length, self.block_size)
        for run in self._runs:
            del run[min(count, self._num_whole) :]
        if count > self._num_whole:
            for run, tail in zip(self._runs, self._tails, strict=True):
                run.append(tail)
        return self._runs

    def _scan(self, num_tokens: int) -> int:
        """Look up at least `num_tokens` tokens. Return how many leading tokens all groups hold."""
        block_size = self.block_size
        most = min(cdiv(num_tokens, block_size), self.num_hashed // block_size)
        self._runs: list[list[KVCacheBlock]] = []
        self._tails: list[KVCacheBlock] = []
        for cached in self.cached:
            run = self._run(cached, most)
            self._runs.append(run)
            # Scan one block more than the shortest run, because a hit can end inside that block.
            most = min(most, len(run) + 1)
        whole = self._num_whole = min(map(len, self._runs))
        reach = whole * block_size
        if reach >= num_tokens or self.alignment >= block_size:
            return reach
        return self._extend(reach)

    def _run(self, cached: dict[BlockHash, KVCacheBlock], most: int) -> list[KVCacheBlock]:
        """Return the leading blocks that one group holds without a gap."""
        run: list[KVCacheBlock] = []
        one_each = self.block_size == self.unit
        hashes = islice(self.block_hashes, most) if one_each else self._hashes(0, most)
        # The list keeps the blocks before the first gap. `contextlib.suppress` is not used, because
        # it takes longer than a whole lookup without a hit.
        try:  # noqa: SIM105
            run.extend(map(cached.__getitem__, hashes))
        except KeyError:
            pass
        return run

    def _extend(self, whole: int) -> int:
        """Return how many leading tokens all groups hold, counting part of the block after `whole`.

        A block that is cached for one length can also serve every shorter length, because keys and
        values are only appended.
        """
        reach = whole + self.block_size
        first = whole // self.unit
        end = min(first + self.block_size // self.unit - 1, len(self.block_hashes))
        for cached, run in zip(self.cached, self._runs, strict=True):
            if len(run) > self._num_whole:
                self._tails.append(run[self._num_whole])
                continue
            for index in range(end - 1, first - 1, -1):
                tail = cached.get(self.block_hashes[index])
                if tail is not None:
                    self._tails.append(tail)
                    reach = min(reach, (index + 1) * self.unit)
                    break
            else:
                return whole
        return reach


class _WindowLookup(GroupLookup):
    """Attention to the last tokens only. A hit needs its last blocks, but no earlier ones."""

    @abstractmethod
    def _first_block(self, length: int) -> int:
        """Return the first block that a hit needs. It must not decrease when `length` grows."""

    def longest(self, limit: int) -> int:
        """Return the greatest length up to `limit`.

        If a block is missing, every shorter length that reaches this block needs it too. The search
        therefore continues with lengths that end before this block.
        """
        length = round_down(min(limit, self.num_hashed - self.lookahead), self.alignment)
        known_first = known_end = 0
        while length > 0:
            first = self._first_block(length)
            end = (length + self.lookahead) // self.block_size
            # The blocks from `known_first` to `known_end` are known to be cached.
            missing = self._first_missing(first, min(end, max(known_first, first)))
            if missing is None:
                missing = self._first_missing(max(first, known_end), end)
            if missing is None:
                return length
            known_first, known_end = first, missing
            length = round_down(missing * self.block_size - self.lookahead, self.alignment)
        return 0

    def blocks(self, length: int) -> list[list[KVCacheBlock]]:
        """Return null blocks followed by the needed blocks."""
        first, end = self._first_block(length), length // self.block_size
        hashes = self._hashes(first, end)
        return [
            [self.manager.block_pool.null_block] * min(first, end)
            + [cached[block_hash] for block_hash in hashes]
            for cached in self.cached
        ]

    def _first_missing(self, first: int, end: int) -> int | None:
        """Return the first block of a range that one of the groups lacks, or None."""
        if first >= end:
            return None
        # Look up the first block alone, so that a long uncached part costs one lookup per window.
        (first_hash,) = self._hashes(first, first + 1)
        if any(first_hash not in cached for cached in self.cached):
            return first
        missing = None
        for cached in self.cached:
            lacks = map(operator.not_, map(cached.__contains__, self._hashes(first, end)))
            lacking = next(compress(range(first, end), lacks), None)
            if lacking is not None:
                missing = end = lacking
        return missing


class SlidingWindowLookup(_WindowLookup):
    """Sliding window. A hit needs the blocks that hold the next token's window."""

    @cached_property
    def _num_needed(self) -> int:
        """How many blocks hold the `window - 1` tokens before the next one, by vLLM's own rule."""
        return self.group.manager_cls._contiguous_blocks_for_hit(
            self.group.spec.sliding_window, self.block_size, use_eagle=False
        )

    def _first_block(self, length: int) -> int:
        return max(0, length // self.block_size - self._num_needed)


class ChunkedLocalLookup(_WindowLookup):
    """Chunked local attention. A hit needs the blocks of the next token's chunk."""

    def _first_block(self, length: int) -> int:
        return round_down(length, self.group.spec.attention_chunk_size) // self.block_size


class MambaLookup(GroupLookup):
    """Mamba and other recurrent layers. A hit needs the state after exactly the prefix."""

    _FIRST_STEP, _LAST_STEP = 16, 2048
    """How many lengths the first and the longest step look up. Most hits are near the limit."""

    def longest(self, limit: int) -> int:
        """Return the longest prefix up to `limit` whose state all groups hold."""
        fewest, *others = sorted(self.cached, key=len)
        if not fewest:
            return 0
        units = self.alignment // self.unit
        end = min(limit, self.num_hashed) // self.alignment
        # Usually, a state is cached at `limit` itself, the length that the other groups can serve.
        if end > 0:
            last = self.block_hashes[end * units - 1]
            if all(last in cached for cached in self.cached):
                return end * self.alignment
            end -= 1
        step = self._FIRST_STEP
        while end > 0:
            start = max(0, end - step)
            hashes = self.block_hashes[(start + 1) * units - 1 : end * units : units]
            # Most steps find no state, and `isdisjoint` detects this in half the time.
            if not fewest.keys().isdisjoint(hashes):
                for block_hash in [key for key in reversed(hashes) if key in fewest]:
                    if all(block_hash in cached for cached in others):
                        return (start + hashes.index(block_hash) + 1) * self.alignment
            end = start
            step = min(4 * step, self._LAST_STEP)
        return 0

    def blocks(self, length: int) -> list[list[KVCacheBlock]]:
        """Return null blocks followed by the state's block."""
        if length == 0:
            return [[] for _ in self.cached]
        block_hash = self.block_hashes[length // self.unit - 1]
        nulls = [self.manager.block_pool.null_block] * (cdiv(length, self.block_size) - 1)
        return [[*nulls, cached[block_hash]] for cached in self.cached]


LOOKUPS: dict[object, type[GroupLookup]] = {
    FullAttentionManager.find_longest_cache_hit.__func__: FullAttentionLookup,
    SlidingWindowManager.find_longest_cache_hit.__func__: SlidingWindowLookup,
    ChunkedLocalAttentionManager.find_longest_cache_hit.__func__: ChunkedLocalLookup,
    MambaManager.find_longest_cache_hit.__func__: MambaLookup,
}
"""The lookup class for each manager's method. Subclasses of a manager may inherit its method."""
