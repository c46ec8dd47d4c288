# SPDX-License-Identifier: Apache-2.0
"""What a plan makes useless without a word: one line for each, to be logged at start-up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    KVQuantMode,
    MambaSpec,
    get_kv_quant_mode,
    iter_layer_specs,
)

from vllm_hybrid_kv.planning.capacity import blocks_per_request
from vllm_hybrid_kv.planning.hits import hits_are_possible, smallest_hit

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_hybrid_kv.settings import Settings

MOST_PADDING = 0.05
"""The share of the pool above which padding is worth a line."""


def startup_warnings(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    scheduler_block_size: int,
    hash_block_size: int,
    settings: Settings,
) -> list[str]:
    """Return a line for everything that was asked for and that the plan makes useless.

    Each names its number and the setting to change. A warning changes no behaviour, so they do not
    depend on which strategies are chosen; the traps are there with vLLM's own above all.

    Args:
        vllm_config: The engine's configuration.
        kv_cache_config: The plan, the scheduler's.
        scheduler_block_size: Tokens, of `resolve_kv_cache_block_sizes`.
        hash_block_size: The match unit in tokens, of the same function.
        settings: The plugin's, for what is chosen now.
    """
    lines = (
        _inert_prefix_cache(
            vllm_config, kv_cache_config, scheduler_block_size, hash_block_size, settings
        ),
        _unused_cache_dtype(vllm_config, kv_cache_config),
        _padded_pool(vllm_config, kv_cache_config, settings),
    )
    return [line for line in lines if line is not None]


def _inert_prefix_cache(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    scheduler_block_size: int,
    hash_block_size: int,
    settings: Settings,
) -> str | None:
    if not vllm_config.cache_config.enable_prefix_caching:
        return None
    smallest = smallest_hit(vllm_config, kv_cache_config, scheduler_block_size, hash_block_size)
    if hits_are_possible(vllm_config, smallest):
        return None
    finer = "" if settings.prefix_match_unit == "auto" else "choose prefix_match_unit=auto, "
    return (
        "prefix caching is on and cannot hit: the shortest prompt that can has "
        f"{smallest:,} tokens, with an answer more than --max-model-len "
        f"{vllm_config.model_config.max_model_len:,}; {finer}raise --max-model-len above "
        f"{smallest:,}, or turn it off with --no-enable-prefix-caching"
    )


def _unused_cache_dtype(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str | None:
    asked = vllm_config.cache_config.cache_dtype
    if asked == "auto":
        return None
    specs = [
        spec
        for group in kv_cache_config.kv_cache_groups
        for spec in iter_layer_specs(group.kv_cache_spec)
    ]
    if any(_stores(vllm_config, spec, asked) for spec in specs):
        return None
    attention = sum(
        len(group.layer_names)
        for group in kv_cache_config.kv_cache_groups
        if any(isinstance(spec, AttentionSpec) for spec in iter_layer_specs(group.kv_cache_spec))
    )
    skipped = vllm_config.cache_config.kv_cache_dtype_skip_layers
    way_out = (
        f"--kv-cache-dtype-skip-layers takes out {' '.join(skipped)}"
        if skipped
        else "give --kv-cache-dtype auto, which is what it does now"
    )
    return (
        f"--kv-cache-dtype {asked} is used on none of the {attention} attention layers "
        f"with a KV cache; {way_out}"
    )


def _stores(vllm_config: VllmConfig, spec: KVCacheSpec, asked: str) -> bool:
    """Return whether a layer stores what was asked for; any doubt counts as yes."""
    if not isinstance(spec, AttentionSpec):
        return False
    mode = get_kv_quant_mode(asked)
    if mode != KVQuantMode.NONE and spec.kv_quant_mode == mode:
        return True
    # MLA has formats of its own, named by a string.
    if getattr(spec, "cache_dtype_str", None) not in (None, "auto"):
        return True
    stored = kv_cache_dtype_str_to_dtype(asked, vllm_config.model_config)
    return bool(mode == KVQuantMode.NONE and spec.dtype == stored)


def padding_share(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> float:
    """Return the share of the pool, from 0 to 1, that is padding of pages.

    Of a pool that is full of requests of `max_model_len`: every group's pages count by the blocks
    that such a request holds of it. Places for layers that a group has fewer than the largest do
    not count; no setting changes them.

    Args:
        vllm_config: The engine's configuration.
        kv_cache_config: The plan.
    """
    padding = pool = 0.0
    for group in kv_cache_config.kv_cache_groups:
        if group.host_resident:
            continue
        blocks = blocks_per_request(
            vllm_config, group.kv_cache_spec, vllm_config.model_config.max_model_len
        )
        specs = list(iter_layer_specs(group.kv_cache_spec))
        page = sum(spec.page_size_bytes for spec in specs)
        padded = sum(spec.page_size_bytes - _content_bytes(spec) for spec in specs)
        padding += blocks * padded / page
        pool += blocks
    return padding / pool if pool else 0.0


def _content_bytes(spec: KVCacheSpec) -> int:
    if isinstance(spec, AttentionSpec | MambaSpec):
        return int(spec.real_page_size_bytes)
    return int(spec.page_size_bytes)


def _padded_pool(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, settings: Settings
) -> str | None:
    share = padding_share(vllm_config, kv_cache_config)
    if share <= MOST_PADDING:
        return None
    group, spec = max(
        (
            (group, spec)
            for group in kv_cache_config.kv_cache_groups
            for spec in iter_layer_specs(group.kv_cache_spec)
        ),
        key=lambda pair: 1 - _content_bytes(pair[1]) / pair[1].page_size_bytes,
    )
    return (
        f"{100 * share:.1f} % of the KV pool is padding (layer {group.layer_names[0]}: "
        f"{_content_bytes(spec):,} bytes in a page of {spec.page_size_bytes:,}); choose another "
        f"unify_page_sizes than {settings.unify_page_sizes!r}, or another --block-size"
    )
