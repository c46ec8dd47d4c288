# SPDX-License-Identifier: Apache-2.0
"""Models' KV groups, and what is cached of the prompts that are looked up."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator
from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)

TOKENS = 131_072
PROMPTS = 4
"""Prompts that go round."""


@dataclass(frozen=True)
class Model:
    """The KV groups of a model."""

    name: str
    specs: tuple[KVCacheSpec, ...]
    unit: int
    """Tokens of a hash, by which prefixes are matched."""

    @property
    def num_hashes(self) -> int:
        return TOKENS // self.unit


@dataclass(frozen=True)
class Contents:
    """What is cached of every prompt, as shares of it."""

    name: str
    attention: float
    """The share from the start whose full attention is cached."""
    others: float
    """Where states are cached, and windows: at this share only, or everywhere if it is 1."""


EVERYTHING = Contents("all of it", 1.0, 1.0)
CONTENTS = (
    EVERYTHING,
    Contents("states and windows at half of it only", 1.0, 0.5),
    Contents("no states or windows", 1.0, 0.0),
    Contents("none of it", 0.0, 0.0),
)


def _full(block_size: int) -> KVCacheSpec:
    return FullAttentionSpec(
        block_size=block_size, num_kv_heads=2, head_size=256, dtype=torch.bfloat16
    )


def _window(block_size: int, tokens: int) -> KVCacheSpec:
    return SlidingWindowSpec(
        block_size=block_size,
        num_kv_heads=2,
        head_size=256,
        dtype=torch.bfloat16,
        sliding_window=tokens,
    )


def _mamba(block_size: int) -> KVCacheSpec:
    return MambaSpec(
        block_size=block_size,
        shapes=((32, 128, 128),),
        dtypes=(torch.float32,),
        mamba_cache_mode="align",
    )


def models() -> list[Model]:
    """The groups that are measured: four each, as in the models named."""
    states = (_full(2768), *[_mamba(2768)] * 3)
    return [
        Model("full attention, 3 Mamba, blocks of 2768 (Qwen3.6-35B-A3B, k8v4)", states, 2768),
        Model("the same", states, 16),
        Model(
            "full attention, 3 Mamba, blocks of 528",
            (_full(528), *[_mamba(528)] * 3),
            16,
        ),
        Model(
            "full attention, 3 sliding windows of 1024, blocks of 16 (as Gemma 3)",
            (_full(16), *[_window(16, 1024)] * 3),
            16,
        ),
        Model(
            "full attention, sliding windows of 512, 1024 and 4096, blocks of 16",
            (_full(16), _window(16, 512), _window(16, 1024), _window(16, 4096)),
            16,
        ),
    ]


def prompt_hashes(model: Model, seed: int) -> list[BlockHash]:
    """Random bytes do for hashes: a lookup compares them and knows nothing else of them."""
    source = random.Random(f"{model.name} {model.unit} {seed}")
    return [BlockHash(source.randbytes(32)) for _ in range(model.num_hashes)]


def make_coordinator(
    coordinator_class: type[HybridKVCacheCoordinator], model: Model, num_blocks: int
) -> HybridKVCacheCoordinator:
    """Make a coordinator with an empty pool."""
    arguments: dict[str, Any] = {
        "kv_cache_config": KVCacheConfig(
            num_blocks, [], [KVCacheGroupSpec([str(i)], s) for i, s in enumerate(model.specs)]
        ),
        "max_model_len": 2 * TOKENS,
        "max_in_flight_tokens": 8192,
        "use_eagle": False,
        "enable_caching": True,
        "enable_kv_cache_events": False,
        "dcp_world_size": 1,
        "pcp_world_size": 1,
        "scheduler_block_size": math.lcm(*(spec.block_size for spec in model.specs)),
        "hash_block_size": model.unit,
    }
    return coordinator_class(**arguments)


def cached_ends(model: Model, contents: Contents, spec: KVCacheSpec) -> Iterable[int]:
    """Return the ends of a group's cached blocks in a prompt, in tokens."""
    size = spec.block_size
    ends = range(size, TOKENS + 1, size)
    if isinstance(spec, FullAttentionSpec):
        return [end for end in ends if end <= contents.attention * TOKENS]
    if contents.others == 1:
        # A prompt ends inside a block, where its state is kept if matching is finer than blocks.
        at_the_end = (
            [(TOKENS - 1) // model.unit * model.unit] if isinstance(spec, MambaSpec) else []
        )
        return [*ends, *at_the_end]
    at = [end for end in ends if end <= contents.others * TOKENS]
    if isinstance(spec, SlidingWindowSpec):
        return at[len(at) - cdiv(spec.sliding_window - 1, size) :] if at else []
    return at[-1:]


def blocks_needed(model: Model) -> int:
    """Return how many blocks the prompts take at most, and as many of other requests."""
    return 2 * PROMPTS * sum(TOKENS // spec.block_size + 3 for spec in model.specs)


def fill(
    coordinator: HybridKVCacheCoordinator,
    model: Model,
    contents: Contents,
    prompts: list[list[BlockHash]],
) -> None:
    """Cache what the contents say of every prompt, and all of as many other prompts."""
    pool = coordinator.block_pool
    free = iter(pool.blocks[1:])
    others = [prompt_hashes(model, -1 - number) for number in range(len(prompts))]
    for hashes, what in [
        *((hashes, EVERYTHING) for hashes in others),
        *((hashes, contents) for hashes in prompts),
    ]:
        for group_id, spec in enumerate(model.specs):
            for end in cached_ends(model, what, spec):
                pool._insert_block_hash(
                    make_block_hash_with_group_id(hashes[end // model.unit - 1], group_id),
                    next(free),
                    num_tokens=end,
                )
