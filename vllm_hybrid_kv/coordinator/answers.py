# SPDX-License-Identifier: Apache-2.0
"""Checks of what coordinator strategies answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator

from vllm_hybrid_kv.errors import HybridKVStrategyError

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager


@runtime_checkable
class KVCacheManagerObserver(Protocol):
    """A coordinator that wants to know the manager that had it made."""

    def attach(self, kv_cache_manager: KVCacheManager) -> None:
        """Be told the manager once it is complete, before the scheduler asks it anything."""


def check_coordinator(coordinator: object, who: str) -> None:
    """Check that a strategy made a coordinator.

    Raises:
        HybridKVStrategyError: It made something else.
    """
    if not isinstance(coordinator, KVCacheCoordinator):
        raise HybridKVStrategyError(
            f"{who} must answer with a KVCacheCoordinator, got {coordinator!r}"
        )


def check_prefix_match_unit(unit: object, who: str) -> None:
    """Check that a strategy answered with a number of tokens.

    Whether it divides the block sizes is for vLLM to say, which knows the groups that matter.

    Raises:
        HybridKVStrategyError: It did not.
    """
    if not isinstance(unit, int) or isinstance(unit, bool) or unit <= 0:
        raise HybridKVStrategyError(
            f"{who} must answer with a positive number of tokens, got {unit!r}"
        )
