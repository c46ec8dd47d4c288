# SPDX-License-Identifier: Apache-2.0
"""Patches that let strategies choose the prefix cache coordinator and the match unit."""

from __future__ import annotations

import inspect
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_hybrid_kv.coordinator.upstream_fixes import copy_whole_blocks
from vllm_hybrid_kv.errors import HybridKVStrategyError
from vllm_hybrid_kv.patches.context import Context
from vllm_hybrid_kv.patches.mechanism import Patch, UnchangedTarget
from vllm_hybrid_kv.state import STATE


def coordinator_patch(context: Context) -> Patch:
    """Let a strategy make the coordinator, and attach the coordinator to its manager."""

    def get_kv_cache_coordinator(original: Any, *args: Any, **kwargs: Any) -> Any:
        # The factory does not get the engine's configuration, but planning activated its settings.
        settings = STATE.settings
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        coordinator = context.strategies.call(
            "coordinator",
            settings,
            kv_cache_config=bound.arguments["kv_cache_config"],
            factory_args=dict(bound.arguments),
            stock=original,
        )
        if coordinator is None:
            return original(*args, **kwargs)
        if not isinstance(coordinator, KVCacheCoordinator):
            raise HybridKVStrategyError(
                f"{context.strategies.label('coordinator', settings)} must return a "
                f"KVCacheCoordinator, got {coordinator!r}"
            )
        return coordinator

    def init(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if (attach := getattr(self.coordinator, "attach", None)) is not None:
            attach(self)

    return Patch(
        "coordinator",
        replaces="get_kv_cache_coordinator, and KVCacheManager.__init__, which it wraps",
        why="the factory has a fixed choice of classes, and the manager caches states at branch "
        "points inside a block for EAGLE only",
        upstream="vllm-project/vllm#31707 (prefix caching over any mix of groups)",
        until="the coordinator class can be configured like the scheduler class",
        edits=[
            context.rebind("get_kv_cache_coordinator", get_kv_cache_coordinator),
            context.rebind("KVCacheManager.__init__", init),
            *map(UnchangedTarget, context.relied_on),
        ],
    )


def prefix_match_unit_patch(context: Context) -> Patch:
    """Let a strategy choose the match unit if the user did not."""

    def resolve_kv_cache_block_sizes(
        original: Any, kv_cache_config: KVCacheConfig, vllm_config: VllmConfig
    ) -> Any:
        settings = context.activate_settings(vllm_config)
        cache_config = vllm_config.cache_config
        unit = None
        if cache_config.prefix_match_unit is None:
            unit = context.strategies.call(
                "prefix_match_unit",
                settings,
                vllm_config=vllm_config,
                kv_cache_config=kv_cache_config,
            )
        if unit is None:
            return original(kv_cache_config, vllm_config)
        who = context.strategies.label("prefix_match_unit", settings)
        if not isinstance(unit, int) or isinstance(unit, bool) or unit <= 0:
            raise HybridKVStrategyError(
                f"{who} must return a positive number of tokens, got {unit!r}"
            )
        # vLLM reads the unit from the configuration and checks it. Reset the field afterwards;
        # otherwise, the next call would treat its value as the user's choice.
        cache_config.prefix_match_unit = unit
        try:
            return original(kv_cache_config, vllm_config)
        except ValueError as error:
            layers = ", ".join(
                f"{group.layer_names[0]}: {group.kv_cache_spec.block_size}"
                for group in kv_cache_config.kv_cache_groups
                if group.layer_names
            )
            raise HybridKVStrategyError(
                f"{who} returned a match unit of {unit} tokens, which vLLM rejects: {error} "
                f"(block sizes by first layer of each group: {layers})"
            ) from error
        finally:
            cache_config.prefix_match_unit = None

    return Patch(
        "prefix_match_unit",
        replaces="resolve_kv_cache_block_sizes",
        why="the choice depends on the KV groups, which are known only here",
        upstream="vllm-project/vllm#40696 and #53749 (prompts shorter than a block never hit)",
        until="vLLM chooses a unit that hits where block sizes are large",
        edits=[context.rebind("resolve_kv_cache_block_sizes", resolve_kv_cache_block_sizes)],
    )


def block_copies_patch(context: Context) -> Patch:
    """Make vLLM copy all bytes of a block."""
    return Patch(
        "block_copies",
        replaces="copy_kv_cache_blocks_inplace; the replacement calls it once per kind of view",
        why="vLLM copies only the first of several views at one address. A state may be shorter "
        "than a page of attention, so a prompt that resumes inside a block attends to old contents "
        "of the copy",
        until="vLLM distinguishes the views at one address",
        edits=[context.rebind("copy_kv_cache_blocks_inplace", copy_whole_blocks)],
    )
