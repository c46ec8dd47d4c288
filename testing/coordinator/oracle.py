# SPDX-License-Identifier: Apache-2.0
"""The longest prefix that every KV group can serve, by trying all lengths from the longest down.

A length is a number of tokens. Those tried are multiples of the alignment: the hash unit where the
coordinator allows partial hits, else the least common multiple of the groups' block sizes.

What "a group can serve a prefix of L tokens" means, with b its block size over all ranks of decode
context parallelism:

* full attention: every block that ends at or before L is cached; where L lies inside a block, that
  block is cached under some boundary at or behind L, up to the block's end. Keys and values are
  only appended to a block, so that it holds those of all tokens before the boundary;
* a sliding window of W tokens: the blocks that hold the tokens from L - W + 1 to L - 1;
* chunked local attention, chunks of C tokens: the blocks that hold the tokens from the start of
  the chunk that token L is in to L - 1;
* Mamba: a state is cached under exactly L;
* a group that opts out of prefix caching serves everything, and its blocks are never handed out.

EAGLE and MTP: vLLM matches one unit more than it hits and drops it, for the draft layer's key and
value of token L - 1 depend on token L. The unit is a hash unit with partial hits, else a block
of the group. Here that means: an attention group with drafts serves L if it holds the same blocks
as it would need for L and those of the unit behind L, too. Mamba groups have no drafts. As vLLM has
it (`SpecGroup`), one group with drafts among groups of equal specs makes all of them so; where
drafts are in use and no group is marked, all are.

Every group serves 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)

NULL = 0
"""The id of the block that stands where none is needed."""


@dataclass(frozen=True)
class Layout:
    """The KV groups of a model, and how they are cut into blocks."""

    groups: tuple[KVCacheGroupSpec, ...]
    hash_unit: int
    scheduler_block_size: int
    use_eagle: bool = False
    dcp_world_size: int = 1

    def block_size(self, group_id: int) -> int:
        spec = self.spec(group_id)
        return spec.block_size * (self.dcp_world_size if spec.dcp_sharded else 1)

    def spec(self, group_id: int) -> KVCacheSpec:
        return self.groups[group_id].kv_cache_spec

    def has_drafts(self, group_id: int) -> bool:
        spec = self.spec(group_id)
        if not self.use_eagle or isinstance(spec, MambaSpec):
            return False
        if not any(group.is_eagle_group for group in self.groups):
            return True
        return any(group.is_eagle_group and group.kv_cache_spec == spec for group in self.groups)


@dataclass
class Cached:
    """What is cached of one request: ids of blocks by group and boundary, first cached first."""

    num_hashed: int
    """Tokens of the request that have hashes."""
    blocks: dict[tuple[int, int], list[int]] = field(default_factory=dict)

    def has(self, group_id: int, boundary: int) -> bool:
        return boundary <= self.num_hashed and (group_id, boundary) in self.blocks

    def first(self, group_id: int, boundary: int) -> int:
        return self.blocks[group_id, boundary][0]


def needed_blocks(layout: Layout, group_id: int, length: int) -> range:
    """Return the numbers of the whole blocks that attention needs to go on after a prefix."""
    spec, size = layout.spec(group_id), layout.block_size(group_id)
    if isinstance(spec, SlidingWindowSpec):
        oldest_token = max(0, length - spec.sliding_window + 1)
    elif isinstance(spec, ChunkedLocalAttentionSpec):
        oldest_token = length - length % spec.attention_chunk_size
    else:
        oldest_token = 0
    return range(oldest_token // size, length // size)


def tails(layout: Layout, cached: Cached, group_id: int, length: int) -> list[int]:
    """Return boundaries under which the block that a prefix ends in is cached, far enough."""
    size = layout.block_size(group_id)
    end = -(-length // size) * size
    return [
        boundary
        for boundary in range(length, end + 1, layout.hash_unit)
        if cached.has(group_id, boundary)
    ]


def serves(layout: Layout, cached: Cached, alignment: int, group_id: int, length: int) -> bool:
    """Return whether one group can serve a prefix."""
    spec, size = layout.spec(group_id), layout.block_size(group_id)
    if length == 0 or not spec.prefix_cacheable:
        return True
    if isinstance(spec, MambaSpec):
        return cached.has(group_id, length)
    proof = length
    if layout.has_drafts(group_id):
        proof += min(alignment, size)
    first = needed_blocks(layout, group_id, length).start
    if not all(cached.has(group_id, (block + 1) * size) for block in range(first, proof // size)):
        return False
    if proof % size == 0:
        return True
    assert isinstance(spec, FullAttentionSpec), "only full attention ends inside a block"
    return bool(tails(layout, cached, group_id, proof))


def longest(
    layout: Layout, cached: Cached, alignment: int, limit: int, group_ids: Sequence[int]
) -> int:
    """Return the greatest length up to a limit that all of some groups can serve."""
    for length in range(limit - limit % alignment, 0, -alignment):
        if all(serves(layout, cached, alignment, group_id, length) for group_id in group_ids):
            return length
    return 0


def wrong_blocks(
    layout: Layout, cached: Cached, group_id: int, length: int, ids: Sequence[int]
) -> str | None:
    """Say what is wrong with the blocks that a group hands out for a prefix; None: nothing."""
    spec, size = layout.spec(group_id), layout.block_size(group_id)
    if not spec.prefix_cacheable:
        return None if not ids else f"group {group_id} has no cache, and hands out {ids}"
    count = -(-length // size)
    if len(ids) != count:
        return f"group {group_id}: {len(ids)} blocks for {length} tokens, not {count}"
    if isinstance(spec, MambaSpec):
        allowed: list[set[int]] = [{NULL}] * (count - 1)
        allowed += [{cached.first(group_id, length)}] if count else []
    else:
        needed = needed_blocks(layout, group_id, length)
        allowed = [
            {cached.first(group_id, (block + 1) * size)} if block in needed else {NULL}
            for block in range(length // size)
        ]
        if length % size:
            ends = tails(layout, cached, group_id, length)
            allowed.append({cached.first(group_id, end) for end in ends})
    for position, (block_id, choice) in enumerate(zip(ids, allowed, strict=True)):
        if block_id not in choice:
            return f"group {group_id}: block {block_id} at {position}, not one of {choice}"
    return None
