# SPDX-License-Identifier: Apache-2.0
"""Which KV groups the reported token capacity counts."""

from __future__ import annotations

from collections.abc import Sequence

from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    iter_layer_specs,
)

from vllm_hybrid_kv.errors import HybridKVStrategyError
from vllm_hybrid_kv.hooks import hookimpl


class AllGroups:
    """The strategy `all`: every group, which is vLLM's own rule."""

    @hookimpl
    def hybrid_kv_token_capacity_groups(
        self, kv_cache_config: KVCacheConfig
    ) -> list[KVCacheGroupSpec]:
        """Return every group."""
        return list(kv_cache_config.kv_cache_groups)


class GrowingGroups:
    """The strategy `growing`: the groups whose memory grows with the sequence."""

    @hookimpl
    def hybrid_kv_token_capacity_groups(
        self, kv_cache_config: KVCacheConfig
    ) -> list[KVCacheGroupSpec]:
        """See `growing_groups`."""
        return growing_groups(kv_cache_config)


def growing_groups(kv_cache_config: KVCacheConfig) -> list[KVCacheGroupSpec]:
    """Return the groups that need more blocks the longer a sequence gets.

    The rule of vLLM's #40384 and #40417. Full attention and its subclasses grow; Mamba grows only
    in cache mode `all`, which keeps a state per block; a sliding window and chunked local
    attention are bounded. Where no group in device memory grows, all groups are returned.

    The capacity that follows is that of one sequence as long as the pool allows, without the
    bounded groups' few blocks per request.
    """
    growing = [
        group
        for group in kv_cache_config.kv_cache_groups
        if any(_grows(spec) for spec in iter_layer_specs(group.kv_cache_spec))
    ]
    if all(group.host_resident for group in growing):
        return list(kv_cache_config.kv_cache_groups)
    return growing


def _grows(spec: KVCacheSpec) -> bool:
    if isinstance(spec, MambaSpec):
        return bool(spec.mamba_cache_mode == "all")
    return isinstance(spec, FullAttentionSpec)


def check_capacity_groups(
    kv_cache_config: KVCacheConfig, chosen: Sequence[KVCacheGroupSpec], who: str
) -> None:
    """Check a strategy's choice of groups.

    Raises:
        HybridKVStrategyError: A group is not the plan's or is there twice, or none is in device
            memory, so that there is nothing to count.
    """
    if not isinstance(chosen, Sequence):
        raise HybridKVStrategyError(f"{who} must answer with a list of KV groups, got {chosen!r}")
    groups = kv_cache_config.kv_cache_groups
    for index, group in enumerate(chosen):
        if not any(group is planned for planned in groups):
            raise HybridKVStrategyError(
                f"{who} chose a KV group that is not one of the plan's {len(groups)}: {group!r}"
            )
        if any(group is other for other in chosen[:index]):
            raise HybridKVStrategyError(
                f"{who} chose the KV group of layer {group.layer_names[0]} twice"
            )
    if all(group.host_resident for group in chosen):
        raise HybridKVStrategyError(
            f"{who} chose {len(chosen)} of {len(groups)} KV groups, none of them in device memory"
        )
