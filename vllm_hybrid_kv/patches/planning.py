# SPDX-License-Identifier: Apache-2.0
"""The patches that let strategies plan: page sizes and reported capacity."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core import kv_cache_utils

from vllm_hybrid_kv.errors import HybridKVStrategyError
from vllm_hybrid_kv.patches.base import FunctionRebinding, Patch, PatchInfo, Target
from vllm_hybrid_kv.planning.capacity import capacity, check_capacity_groups
from vllm_hybrid_kv.planning.page_sizes import check_page_sizes
from vllm_hybrid_kv.planning.warnings import own_grouping, startup_warnings
from vllm_hybrid_kv.state import STATE
from vllm_hybrid_kv.transfer.connectors import check_pages

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheSpec

    from vllm_hybrid_kv.patches.context import Context
    from vllm_hybrid_kv.settings import Settings

logger = init_logger("vllm.hybrid_kv.planning")


def page_size_patch(context: Context, get_groups: Target, unify: Target) -> Patch:
    """Let a strategy unify page sizes.

    Args:
        context: The process's.
        get_groups: `get_kv_cache_groups`.
        unify: `unify_kv_cache_spec_page_size`.
    """

    def make_groups(original: Any) -> Any:
        def get_kv_cache_groups(
            vllm_config: VllmConfig, kv_cache_spec: dict[str, KVCacheSpec]
        ) -> list[KVCacheGroupSpec]:
            context.activate_settings(vllm_config)
            # unify_kv_cache_spec_page_size, which vLLM calls inside, gets the specs alone.
            STATE.planning_for = vllm_config
            if _is_an_engines(vllm_config):
                STATE.planned_layers = vllm_config, dict(kv_cache_spec)
            try:
                groups: list[KVCacheGroupSpec] = original(vllm_config, kv_cache_spec)
            finally:
                STATE.planning_for = None
            return groups

        return get_kv_cache_groups

    def make_unify(original: Any) -> Any:
        def unify_kv_cache_spec_page_size(
            kv_cache_spec: dict[str, KVCacheSpec],
        ) -> dict[str, KVCacheSpec]:
            settings = STATE.settings
            before = dict(kv_cache_spec)
            unified: dict[str, KVCacheSpec] | None = context.strategies.ask(
                "unify_page_sizes",
                settings,
                vllm_config=STATE.planning_for,
                kv_cache_spec=kv_cache_spec,
                stock=original,
            )
            if unified is None:
                unified = original(kv_cache_spec)
            check_page_sizes(before, unified, context.strategies.who("unify_page_sizes", settings))
            return unified

        return unify_kv_cache_spec_page_size

    return Patch(
        "page_sizes",
        PatchInfo(
            replaces="unify_kv_cache_spec_page_size, and get_kv_cache_groups around it",
            why="grouping calls it by name; 0.33's KVCacheConfigBuilder replaces all of grouping",
            upstream="vllm-project/vllm#40128 (pages that do not divide)",
            until="the rule can be chosen, or pads no more than needed",
        ),
        [FunctionRebinding(get_groups, make_groups), FunctionRebinding(unify, make_unify)],
    )


def _is_an_engines(vllm_config: object) -> bool:
    """Whether an engine starts; whoever calls vLLM's planning functions may have anything else."""
    from vllm.config import VllmConfig

    return isinstance(vllm_config, VllmConfig)


def _report(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, settings: Settings, tokens: int
) -> None:
    """Log what the pool holds and the start-up warnings."""
    for line in capacity(vllm_config, kv_cache_config).describe(tokens):
        logger.info("%s", line)
    try:
        # By its module, for the unit that a strategy chooses is chosen in there.
        scheduler_block_size, hash_block_size = kv_cache_utils.resolve_kv_cache_block_sizes(
            kv_cache_config, vllm_config
        )
    except (ValueError, HybridKVStrategyError):
        # vLLM asks next, and stops.
        return
    planned = STATE.planned_layers
    layers = planned[1] if planned is not None and planned[0] is vllm_config else None
    if layers is None and settings.unify_page_sizes != "stock":
        grouping = own_grouping(vllm_config)
        if grouping is None and len(kv_cache_config.kv_cache_groups) > 1:
            grouping = "code that does not call vLLM's get_kv_cache_groups"
        if grouping is not None:
            logger.warning(
                "The KV cache groups of this engine were made by %s: unify_page_sizes=%s has no "
                "effect",
                grouping,
                settings.unify_page_sizes,
            )
    for line in startup_warnings(
        vllm_config, kv_cache_config, scheduler_block_size, hash_block_size, settings, layers
    ):
        logger.warning("%s", line)


def capacity_patch(context: Context, get_capacity: Target) -> Patch:
    """Let a strategy choose the groups that the reported token capacity counts.

    Args:
        context: The process's.
        get_capacity: `get_kv_cache_capacity`.
    """

    def make(original: Any) -> Any:
        def get_kv_cache_capacity(
            vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
        ) -> tuple[int, float]:
            settings = context.activate_settings(vllm_config)
            tokens, concurrency = original(vllm_config, kv_cache_config)
            # Called once for an engine, in its core's process, as soon as the plan is made.
            if _is_an_engines(vllm_config):
                check_pages(vllm_config, kv_cache_config, settings.boundary_layers)
            groups = context.strategies.ask(
                "token_capacity_groups",
                settings,
                vllm_config=vllm_config,
                kv_cache_config=kv_cache_config,
            )
            if groups is not None:
                who = context.strategies.who("token_capacity_groups", settings)
                check_capacity_groups(kv_cache_config, groups, who)
                if len(groups) < len(kv_cache_config.kv_cache_groups):
                    # Concurrency still counts all groups: a request needs blocks of each.
                    tokens, _ = original(
                        vllm_config, replace(kv_cache_config, kv_cache_groups=list(groups))
                    )
            if _is_an_engines(vllm_config):
                _report(vllm_config, kv_cache_config, settings, tokens)
            return tokens, concurrency

        return get_kv_cache_capacity

    return Patch(
        "token_capacity",
        PatchInfo(
            replaces="get_kv_cache_capacity",
            why="which groups count is fixed in it, and it is where the whole plan is known",
            upstream="vllm-project/vllm#40384 and #40417 (groups that do not grow)",
            until="vLLM reports the tokens that fit, not those of requests of the longest length",
        ),
        [FunctionRebinding(get_capacity, make)],
    )
