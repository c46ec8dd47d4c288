# SPDX-License-Identifier: Apache-2.0
"""The patches that let strategies coordinate prefix caching over several KV groups."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm_hybrid_kv.coordinator.answers import (
    KVCacheManagerObserver,
    check_coordinator,
    check_prefix_match_unit,
)
from vllm_hybrid_kv.coordinator.block_copies import copy_whole_blocks
from vllm_hybrid_kv.errors import HybridKVStrategyError
from vllm_hybrid_kv.patches.base import (
    FunctionRebinding,
    MethodRebinding,
    Patch,
    PatchInfo,
    Target,
    UnchangedTarget,
)
from vllm_hybrid_kv.state import STATE

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from vllm_hybrid_kv.patches.context import Context


def coordinator_patch(
    context: Context, factory: Target, init_kv_cache_manager: Target, relied_on: Sequence[Target]
) -> Patch:
    """Let a strategy make the coordinator, and a coordinator know its manager.

    Args:
        context: The process's.
        factory: `get_kv_cache_coordinator`.
        init_kv_cache_manager: `KVCacheManager.__init__`, which calls the factory.
        relied_on: Methods that decide where chunks end and which states are cached.
    """

    def make(original: Any) -> Any:
        signature = inspect.signature(original)

        def get_kv_cache_coordinator(*args: Any, **kwargs: Any) -> Any:
            # The factory is not told the engine's configuration. Its settings are active since
            # the KV cache was planned.
            settings = STATE.settings
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            coordinator = context.strategies.ask(
                "coordinator",
                settings,
                kv_cache_config=bound.arguments["kv_cache_config"],
                factory_args=dict(bound.arguments),
                stock=original,
            )
            if coordinator is None:
                return original(*args, **kwargs)
            check_coordinator(coordinator, context.strategies.who("coordinator", settings))
            return coordinator

        return get_kv_cache_coordinator

    def make_init(original: Any) -> Any:
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            if isinstance(self.coordinator, KVCacheManagerObserver):
                self.coordinator.attach(self)

        return init

    return Patch(
        "coordinator",
        PatchInfo(
            replaces="get_kv_cache_coordinator, and KVCacheManager.__init__, which it wraps",
            why="the choice of coordinator class is fixed in the one; in the other, that states "
            "are kept at branch points inside a block is decided by what EAGLE needs",
            upstream="vllm-project/vllm#31707 (prefix caching over any mix of groups)",
            until="the coordinator class can be configured as the scheduler class can",
        ),
        [
            FunctionRebinding(factory, make),
            MethodRebinding(init_kv_cache_manager, make_init),
            *map(UnchangedTarget, relied_on),
        ],
    )


def prefix_match_unit_patch(context: Context, resolve_block_sizes: Target) -> Patch:
    """Let a strategy choose the prefix match unit where the user did not.

    Args:
        context: The process's.
        resolve_block_sizes: `resolve_kv_cache_block_sizes`.
    """

    def make(original: Any) -> Any:
        def resolve_kv_cache_block_sizes(
            kv_cache_config: KVCacheConfig, vllm_config: VllmConfig
        ) -> tuple[int, int]:
            settings = context.activate_settings(vllm_config)
            cache_config = vllm_config.cache_config
            unit = None
            if cache_config.prefix_match_unit is None:
                unit = context.strategies.ask(
                    "prefix_match_unit",
                    settings,
                    vllm_config=vllm_config,
                    kv_cache_config=kv_cache_config,
                )
            if unit is None:
                sizes: tuple[int, int] = original(kv_cache_config, vllm_config)
                return sizes
            who = context.strategies.who("prefix_match_unit", settings)
            check_prefix_match_unit(unit, who)
            # vLLM reads the unit from the configuration and checks it. It is taken out again so
            # that the next call does not take it for the user's choice.
            cache_config.prefix_match_unit = unit
            try:
                sizes = original(kv_cache_config, vllm_config)
            except ValueError as error:
                layers = ", ".join(
                    f"{group.layer_names[0]}: {group.kv_cache_spec.block_size}"
                    for group in kv_cache_config.kv_cache_groups
                    if group.layer_names
                )
                raise HybridKVStrategyError(
                    f"{who} answered {unit} tokens, which vLLM refuses: {error} "
                    f"(block sizes by first layer of each group: {layers})"
                ) from error
            finally:
                cache_config.prefix_match_unit = None
            return sizes

        return resolve_kv_cache_block_sizes

    return Patch(
        "prefix_match_unit",
        PatchInfo(
            replaces="resolve_kv_cache_block_sizes",
            why="the unit must be known before the groups are unless it is chosen here",
            upstream="vllm-project/vllm#40696 and #53749 (prompts shorter than a block never hit)",
            until="vLLM chooses a unit that hits where block sizes are large",
        ),
        [FunctionRebinding(resolve_block_sizes, make)],
    )


def block_copies_patch(copy_blocks: Target) -> Patch:
    """Have blocks copied whole where layers of different groups share memory.

    Args:
        copy_blocks: `copy_kv_cache_blocks_inplace`.
    """
    return Patch(
        "block_copies",
        PatchInfo(
            replaces="copy_kv_cache_blocks_inplace, which it calls once for each kind of view",
            why="of views that begin at one address it copies the first, a state of which may be "
            "shorter than a page of attention: a prompt that resumes inside a block then attends "
            "to what was in the copy before",
            upstream="none known",
            until="it takes the views that begin at one address for different ones",
        ),
        [FunctionRebinding(copy_blocks, copy_whole_blocks)],
    )
