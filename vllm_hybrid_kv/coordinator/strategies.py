# SPDX-License-Identifier: Apache-2.0
"""The built-in strategies that choose the prefix cache coordinator and the match unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.core.kv_cache_utils import partial_hash_hits_enabled, resolve_dcp_kv_block_size
from vllm.v1.kv_cache_interface import KVCacheConfig, MambaSpec, iter_layer_specs

from vllm_hybrid_kv.hooks import hookimpl
from vllm_hybrid_kv.state import STATE

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_hybrid_kv.coordinator.longest_hit import FixedPointCoordinator


EXACT = 64
"""Gated DeltaNet and similar layers compute in chunks of 64 tokens, which start where a request
resumes. A request that resumes at a multiple of 64 therefore rounds like one that starts at 0."""

FINEST = 16
"""The finest match unit in tokens, vLLM's usual block size. Finer units hardly hit more."""


class FixedPoint:
    """The strategy `fixed_point`: vLLM's cache, with the longest hits that its contents allow."""

    @hookimpl
    def hybrid_kv_make_coordinator(
        self, factory_args: Mapping[str, Any], stock: Callable[..., KVCacheCoordinator]
    ) -> KVCacheCoordinator:
        """Return our coordinator for several KV groups of vLLM's kinds, otherwise vLLM's."""
        config = factory_args["kv_cache_config"]
        if factory_args["enable_caching"] and len(config.kv_cache_groups) > 1:
            coordinator = self._coordinator_class(config)(**factory_args)
            if coordinator.knows_all_groups:
                return coordinator
        return stock(**factory_args)

    def _coordinator_class(self, config: KVCacheConfig) -> type[FixedPointCoordinator]:
        # Import late, because only the scheduler's process needs it.
        from vllm_hybrid_kv.coordinator.longest_hit import FixedPointCoordinator

        return FixedPointCoordinator


class HybridAware(FixedPoint):
    """The strategy `hybrid_aware`: caches states where requests resume, evicts by saved compute.

    Models without states get the coordinator of `fixed_point`, because their hits end at any block,
    and no block is worth much more than another.
    """

    def _coordinator_class(self, config: KVCacheConfig) -> type[FixedPointCoordinator]:
        from vllm_hybrid_kv.coordinator.hybrid_policy import HybridAwareCoordinator

        if HybridAwareCoordinator.suits(config):
            return HybridAwareCoordinator
        return super()._coordinator_class(config)


class AutoMatchUnit:
    """The strategy `auto`: chooses a fine unit if vLLM can end a hit inside a block."""

    @hookimpl
    def hybrid_kv_prefix_match_unit(
        self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
    ) -> int | None:
        """Return `match_unit`, or None if vLLM's own coordinator would cache wrong states."""
        if STATE.settings.coordinator == "stock" and any(
            isinstance(group.kv_cache_spec, MambaSpec)
            and group.kv_cache_spec.num_prefill_checkpoint_blocks
            for group in kv_cache_config.kv_cache_groups
        ):
            # With hits inside blocks, vLLM caches wrong states: see `upstream_fixes.PassedBlocks`.
            return None
        return match_unit(kv_cache_config, vllm_config.parallel_config.decode_context_parallel_size)


def match_unit(kv_cache_config: KVCacheConfig, dcp_world_size: int) -> int | None:
    """Return a match unit that divides the block size of every group with a prefix cache.

    The blocks of models with states are hundreds or thousands of tokens long. vLLM's default is to
    match whole blocks, so prompts shorter than a block never hit. With decode context parallelism,
    `dcp_world_size` ranks share each attention block.

    Returns:
        The smallest multiple of `EXACT` (and of the tokens per entry of a compressed layer) that
        divides all block sizes, or else the smallest multiple of `FINEST`. None (vLLM's default) if
        neither exists, or if vLLM cannot end a hit inside a block. vLLM can do so only if the model
        has states in cache mode `align`.
    """
    groups = [
        group for group in kv_cache_config.kv_cache_groups if group.kv_cache_spec.prefix_cacheable
    ]
    if len(groups) < 2:
        return None
    common = math.gcd(
        *(resolve_dcp_kv_block_size(group.kv_cache_spec, dcp_world_size) for group in groups)
    )
    compressed = [
        spec.tokens_per_state
        for group in groups
        for spec in iter_layer_specs(group.kv_cache_spec)
        if isinstance(spec.tokens_per_state, int) and spec.tokens_per_state > 1
    ]
    entry = math.lcm(*compressed)
    for least in (math.lcm(EXACT, entry), math.lcm(FINEST, entry)):
        for unit in range(least, common + 1, least):
            if common % unit == 0:
                return unit if partial_hash_hits_enabled(groups, unit, dcp_world_size) else None
    return None
