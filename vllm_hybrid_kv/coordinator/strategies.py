# SPDX-License-Identifier: Apache-2.0
"""Strategies that choose the coordinator of prefix caching."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator

from vllm_hybrid_kv.coordinator.fixed_point import FixedPointCoordinator
from vllm_hybrid_kv.coordinator.hybrid_aware import HybridAwareCoordinator
from vllm_hybrid_kv.hooks import hookimpl


class FixedPoint:
    """The strategy `fixed_point`: vLLM's cache with the longest hits that its contents allow."""

    @hookimpl
    def hybrid_kv_make_coordinator(
        self, factory_args: Mapping[str, Any], stock: Callable[..., KVCacheCoordinator]
    ) -> KVCacheCoordinator:
        """Make a `FixedPointCoordinator` where several KV groups have to agree.

        With one group there is nothing to agree about and vLLM's own coordinator finds the
        longest hit; without prefix caching there is nothing to find.
        """
        if not _groups_have_to_agree(factory_args):
            return stock(**factory_args)
        return FixedPointCoordinator(**factory_args)


class HybridAware:
    """The strategy `hybrid_aware`: keeps states where they pay, and gives up what pays least."""

    @hookimpl
    def hybrid_kv_make_coordinator(
        self, factory_args: Mapping[str, Any], stock: Callable[..., KVCacheCoordinator]
    ) -> KVCacheCoordinator:
        """Make a `HybridAwareCoordinator` for a model with states that are cached.

        A model without states gets what `fixed_point` gives it, and one with a single group what
        vLLM does: their hits end at any block, and no block is worth much more than another.
        """
        if not _groups_have_to_agree(factory_args):
            return stock(**factory_args)
        if not HybridAwareCoordinator.suits(factory_args["kv_cache_config"]):
            return FixedPointCoordinator(**factory_args)
        return HybridAwareCoordinator(**factory_args)


def _groups_have_to_agree(factory_args: Mapping[str, Any]) -> bool:
    return factory_args["enable_caching"] and (
        len(factory_args["kv_cache_config"].kv_cache_groups) > 1
    )
