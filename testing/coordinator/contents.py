# SPDX-License-Identifier: Apache-2.0
"""Make KV groups, requests and cache contents, as specified or at random."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    BlockHashWithGroupId,
    KVCacheBlock,
    get_request_block_hasher,
    init_none_hash,
    make_block_hash_with_group_id,
)
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    CircularBufferSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request

from testing.coordinator.oracle import Cached, Layout

NUM_BLOCKS = 1024
LONGEST_IN_UNITS = 48
HEADS: dict[str, Any] = {"num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}

init_none_hash(sha256)


@dataclass(frozen=True)
class Case:
    """The input of one lookup. A hit has at most `limit` tokens; `what` names the case."""

    layout: Layout
    request: Request
    limit: int
    cached: Cached
    what: str


def full(block_size: int, head_size: int = 8, **more: Any) -> KVCacheSpec:
    return FullAttentionSpec(block_size=block_size, **{**HEADS, "head_size": head_size}, **more)


def window(block_size: int, tokens: int, **more: Any) -> KVCacheSpec:
    return SlidingWindowSpec(block_size=block_size, sliding_window=tokens, **HEADS, **more)


def chunked(block_size: int, tokens: int) -> KVCacheSpec:
    return ChunkedLocalAttentionSpec(block_size=block_size, attention_chunk_size=tokens, **HEADS)


def ring(block_size: int) -> KVCacheSpec:
    return CircularBufferSpec(block_size=block_size, dcp_sharded=False, **HEADS)


def mamba(block_size: int, width: int = 4, mode: str = "align") -> KVCacheSpec:
    return MambaSpec(
        block_size=block_size,
        shapes=((width, 2),),
        dtypes=(torch.float32,),
        mamba_cache_mode=mode,
    )


def layout_of(
    *specs: KVCacheSpec,
    unit: int | None = None,
    drafts: tuple[int, ...] | None = None,
    dcp: int = 1,
) -> Layout:
    """Make a layout with a KV group for each spec.

    `unit` is the number of tokens per hash. `drafts` has the indices of the groups with draft
    layers (None without speculative decoding). `dcp` is the number of context parallel ranks.
    """
    sizes = [spec.block_size * (dcp if spec.dcp_sharded else 1) for spec in specs]
    hashed = [size for size, spec in zip(sizes, specs, strict=True) if spec.prefix_cacheable]
    return Layout(
        groups=tuple(
            KVCacheGroupSpec([f"layer {i}"], spec, is_eagle_group=i in (drafts or ()))
            for i, spec in enumerate(specs)
        ),
        hash_unit=unit or math.gcd(*hashed),
        scheduler_block_size=math.lcm(*sizes),
        use_eagle=drafts is not None,
        dcp_world_size=dcp,
    )


def coordinator_of(
    layout: Layout,
    coordinator_class: type[HybridKVCacheCoordinator],
    num_blocks: int = NUM_BLOCKS,
) -> HybridKVCacheCoordinator:
    return coordinator_class(
        kv_cache_config=KVCacheConfig(num_blocks, [], list(layout.groups)),
        max_model_len=1 << 20,
        max_in_flight_tokens=1 << 20,
        use_eagle=layout.use_eagle,
        enable_caching=True,
        enable_kv_cache_events=False,
        dcp_world_size=layout.dcp_world_size,
        pcp_world_size=1,
        scheduler_block_size=layout.scheduler_block_size,
        hash_block_size=layout.hash_unit,
    )


def request_of(
    layout: Layout, token_ids: Sequence[int], name: str = "request", **sampling: Any
) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=list(token_ids),
        sampling_params=SamplingParams(**{"max_tokens": 1, **sampling}),
        pooling_params=None,
        block_hasher=get_request_block_hasher(layout.hash_unit, sha256),
    )


def random_layout(rng: random.Random) -> Layout:
    """Make random KV groups that vLLM supports in one model."""
    style = rng.choice(("whole blocks", "whole blocks", "partial", "partial", "context parallel"))
    unit = rng.choice((1, 2, 4))
    dcp = 2 if style == "context parallel" else 1
    whole = style == "whole blocks"

    def size() -> int:
        return unit * rng.choice((1, 2, 3, 4, 6) if whole else (1, 2, 4, 8))

    def attention_size() -> int:
        # vLLM supports partial hits only if windows and chunks have blocks of a single hash unit.
        return size() if whole else unit

    def one() -> KVCacheSpec:
        # Decode context parallelism supports full attention, Mamba and replicated windows.
        kinds = ["full", "full", "window", "window", "mamba", "mamba", "ring"]
        kind = rng.choice(kinds if dcp > 1 else [*kinds, "chunked"])
        if kind == "full":
            return full(size(), rng.choice((8, 16)))
        if kind == "window":
            tokens = rng.randint(2, 12 * unit)
            return window(attention_size(), tokens, dcp_sharded=False)
        if kind == "chunked":
            return chunked(attention_size(), rng.randint(2, 12 * unit))
        if kind == "ring":
            return ring(size())
        return mamba(size(), rng.choice((4, 6)))

    while True:
        specs = [one() for _ in range(rng.randint(2, 6))]
        if style == "partial":
            specs[rng.randrange(len(specs))] = mamba(unit * rng.choice((2, 4, 8)))
        # Models have several groups with equal specs.
        if rng.random() < 0.4:
            specs.append(replace(rng.choice(specs)))
        if not any(spec.prefix_cacheable for spec in specs):
            continue
        drafts = None
        if rng.random() < 0.4:
            attention = [i for i, spec in enumerate(specs) if not isinstance(spec, MambaSpec)]
            drafts = tuple(i for i in attention if rng.random() < 0.4)
        layout = layout_of(*specs, unit=unit, drafts=drafts, dcp=dcp)
        if layout.scheduler_block_size <= 12 * unit:
            return layout


def random_cached(rng: random.Random, layout: Layout, num_hashed: int) -> Cached:
    """Cache the blocks of a request, then evict some of them at random."""
    cached = Cached(num_hashed)
    ids = iter(range(1, NUM_BLOCKS))
    rules = _random_rules(rng)
    for group_id in range(len(layout.groups)):
        size, spec = layout.block_size(group_id), layout.spec(group_id)
        if not spec.prefix_cacheable:
            continue
        kept = _random_kept(rng, rng.choice(rules), num_hashed)
        inside = rng.choice((0.0, 0.1, 0.6))
        for start in range(0, num_hashed, size):
            block = next(ids)
            for boundary in range(start + layout.hash_unit, start + size + 1, layout.hash_unit):
                if boundary != start + size and rng.random() >= inside:
                    continue
                if boundary > num_hashed or not kept(boundary):
                    continue
                # Attention's blocks may be cached under several boundaries, a state under one only.
                if isinstance(spec, MambaSpec) and boundary != start + size:
                    cached.blocks[group_id, boundary] = [next(ids)]
                else:
                    cached.blocks[group_id, boundary] = [block]
                if rng.random() < 0.1:
                    cached.blocks[group_id, boundary].append(next(ids))
    return cached


def _random_rules(rng: random.Random) -> list[str]:
    """Choose a set of eviction rules, from which each group then draws one.

    Only one set has the rule "none", because a group without blocks prevents all hits.
    """
    healthy = ["all", "all", "few holes"]
    return rng.choice(
        (healthy, [*healthy, "states"], ["few holes", "head"], ["tail", "few holes", "all"],
         ["holes", "head", "states"], ["all", "holes", "head", "tail", "states", "none"])
    )  # fmt: skip


def _random_kept(rng: random.Random, rule: str, num_tokens: int) -> Callable[[int], bool]:
    """Return a function that says whether the block with a given boundary is still cached."""
    edge = rng.randint(0, num_tokens)
    holes = rng.choice((0.2, 0.5))
    return {
        "all": lambda boundary: True,
        "few holes": lambda boundary: rng.random() >= 0.06,
        "holes": lambda boundary: rng.random() >= holes,
        "head": lambda boundary: boundary <= max(edge, num_tokens // 2),
        "tail": lambda boundary: boundary > edge and rng.random() >= 0.06,
        "states": lambda boundary: rng.random() < 0.3,
        "none": lambda boundary: False,
    }[rule]


def insert(
    pool: BlockPool, hashes: Sequence[BlockHash], group_id: int, end: int, block: KVCacheBlock
) -> None:
    """Cache a block of one group, as the last block of a prompt's first `end` tokens."""
    key = make_block_hash_with_group_id(hashes[end // pool.hash_block_size - 1], group_id)
    pool._insert_block_hash(key, block, num_tokens=end)


def fill(pool: BlockPool, request: Request, cached: Cached, other: Request | None = None) -> None:
    """Cache blocks of a request, and some blocks of another request."""
    for (group_id, boundary), ids in cached.blocks.items():
        for block_id in ids:
            insert(pool, request.block_hashes, group_id, boundary, pool.blocks[block_id])
    if other is not None:
        for index in range(len(other.block_hashes)):
            end, block = (index + 1) * pool.hash_block_size, pool.blocks[NUM_BLOCKS - 1 - index]
            insert(pool, other.block_hashes, index % 3, end, block)


def hashes_of(pool: BlockPool, block: KVCacheBlock) -> list[BlockHashWithGroupId]:
    """Return all hashes under which a block is cached."""
    if block.block_hash is None:
        return []
    return [block.block_hash, *pool.cached_block_hashes_by_block.get(block.block_id, ())]


def every(step: int, end: int) -> range:
    return range(step, end + 1, step)


def fill_at(pool: BlockPool, request: Request, *ends: Iterable[int]) -> None:
    """Cache the blocks of a request that end at given tokens, by group.

    Group g gets blocks with ids from 100 * (g + 1).
    """
    cached = Cached(len(request.block_hashes) * pool.hash_block_size)
    for group, of_group in enumerate(ends):
        for index, end in enumerate(of_group):
            cached.blocks[group, end] = [100 * (group + 1) + index]
    fill(pool, request, cached)


def random_cases(seed: int, layouts: int, contents: int) -> Iterator[list[Case]]:
    """Yield the cases of one random layout after another."""
    for number in range(layouts):
        rng = random.Random(f"{seed}/{number}")
        layout = random_layout(rng)
        cases = []
        for content in range(contents):
            if content % 5 == 0:
                count = (
                    rng.randint(1, LONGEST_IN_UNITS * layout.hash_unit)
                    if rng.random() < 0.5
                    else (rng.randint(24, LONGEST_IN_UNITS) * layout.hash_unit + rng.randrange(4))
                )
                request = request_of(layout, [rng.randrange(1000) for _ in range(count)])
            hashed = len(request.block_hashes) * layout.hash_unit
            # vLLM always computes a prompt's last token.
            limit = count - 1 if rng.random() < 0.8 else rng.randint(0, count)
            cached = random_cached(rng, layout, hashed)
            cases.append(
                Case(layout, request, limit, cached, f"seed {seed}, layout {number}, {content}")
            )
        yield cases
