# SPDX-License-Identifier: Apache-2.0
"""The built-in strategies that choose the prefix cache coordinator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator

from vllm_hybrid_kv.coordinator.hybrid_policy import HybridAwareCoordinator
from vllm_hybrid_kv.coordinator.longest_hit import FixedPointCoordinator
from vllm_hybrid_kv.hooks import hookimpl


class FixedPoint:
    """The strategy `fixed_point`: vLLM's cache, with the longest hits that its contents allow."""

    @hookimpl
    def hybrid_kv_make_coordinator(
        self, factory_args: Mapping[str, Any], stock: Callable[..., KVCacheCoordinator]
    ) -> KVCacheCoordinator:
        """Return a `FixedPointCoordinator` for several KV groups, otherwise vLLM's coordinator."""
        if not _has_several_groups(factory_args):
            return stock(**factory_args)
        return FixedPointCoordinator(**factory_args)


class HybridAware:
    """The strategy `hybrid_aware`: caches states where they pay, and evicts what pays least."""

    @hookimpl
    def hybrid_kv_make_coordinator(
        self, factory_args: Mapping[str, Any], stock: Callable[..., KVCacheCoordinator]
    ) -> KVCacheCoordinator:
        """Return a `HybridAwareCoordinator` for a model with cached states.

        Models without states get the result of `fixed_point`. Their hits end at any block, and no
        block is worth much more than another.
        """
        if not _has_several_groups(factory_args):
            return stock(**factory_args)
        if not HybridAwareCoordinator.suits(factory_args["kv_cache_config"]):
            return FixedPointCoordinator(**factory_args)
        return HybridAwareCoordinator(**factory_args)


def _has_several_groups(factory_args: Mapping[str, Any]) -> bool:
    groups = factory_args["kv_cache_config"].kv_cache_groups
    return factory_args["enable_caching"] and len(groups) > 1
