# SPDX-License-Identifier: Apache-2.0
"""Warnings at start-up about settings that the plan makes useless, a line each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    KVQuantMode,
    MambaSpec,
    UniformTypeKVCacheSpecs,
    get_kv_quant_mode,
    iter_layer_specs,
)

from vllm_hybrid_kv.planning.capacity import blocks_per_request
from vllm_hybrid_kv.planning.smallest_hit import hits_are_possible, smallest_hit

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
    layers: Mapping[str, KVCacheSpec] | None = None,
) -> list[str]:
    """Return a line for everything that was asked for and that the plan makes useless.

    Each names its number and the setting to change. A warning changes no behaviour, so they do not
    depend on which strategies are chosen; the traps are there with vLLM's own above all.

    Args:
        vllm_config: The engine's configuration.
        kv_cache_config: The plan.
        scheduler_block_size: Tokens, of `resolve_kv_cache_block_sizes`.
        hash_block_size: The match unit in tokens, of the same function.
        settings: The plugin's, for what is chosen now.
        layers: The spec of every layer by name, as it was planned with. Needed with the
            scheduler's plan, where one layer's spec stands for a whole group; None takes the
            groups' own, as workers have them.
    """
    if layers is None:
        layers = _specs(kv_cache_config)
    lines = (
        _inert_prefix_cache(
            vllm_config, kv_cache_config, scheduler_block_size, hash_block_size, settings
        ),
        _unused_cache_dtype(vllm_config, layers),
        _padded_pool(vllm_config, kv_cache_config, settings, layers),
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


def _specs(kv_cache_config: KVCacheConfig) -> dict[str, KVCacheSpec]:
    specs: dict[str, KVCacheSpec] = {}
    for group in kv_cache_config.kv_cache_groups:
        if isinstance(group.kv_cache_spec, UniformTypeKVCacheSpecs):
            specs.update(group.kv_cache_spec.kv_cache_specs)
        else:
            specs.update(dict.fromkeys(group.layer_names, group.kv_cache_spec))
    return specs


def _unused_cache_dtype(vllm_config: VllmConfig, layers: Mapping[str, KVCacheSpec]) -> str | None:
    asked = vllm_config.cache_config.cache_dtype
    if asked == "auto" or any(_stores(vllm_config, spec, asked) for spec in layers.values()):
        return None
    attention = sum(isinstance(spec, AttentionSpec) for spec in layers.values())
    skipped = vllm_config.cache_config.kv_cache_dtype_skip_layers
    way_out = (
        f"layers {' '.join(skipped)} stay unquantised by boundary_layers or "
        "--kv-cache-dtype-skip-layers"
        if skipped and attention
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
    # Some models keep fp8 in pages that have its dtype and no mode.
    stored = kv_cache_dtype_str_to_dtype(asked, vllm_config.model_config)
    return mode in (KVQuantMode.NONE, KVQuantMode.FP8_PER_TENSOR) and bool(spec.dtype == stored)


def padding_share(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> float:
    """Return the share of the pool, from 0 to 1, that is padding of pages.

    Of a pool that is full of requests of `max_model_len`: every group's pages count by the blocks
    that such a request holds of it. Places for layers that a group has fewer than the largest do
    not count; no setting changes them.

    Args:
        vllm_config: The engine's configuration.
        kv_cache_config: The plan.
    """
    return sum(share for share, _ in _padding_by_group(vllm_config, kv_cache_config))


def _padding_by_group(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
) -> list[tuple[float, KVCacheGroupSpec]]:
    """Return the share of the pool that is padding of each group's pages."""
    groups = [group for group in kv_cache_config.kv_cache_groups if not group.host_resident]
    max_model_len = vllm_config.model_config.max_model_len
    blocks = [
        blocks_per_request(vllm_config, group.kv_cache_spec, max_model_len) for group in groups
    ]
    pool = max(sum(blocks), 1)
    return [
        (count / pool * _padding_of_page(group.kv_cache_spec), group)
        for count, group in zip(blocks, groups, strict=True)
    ]


def _padding_of_page(spec: KVCacheSpec) -> float:
    layers = list(iter_layer_specs(spec))
    page = sum(layer.page_size_bytes for layer in layers)
    return 1 - sum(map(_content_bytes, layers)) / page


def _content_bytes(spec: KVCacheSpec) -> int:
    if isinstance(spec, (AttentionSpec, MambaSpec)):
        return int(spec.real_page_size_bytes)
    return int(spec.page_size_bytes)


def _padded_pool(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    settings: Settings,
    layers: Mapping[str, KVCacheSpec],
) -> str | None:
    by_group = _padding_by_group(vllm_config, kv_cache_config)
    share = sum(share for share, _ in by_group)
    if share <= MOST_PADDING:
        return None
    _, group = max(by_group, key=lambda pair: pair[0])
    spec = max(iter_layer_specs(group.kv_cache_spec), key=_padding_of_page)
    layer = group.layer_names[0]
    if isinstance(spec, MambaSpec) and getattr(layers.get(layer), "page_size_padded", None):
        way_out = "vLLM pads states to a page of attention"
        if (smaller := _block_size_that_pads_less(vllm_config, layers)) is not None:
            way_out += f": give --block-size {smaller}"
        elif vllm_config.cache_config.kv_cache_dtype_skip_layers:
            way_out += ": drop --kv-cache-dtype-skip-layers"
        else:
            way_out += ", and no --block-size pads them less"
    else:
        way_out = _less_padding(vllm_config, settings, layers)
    return (
        f"{100 * share:.1f} % of the KV pool is padding (most of it in pages as layer {layer} has: "
        f"{_content_bytes(spec):,} bytes in {spec.page_size_bytes:,}); {way_out}"
    )


def _block_size_that_pads_less(
    vllm_config: VllmConfig, layers: Mapping[str, KVCacheSpec]
) -> int | None:
    """Return a `--block-size` that makes a shorter block hold a state, or None.

    vLLM makes a block as many of these as a page of attention needs to cover a state.
    """
    specs = list(layers.values())
    attention = [
        spec.real_page_size_bytes / spec.block_size
        for spec in specs
        if isinstance(spec, AttentionSpec)
    ]
    states = [spec.real_page_size_bytes for spec in specs if isinstance(spec, MambaSpec)]
    if not attention or not states:
        return None
    tokens = math.ceil(max(states) / max(attention))
    # On CPUs vLLM takes multiples of 32.
    blocks = {size: -(-tokens // size) * size for size in (128, 64, 32)}
    shortest = min(blocks.values())
    if shortest >= vllm_config.cache_config.block_size:
        return None
    return next(size for size, block in blocks.items() if block == shortest)


def _less_padding(
    vllm_config: VllmConfig, settings: Settings, layers: Mapping[str, KVCacheSpec]
) -> str:
    """Return the setting that reduces padding: `min_waste` wastes no more than other strategies."""
    if settings.unify_page_sizes != "min_waste":
        return "choose unify_page_sizes=min_waste"
    modes = {spec.kv_quant_mode for spec in layers.values() if isinstance(spec, AttentionSpec)}
    if len(modes) > 1:
        if settings.boundary_layers and not vllm_config.model_config.is_hybrid:
            return "set boundary_layers to 0, which quantises the outermost layers too"
        return "quantise all layers: drop --kv-cache-dtype-skip-layers"
    return "no setting avoids it, because no smaller page suits all layers of this model"
