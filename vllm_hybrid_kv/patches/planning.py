# SPDX-License-Identifier: Apache-2.0
"""Patches vLLM's KV cache planning: page sizes, capacity, block alignment, state blocks."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

from vllm_hybrid_kv.constants import CACHE_DTYPE
from vllm_hybrid_kv.errors import HybridKVError, HybridKVStrategyError
from vllm_hybrid_kv.patches.context import Context, is_engine_config
from vllm_hybrid_kv.patches.mechanism import Patch
from vllm_hybrid_kv.planning.capacity import capacity, check_capacity_groups
from vllm_hybrid_kv.planning.page_sizes import check_page_sizes
from vllm_hybrid_kv.planning.warnings import own_grouping, startup_warnings
from vllm_hybrid_kv.settings import Settings
from vllm_hybrid_kv.state import STATE
from vllm_hybrid_kv.transfer.connectors import check_pages

logger = init_logger("vllm.hybrid_kv.planning")


def page_size_patch(context: Context) -> Patch:
    """Let a strategy unify page sizes."""

    def get_kv_cache_groups(
        original: Any, vllm_config: VllmConfig, kv_cache_spec: dict[str, KVCacheSpec]
    ) -> Any:
        context.activate_settings(vllm_config)
        # `original` calls unify_kv_cache_spec_page_size, but passes it no configuration.
        STATE.planning_for = vllm_config
        if is_engine_config(vllm_config):
            STATE.planned_layers = vllm_config, dict(kv_cache_spec)
        try:
            return original(vllm_config, kv_cache_spec)
        finally:
            STATE.planning_for = None

    def unify_kv_cache_spec_page_size(
        original: Any, kv_cache_spec: dict[str, KVCacheSpec]
    ) -> dict[str, KVCacheSpec]:
        settings = STATE.settings
        before = dict(kv_cache_spec)
        unified: dict[str, KVCacheSpec] | None = context.strategies.call(
            "unify_page_sizes",
            settings,
            vllm_config=STATE.planning_for,
            kv_cache_spec=kv_cache_spec,
            stock=original,
        )
        if unified is None:
            unified = original(kv_cache_spec)
        check_page_sizes(before, unified, context.strategies.label("unify_page_sizes", settings))
        return unified

    return Patch(
        "page_sizes",
        replaces="unify_kv_cache_spec_page_size, and get_kv_cache_groups around it",
        why="vLLM's grouping calls it by name; a KVCacheConfigBuilder (0.33) replaces all grouping",
        upstream="vllm-project/vllm#40128 (pages that do not divide)",
        until="the rule can be chosen, or pads no more than needed",
        edits=[
            context.rebind("get_kv_cache_groups", get_kv_cache_groups),
            context.rebind("unify_kv_cache_spec_page_size", unify_kv_cache_spec_page_size),
        ],
    )


def capacity_patch(context: Context) -> Patch:
    """Let a strategy choose the groups that the reported token capacity counts."""

    def get_kv_cache_capacity(
        original: Any, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
    ) -> tuple[int, float]:
        settings = context.activate_settings(vllm_config)
        tokens, concurrency = original(vllm_config, kv_cache_config)
        # The engine core calls this once, as soon as the plan is made.
        if is_engine_config(vllm_config):
            check_pages(vllm_config, kv_cache_config, settings)
        groups = context.strategies.call(
            "token_capacity_groups",
            settings,
            vllm_config=vllm_config,
            kv_cache_config=kv_cache_config,
        )
        if groups is not None:
            who = context.strategies.label("token_capacity_groups", settings)
            check_capacity_groups(kv_cache_config, groups, who)
            if len(groups) < len(kv_cache_config.kv_cache_groups):
                # Concurrency still counts all groups: a request needs blocks of each.
                tokens, _ = original(
                    vllm_config, replace(kv_cache_config, kv_cache_groups=list(groups))
                )
        if is_engine_config(vllm_config):
            _report(vllm_config, kv_cache_config, settings, tokens)
        return tokens, concurrency

    return Patch(
        "token_capacity",
        replaces="get_kv_cache_capacity",
        why="vLLM counts a fixed set of groups; this call is also the first with the whole plan",
        upstream="vllm-project/vllm#40384 and #40417 (groups that do not grow)",
        until="vLLM reports the tokens that fit, not those of requests of the longest length",
        edits=[context.rebind("get_kv_cache_capacity", get_kv_cache_capacity)],
    )


def _report(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, settings: Settings, tokens: int
) -> None:
    for line in capacity(vllm_config, kv_cache_config).describe(tokens):
        logger.info("%s", line)
    try:
        # Look up the function in its module, because the patched function is there.
        scheduler_block_size, hash_block_size = kv_cache_utils.resolve_kv_cache_block_sizes(
            kv_cache_config, vllm_config
        )
    except (ValueError, HybridKVStrategyError):
        # vLLM calls this function next, and stops with the same error.
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


def block_alignment_patch(context: Context) -> Patch:
    """Keep vLLM from enlarging blocks too much if some layers of a k8v4 cache are unquantised.

    vLLM enlarges blocks before any spec exists, so that its own rule can make pages equal later.
    Our strategies do not need larger blocks, and must not make blocks smaller again.
    """

    def align_hybrid(original: Any, cls: type, vllm_config: VllmConfig, backend_cls: type) -> None:
        if not _strategy_unifies(vllm_config):
            original(cls, vllm_config, backend_cls)
            return
        cache = vllm_config.cache_config
        skipped = cache.kv_cache_dtype_skip_layers
        # Align blocks as for an unquantised cache, so that an unquantised page can hold a state.
        # Unified pages can then hold a state too, because they are at least as large.
        cache.cache_dtype, cache.kv_cache_dtype_skip_layers = "auto", []
        try:
            original(cls, vllm_config, backend_cls)
        finally:
            cache.cache_dtype, cache.kv_cache_dtype_skip_layers = CACHE_DTYPE, skipped

    def align_heterogeneous(
        original: Any, cls: type, vllm_config: VllmConfig, backend_cls: type
    ) -> None:
        if not _strategy_unifies(vllm_config):
            original(cls, vllm_config, backend_cls)

    return Patch(
        "block_alignment",
        replaces="Platform._align_hybrid_block_size and _align_heterogeneous_kv_block_size, "
        "for k8v4 engines with unquantised layers",
        why="the first makes states 16 tokens long, which turns prefix caching off for most "
        "prompts; the second pads unquantised layers to a block of the quantised ones",
        until="vLLM leaves page sizes of several cache dtypes to their unification",
        edits=[
            context.rebind("Platform._align_hybrid_block_size", align_hybrid),
            context.rebind("Platform._align_heterogeneous_kv_block_size", align_heterogeneous),
        ],
    )


def _strategy_unifies(vllm_config: VllmConfig) -> bool:
    """Return whether a strategy other than `stock` unifies k8v4 pages with unquantised pages."""
    cache = vllm_config.cache_config
    if cache.cache_dtype != CACHE_DTYPE or not cache.kv_cache_dtype_skip_layers:
        return False
    return STATE.settings.unify_page_sizes != "stock"


def state_blocks_patch(context: Context) -> Patch:
    """Replace vLLM's check that every request in decode has a block of states.

    `vllm-hybrid-kv plan` calls the same method, so that it gives the same error.
    """

    def resolve(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(original).bind(self, *args, **kwargs)
        call.apply_defaults()
        requests, plan = call.arguments["max_num_reqs"], call.arguments["kv_cache_config"]
        # vLLM uses this argument only for the check that is replaced; None skips the check.
        call.arguments["max_num_reqs"] = None
        mode = original(*call.args, **call.kwargs)
        if (
            requests is not None
            and plan is not None
            and plan.has_mamba_layers
            and not call.arguments["is_profiling"]
            and mode.has_full_cudagraphs()
            and requests > plan.num_blocks
        ):
            raise HybridKVError(
                f"max_num_seqs ({requests}) exceeds available Mamba cache blocks "
                f"({plan.num_blocks}): with full CUDA graphs every request in decode needs one "
                f"for its states. Pass --max-num-seqs {plan.num_blocks}, or give the KV cache "
                "more memory (gpu_memory_utilization)"
            )
        return mode

    return Patch(
        "state_blocks",
        replaces="CompilationConfig.resolve_cudagraph_mode_and_sizes",
        why="vLLM's message names no option, and `plan` has to give a server's error",
        upstream="vllm-project/vllm#34094",
        until="vLLM names the option and its value",
        edits=[context.rebind("CompilationConfig.resolve_cudagraph_mode_and_sizes", resolve)],
    )
