# SPDX-License-Identifier: Apache-2.0
"""Build the specs and plans that the planning tests use."""

from importlib import import_module

import torch
import vllm
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
)

MINOR = tuple(vllm.__version_tuple__[:2])
planning = import_module(f"vllm.v1.core.kv_cache_{'utils' if MINOR == (0, 32) else 'planning'}")
"""The module in which vLLM plans the KV cache."""

BLOCK, LONGEST = 2_768, 27_680
"""The block size and the longest request of `hybrid` in tokens, both from vLLM's #40384."""


def attention(block_size=16, slot=388, kv_heads=2, cls=FullAttentionSpec, **fields):
    """Make the spec of a layer whose page has `block_size * kv_heads * slot` bytes."""
    fields = {"dtype": torch.uint8, **fields}
    return cls(
        block_size=block_size,
        num_kv_heads=kv_heads,
        head_size=256,
        state_content_bytes=slot,
        **fields,
    )


def mla(block_size=64, row=1_152, cls=MLAAttentionSpec, **fields):
    """Make the spec of an MLA layer with `row` bytes per token."""
    return attention(block_size, row, 1, cls, **fields)


def state(page, block_size=16, dtype=torch.uint8, **fields):
    """Make the spec of a Mamba layer whose state has `page` bytes."""
    shapes = ((page // dtype.itemsize,),)
    return MambaSpec(block_size=block_size, shapes=shapes, dtypes=(dtype,), **fields)


def pages(specs: dict[str, KVCacheSpec]) -> dict[str, int]:
    return {name: spec.page_size_bytes for name, spec in specs.items()}


def named(specs) -> dict[str, KVCacheSpec]:
    return {f"layer.{index}": spec for index, spec in enumerate(specs)}


def shapes(specs: dict[str, KVCacheSpec]) -> list[tuple[int, int | None]]:
    """Return, for each layer, the tokens in a block, and the bytes of its page if it is padded."""
    return [(spec.block_size, getattr(spec, "page_size_padded", None)) for spec in specs.values()]


def plan(*specs, num_blocks=100) -> KVCacheConfig:
    groups = [KVCacheGroupSpec([f"layer.{index}"], spec) for index, spec in enumerate(specs)]
    return KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups)


def hybrid(full=2, states=3, mode="align") -> KVCacheConfig:
    """Return a plan like that in vLLM issue #40384: attention and state groups, one page size."""
    own = attention(BLOCK)
    block = LONGEST if mode == "none" else BLOCK
    spec = state(own.page_size_bytes, block, mamba_cache_mode=mode)
    return plan(*[own] * full, *[spec] * states, num_blocks=262)
