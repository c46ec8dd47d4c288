# SPDX-License-Identifier: Apache-2.0
"""Define the KV groups of models, and which parts of the prompts are cached."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator
from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)

from testing.coordinator.contents import coordinator_of, full, insert, layout_of, mamba, window

TOKENS = 131_072
PROMPTS = 4
"""How many prompts are looked up in turn."""


@dataclass(frozen=True)
class Model:
    """The KV groups of a model, and its hash unit in tokens."""

    name: str
    specs: tuple[KVCacheSpec, ...]
    unit: int


@dataclass(frozen=True)
class Contents:
    """Which parts of every prompt are cached.

    Attributes:
        name: The name in tables.
        attention: The full-attention blocks in this first share of the prompt are cached.
        others: Other groups can resume only where this share of the prompt ends. If it is 1, all
            their blocks are cached.
    """

    name: str
    attention: float
    others: float


EVERYTHING = Contents("all of it", 1.0, 1.0)
CONTENTS = (
    EVERYTHING,
    Contents("states and windows at half of it only", 1.0, 0.5),
    Contents("no states or windows", 1.0, 0.0),
    Contents("none of it", 0.0, 0.0),
)

_STATES_2768 = (full(2768), *[mamba(2768)] * 3)
MODELS = (
    Model("full attention, 3 Mamba, blocks of 2768 (Qwen3.6-35B-A3B, k8v4)", _STATES_2768, 2768),
    Model("the same", _STATES_2768, 16),
    Model("full attention, 3 Mamba, blocks of 528", (full(528), *[mamba(528)] * 3), 16),
    Model(
        "full attention, 3 sliding windows of 1024, blocks of 16 (as Gemma 3)",
        (full(16), *[window(16, 1024)] * 3),
        16,
    ),
    Model(
        "full attention, sliding windows of 512, 1024 and 4096, blocks of 16",
        (full(16), window(16, 512), window(16, 1024), window(16, 4096)),
        16,
    ),
)


def prompt_hashes(model: Model, seed: int) -> list[BlockHash]:
    """Make random block hashes of a prompt. A lookup only compares hashes, so any will do."""
    source = random.Random(f"{model.name} {model.unit} {seed}")
    return [BlockHash(source.randbytes(32)) for _ in range(TOKENS // model.unit)]


def make_coordinator(
    coordinator_class: type[HybridKVCacheCoordinator], model: Model
) -> HybridKVCacheCoordinator:
    """Make a coordinator whose pool has room for twice as many prompts as are looked up."""
    blocks = 2 * PROMPTS * sum(TOKENS // spec.block_size + 3 for spec in model.specs)
    return coordinator_of(layout_of(*model.specs, unit=model.unit), coordinator_class, blocks)


def cached_ends(model: Model, contents: Contents, spec: KVCacheSpec) -> Iterable[int]:
    """List the prompt lengths (in tokens) at which the cached blocks of a group end."""
    size = spec.block_size
    ends = range(size, TOKENS + 1, size)
    if isinstance(spec, FullAttentionSpec):
        return [end for end in ends if end <= contents.attention * TOKENS]
    if contents.others == 1:
        # With a match unit below the block size, the state at the prompt's end is cached too.
        last = [(TOKENS - 1) // model.unit * model.unit] if isinstance(spec, MambaSpec) else []
        return [*ends, *last]
    at = [end for end in ends if end <= contents.others * TOKENS]
    if isinstance(spec, SlidingWindowSpec):
        return at[len(at) - cdiv(spec.sliding_window - 1, size) :] if at else []
    return at[-1:]


def fill(
    coordinator: HybridKVCacheCoordinator,
    model: Model,
    contents: Contents,
    prompts: list[list[BlockHash]],
) -> None:
    """Cache the `contents` of every prompt, and all blocks of equally many other prompts."""
    free = iter(coordinator.block_pool.blocks[1:])
    others = [prompt_hashes(model, -1 - index) for index in range(len(prompts))]
    for hashes, cached in [
        *((hashes, EVERYTHING) for hashes in others),
        *((hashes, contents) for hashes in prompts),
    ]:
        for group, spec in enumerate(model.specs):
            for end in cached_ends(model, cached, spec):
                insert(coordinator.block_pool, hashes, group, end, next(free))
