# SPDX-License-Identifier: Apache-2.0
"""What prefix of a request the KV groups of one spec can serve from their cached blocks.

Lengths are in tokens. A hit has a multiple of `alignment` tokens: the hash unit where partial hits
are on, else a multiple of every group's block size. Every kind of group answers for itself which
of these lengths it can serve; every group can serve 0:

* full attention: all whole blocks before the length are cached, and, where it lies inside a block,
  a block that holds at least the tokens up to it;
* a sliding window: the blocks with the `window - 1` tokens before the length;
* chunked local attention: the blocks from the start of the length's chunk on;
* Mamba: the state after exactly that many tokens.

Draft layers (EAGLE, MTP) of attention groups want one unit more than they serve, a block or, where
partial hits are on, a hash unit (`eagle_proof_margin`): a draft layer's last key and value depend
on the token behind them, so that they count only where that token is known to be the same.
Mamba groups have no draft layers.

Full attention serves every length below one that it serves. The other kinds do not.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache, cached_property
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
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec

from vllm_hybrid_kv.coordinator.block_map import grouped_blocks


class GroupLookup(ABC):
    """One request's lookup in the KV groups of one spec.

    Made for one lookup and not kept: what it found is not told of later evictions.
    """

    def __init__(
        self,
        group: SpecGroup,
        manager: SingleTypeKVCacheManager,
        block_hashes: Sequence[BlockHash],
        alignment: int,
    ) -> None:
        """Prepare a lookup.

        Args:
            group: The groups.
            manager: The manager of one of them.
            block_hashes: The request's, one for every hash unit of its tokens.
            alignment: Hits have a multiple of this many tokens.
        """
        pool = manager.block_pool
        self.group = group
        self.manager = manager
        self.block_hashes = block_hashes
        self.alignment = alignment
        self.unit = pool.hash_block_size
        self.block_size = manager.block_size
        """Tokens, over all ranks of decode context parallelism."""
        self.num_hashed = len(block_hashes) * self.unit
        """Tokens of the request that can be looked up."""
        self.lookahead = min(alignment, manager.block_size) if group.use_eagle else 0
        """Tokens that draft layers want beyond the length that they serve."""
        self.cached = list(map(grouped_blocks(pool).group, group.group_ids))
        """What is cached, by hash, for each group."""

    @abstractmethod
    def longest(self, limit: int) -> int:
        """Return the greatest length up to `limit` that all the groups can serve."""

    @abstractmethod
    def blocks(self, length: int) -> list[list[KVCacheBlock]]:
        """Return the blocks of a length that `longest` gave, a list for each group.

        A list has the length's number of blocks, with null blocks for those that the group does
        not need.
        """

    def _hashes(self, first: int, end: int) -> Sequence[BlockHash]:
        """Return the hashes of whole blocks by their number. They chain: a block's is its last."""
        scale = self.block_size // self.unit
        if scale == 1:
            return self.block_hashes[first:end]
        return self.block_hashes[(first + 1) * scale - 1 : end * scale : scale]


class FullAttentionLookup(GroupLookup):
    """Full attention: one scan from the left, after which shorter lengths cost nothing."""

    _reach: int | None = None
    _num_whole: int
    _runs: list[list[KVCacheBlock]]
    _tails: list[KVCacheBlock]

    def longest(self, limit: int) -> int:
        """Return the greatest length up to `limit`, which must not grow from call to call."""
        if self._reach is None:
            self._reach = self._scan(min(limit + self.lookahead, self.num_hashed))
        return round_down(max(0, min(limit, self._reach - self.lookahead)), self.alignment)

    def blocks(self, length: int) -> list[list[KVCacheBlock]]:
        """Return whole blocks, and the one that the length ends in.

        Asked once: the lists that were found are cut to the length and handed out.
        """
        count = cdiv(length, self.block_size)
        for run in self._runs:
            del run[min(count, self._num_whole) :]
        if count > self._num_whole:
            for run, tail in zip(self._runs, self._tails, strict=True):
                run.append(tail)
        return self._runs

    def _scan(self, num_tokens: int) -> int:
        """Return how many tokens from the start all groups hold, at least up to `num_tokens`."""
        block_size = self.block_size
        most = min(cdiv(num_tokens, block_size), self.num_hashed // block_size)
        self._runs, self._tails = [], []
        for cached in self.cached:
            run = self._run(cached, most)
            self._runs.append(run)
            # One more block than the shortest run may serve as the tail.
            most = min(most, len(run) + 1)
        whole = self._num_whole = min(map(len, self._runs))
        reach = whole * block_size
        if reach >= num_tokens or self.alignment >= block_size:
            return reach
        return self._extend(reach)

    def _run(self, cached: dict[BlockHash, KVCacheBlock], most: int) -> list[KVCacheBlock]:
        """Return the first blocks that one group holds without a gap."""
        run: list[KVCacheBlock] = []
        one_each = self.block_size == self.unit
        hashes = islice(self.block_hashes, most) if one_each else self._hashes(0, most)
        # What comes before the first gap stays in the list.
        # (suppress() would take longer than all of a lookup that finds nothing.)
        try:  # noqa: SIM105
            run.extend(map(cached.__getitem__, hashes))
        except KeyError:
            pass
        return run

    def _extend(self, whole: int) -> int:
        """Return how far all groups hold the block that begins after `whole` tokens.

        Keys and values are only ever appended, so that a block serves every length up to the one
        it is cached under, a whole block among them.
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
    """Attention that needs whole blocks from some block on, the later the longer the prefix."""

    @abstractmethod
    def _first_block(self, length: int) -> int:
        """Return the number of the first block needed. It must not fall as lengths grow."""

    def longest(self, limit: int) -> int:
        """Return the greatest length up to `limit`.

        A length misses some block that it needs. A shorter one needs no later first block, so
        it needs that block too unless it ends before: the search goes on there.
        """
        length = round_down(min(limit, self.num_hashed - self.lookahead), self.alignment)
        known_first = known_end = 0
        while length > 0:
            first = self._first_block(length)
            end = (length + self.lookahead) // self.block_size
            # Of the blocks needed, those before the last one missed were all there.
            missing = self._first_missing(first, min(end, max(known_first, first)))
            if missing is None:
                missing = self._first_missing(max(first, known_end), end)
            if missing is None:
                return length
            known_first, known_end = first, missing
            length = round_down(missing * self.block_size - self.lookahead, self.alignment)
        return 0

    def blocks(self, length: int) -> list[list[KVCacheBlock]]:
        """Return the blocks that are needed behind null blocks."""
        first, end = self._first_block(length), length // self.block_size
        hashes = self._hashes(first, end)
        return [
            [self.manager.block_pool.null_block] * min(first, end)
            + [cached[block_hash] for block_hash in hashes]
            for cached in self.cached
        ]

    def _first_missing(self, first: int, end: int) -> int | None:
        """Return the first of some blocks that one of the groups lacks."""
        if first >= end:
            return None
        # Where nothing is cached for long, this is all that is asked for every window.
        (first_hash,) = self._hashes(first, first + 1)
        if any(first_hash not in cached for cached in self.cached):
            return first
        missing = None
        for cached in self.cached:
            lacks = map(operator.not_, map(cached.__contains__, self._hashes(first, end)))
            found = next(compress(range(first, end), lacks), None)
            if found is not None:
                missing = end = found
        return missing


class SlidingWindowLookup(_WindowLookup):
    """A sliding window: the blocks that hold the window before the next token."""

    @cached_property
    def _num_needed(self) -> int:
        """Blocks that hold the window but for the next token, from the managers' own rule."""
        needed: int = self.group.manager_cls._contiguous_blocks_for_hit(
            self.group.spec.sliding_window, self.block_size, use_eagle=False
        )
        return needed

    def _first_block(self, length: int) -> int:
        return max(0, length // self.block_size - self._num_needed)


class ChunkedLocalLookup(_WindowLookup):
    """Chunked local attention: the blocks of the next token's chunk."""

    def _first_block(self, length: int) -> int:
        chunk: int = self.group.spec.attention_chunk_size
        return round_down(length, chunk) // self.block_size


class MambaLookup(GroupLookup):
    """Mamba and other recurrent layers: a state after exactly the tokens of the prefix."""

    _FIRST_STEP, _LAST_STEP = 16, 2048
    """Lengths looked up at a time: few at first, for states are kept at the ends of prompts."""

    def longest(self, limit: int) -> int:
        """Return the length of the longest prefix up to `limit` whose state all groups hold."""
        fewest, *others = sorted(self.cached, key=len)
        if not fewest:
            return 0
        units = self.alignment // self.unit
        end = min(limit, self.num_hashed) // self.alignment
        # Most often all have what the groups before them have.
        if end > 0:
            last = self.block_hashes[end * units - 1]
            if all(last in cached for cached in self.cached):
                return end * self.alignment
            end -= 1
        step = self._FIRST_STEP
        while end > 0:
            start = max(0, end - step)
            hashes = self.block_hashes[(start + 1) * units - 1 : end * units : units]
            # Most stretches have none, which takes half as long to see without making a list.
            if not fewest.keys().isdisjoint(hashes):
                for block_hash in [one for one in reversed(hashes) if one in fewest]:
                    if all(block_hash in cached for cached in others):
                        return (start + hashes.index(block_hash) + 1) * self.alignment
            end = start
            step = min(4 * step, self._LAST_STEP)
        return 0

    def blocks(self, length: int) -> list[list[KVCacheBlock]]:
        """Return the state's block behind null blocks."""
        if length == 0:
            return [[] for _ in self.cached]
        block_hash = self.block_hashes[length // self.unit - 1]
        nulls = [self.manager.block_pool.null_block] * (cdiv(length, self.block_size) - 1)
        return [[*nulls, cached[block_hash]] for cached in self.cached]


class ManagerLookup(GroupLookup):
    """Groups of a kind that is not vLLM's own: their manager's lookup, asked like vLLM does."""

    _found: tuple[int, tuple[list[KVCacheBlock], ...]] | None = None

    def longest(self, limit: int) -> int:
        """Return the greatest length for which the manager finds just as much.

        A manager may answer with less than it was asked for and not be able to serve that: vLLM's
        for chunked local attention looks no further back than the first length's chunk. So it is
        asked for its own answer again.
        """
        if isinstance(self.group.spec, FullAttentionSpec) and self._found is not None:
            return min(limit, self._found[0])
        limit = round_down(limit, self.alignment)
        while limit > 0:
            blocks, length = self._ask(limit)
            if length == limit:
                self._found = (length, blocks)
                return length
            limit = round_down(min(length, limit - 1), self.alignment)
        self._found = (0, tuple([] for _ in self.group.group_ids))
        return 0

    def blocks(self, length: int) -> list[list[KVCacheBlock]]:
        """Return the blocks of the manager's last answer, or those of full attention cut off."""
        assert self._found is not None
        found, blocks = self._found
        if length == found:
            return [list(run) for run in blocks]
        assert isinstance(self.group.spec, FullAttentionSpec)
        count = cdiv(length, self.block_size)
        return [run[:count] for run in blocks]

    def _ask(self, limit: int) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        manager, group = self.manager, self.group
        lookahead = 0 if isinstance(group.spec, MambaSpec) else self.lookahead
        answer: tuple[tuple[list[KVCacheBlock], ...], int] = (
            group.manager_cls.find_longest_cache_hit(
                block_hashes=self.block_hashes,
                max_length=min(limit + lookahead, self.num_hashed),
                kv_cache_group_ids=group.group_ids,
                block_pool=manager.block_pool,
                kv_cache_spec=group.spec,
                drop_eagle_block=group.use_eagle,
                alignment_tokens=self.alignment,
                dcp_world_size=manager.dcp_world_size,
                pcp_world_size=manager.pcp_world_size,
            )
        )
        return answer


_LOOKUPS: dict[object, type[GroupLookup]] = {
    FullAttentionManager.find_longest_cache_hit.__func__: FullAttentionLookup,
    SlidingWindowManager.find_longest_cache_hit.__func__: SlidingWindowLookup,
    ChunkedLocalAttentionManager.find_longest_cache_hit.__func__: ChunkedLocalLookup,
    MambaManager.find_longest_cache_hit.__func__: MambaLookup,
}
"""By the function that a manager class has for it, which subclasses inherit or replace."""


@cache
def lookup_class(manager_cls: type[SingleTypeKVCacheManager]) -> type[GroupLookup]:
    """Return how to look up the groups of a manager class."""
    return _LOOKUPS.get(manager_cls.find_longest_cache_hit.__func__, ManagerLookup)
