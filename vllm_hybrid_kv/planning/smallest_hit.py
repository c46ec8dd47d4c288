# SPDX-License-Identifier: Apache-2.0
"""The shortest prompt that can hit the prefix cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.core.kv_cache_utils import (
    eagle_proof_margin,
    generate_scheduler_kv_cache_config,
    resolve_cache_hit_alignment_tokens,
    resolve_dcp_kv_block_size,
)
from vllm.v1.kv_cache_interface import KVCacheConfig, MambaSpec, UniformTypeKVCacheSpecs
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def smallest_hit(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    scheduler_block_size: int,
    hash_block_size: int,
) -> int:
    """Return the tokens of the shortest prompt that hits when it is sent a second time.

    A hit ends at a multiple of the alignment A: the match unit if vLLM can end hits inside blocks,
    otherwise the scheduler's block. A prompt's last token is always computed, because its logits
    are needed. So without drafts the result is A + 1.

    Draft layers (EAGLE, MTP) write the last entry before a boundary for the next token, and
    shorten hits in one of two ways:

    * vLLM 0.32, and 0.33 with a KV connector: a hit needs a margin of M more cached tokens, which
      are then dropped. M is one block of the draft layers, or one match unit if hits end inside
      blocks. The result is A + M, because M is at least one token. With a single KV group the last
      token is left out first, and the result is A + M + 1.
    * vLLM 0.33: hashes cover L tokens after their block, and the result is A + L.

    Args:
        vllm_config: The engine's configuration.
        kv_cache_config: The plan of a worker or of the scheduler.
        scheduler_block_size: Tokens, from `resolve_kv_cache_block_sizes`.
        hash_block_size: The match unit in tokens, from the same function.
    """
    if any(
        isinstance(group.kv_cache_spec, UniformTypeKVCacheSpecs)
        for group in kv_cache_config.kv_cache_groups
    ):
        # A worker's plan. Only the specs of the scheduler's plan have managers.
        kv_cache_config = generate_scheduler_kv_cache_config([kv_cache_config])
    alignment = resolve_cache_hit_alignment_tokens(
        kv_cache_config, vllm_config, scheduler_block_size, hash_block_size
    )
    if lookahead := getattr(vllm_config, "num_hash_lookahead_tokens", 0):
        return alignment + int(lookahead)
    margin = _draft_margin(vllm_config, kv_cache_config, alignment, hash_block_size)
    if len(kv_cache_config.kv_cache_groups) <= 1:
        return alignment + margin + 1
    return alignment + max(margin, 1)


def _draft_margin(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, alignment: int, hash_block_size: int
) -> int:
    """Return the tokens after a hit that draft layers need cached, 0 without such layers."""
    speculative = vllm_config.speculative_config
    drops = speculative is not None and speculative.use_eagle_block_drop()
    groups = kv_cache_config.kv_cache_groups
    if not drops and hasattr(vllm_config, "num_hash_lookahead_tokens"):
        # In 0.33 marked groups without this flag drop nothing.
        return 0
    # If no group is marked, vLLM treats all as groups with draft layers.
    drafting = [group for group in groups if group.is_eagle_group] or (groups if drops else [])
    dcp = vllm_config.parallel_config.decode_context_parallel_size
    margins = [0]
    for group in drafting:
        spec = group.kv_cache_spec
        if isinstance(spec, MambaSpec) or not spec.prefix_cacheable:
            continue
        manager = KVCacheSpecRegistry.get_manager_class(spec, group.role)
        fine = alignment == hash_block_size and manager.supports_fine_grained_hash_lookup
        margins.append(
            eagle_proof_margin(resolve_dcp_kv_block_size(spec, dcp), hash_block_size, fine)
        )
    return max(margins)


def hits_are_possible(vllm_config: VllmConfig, smallest: int) -> bool:
    """Return whether `max_model_len` has room for the smallest hit and one token of its answer."""
    return smallest < int(vllm_config.model_config.max_model_len)
