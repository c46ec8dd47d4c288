# SPDX-License-Identifier: Apache-2.0
"""Find, by brute force, the longest prefix that every KV group can serve.

Lengths are in tokens. They are multiples of the alignment: the hash unit with partial hits, else
the least common multiple of the groups' block sizes. A block is cached under a boundary: how many
tokens of the prompt its hash covers. A group can serve a prefix of L tokens:

* full attention, if every block that ends at or before L is cached. If L is inside a block, that
  block must be cached under a boundary from L to the block's end. Keys and values are only appended
  to a block, so it also holds all tokens before its boundary;
* a sliding window of W tokens, if the blocks with the tokens L - W + 1 to L - 1 are cached;
* chunked local attention, if the blocks from the start of token L's chunk to L - 1 are cached;
* Mamba, if a state is cached under exactly L;
* a group without prefix caching, always. Its hits have no blocks.

With EAGLE or MTP, a draft layer's key and value of token L - 1 depend on token L. So an attention
group with drafts can serve L only if the unit after L is cached too: a hash unit with partial hits,
otherwise a block of the group. As in vLLM (`SpecGroup`), if one group has drafts, all groups
with an equal spec do. If the layout names no group with drafts, all except Mamba groups have them.

Every group can serve a prefix of 0 tokens.
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
"""The id of the null block."""


@dataclass(frozen=True)
class Layout:
    """The KV groups of a model and their block sizes."""

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
    """The cached blocks of a request. `blocks` maps (group, boundary) to ids, oldest first."""

    num_hashed: int
    """Tokens of the request that have hashes."""
    blocks: dict[tuple[int, int], list[int]] = field(default_factory=dict)

    def has(self, group_id: int, boundary: int) -> bool:
        return boundary <= self.num_hashed and (group_id, boundary) in self.blocks

    def first(self, group_id: int, boundary: int) -> int:
        return self.blocks[group_id, boundary][0]


def oldest_token(spec: KVCacheSpec, position: int) -> int:
    """Return the position of the oldest token that a query at `position` attends to."""
    if isinstance(spec, SlidingWindowSpec):
        return max(0, position - spec.sliding_window + 1)
    if isinstance(spec, ChunkedLocalAttentionSpec):
        return position - position % spec.attention_chunk_size
    return 0


def needed_blocks(layout: Layout, group_id: int, length: int) -> range:
    """Return the indices of the whole blocks that attention reads to resume after a prefix."""
    size = layout.block_size(group_id)
    return range(oldest_token(layout.spec(group_id), length) // size, length // size)


def tails(layout: Layout, cached: Cached, group_id: int, length: int) -> list[int]:
    """List the boundaries, from `length` on, under which the prefix's last block is cached."""
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
    """Return the length of the longest prefix, up to a limit, that all given groups can serve."""
    for length in range(limit - limit % alignment, 0, -alignment):
        if all(serves(layout, cached, alignment, group_id, length) for group_id in group_ids):
            return length
    return 0


def wrong_blocks(
    layout: Layout, cached: Cached, group_id: int, length: int, ids: Sequence[int]
) -> str | None:
    """Say what is wrong with the blocks that a group returned for a prefix; None if nothing is."""
    spec, size = layout.spec(group_id), layout.block_size(group_id)
    if not spec.prefix_cacheable:
        return None if not ids else f"group {group_id} has no cache, but hits {ids}"
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
