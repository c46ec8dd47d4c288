# SPDX-License-Identifier: Apache-2.0
"""Warnings at start-up: no possible cache hit, an unused cache dtype, much padding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import vllm.platforms
from vllm.config import VllmConfig
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    KVQuantMode,
    MambaSpec,
    get_kv_quant_mode,
    iter_layer_specs,
)

from vllm_hybrid_kv.constants import CACHE_DTYPE
from vllm_hybrid_kv.planning.capacity import blocks_per_request, hits_are_possible, smallest_hit
from vllm_hybrid_kv.planning.page_sizes import content_bytes
from vllm_hybrid_kv.settings import Settings

MOST_PADDING = 0.05
"""Padding above this share of the pool causes a warning."""


def startup_warnings(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    scheduler_block_size: int,
    hash_block_size: int,
    settings: Settings,
    layers: Mapping[str, KVCacheSpec] | None = None,
) -> list[str]:
    """Return one line for each problem of a plan. Each line also says what to change.

    The problems can occur with any strategy, even `stock`. Both block sizes are in tokens, from
    `resolve_kv_cache_block_sizes`. `layers` has the spec of every layer before planning. It may be
    None for a worker's plan, which itself has the spec of every layer.
    """
    if layers is None:
        layers = _specs(kv_cache_config.kv_cache_groups)
    lines = []
    if vllm_config.cache_config.enable_prefix_caching:
        smallest = smallest_hit(vllm_config, kv_cache_config, scheduler_block_size, hash_block_size)
        if not hits_are_possible(vllm_config, smallest):
            lines.append(_useless_prefix_cache(vllm_config, settings, smallest))
    dtype = vllm_config.cache_config.cache_dtype
    if dtype != "auto" and not any(_stores(vllm_config, spec, dtype) for spec in layers.values()):
        lines.append(_unused_cache_dtype(vllm_config, settings, layers))
    if padding_share(vllm_config, kv_cache_config) > MOST_PADDING:
        lines.append(_padded_pool(vllm_config, kv_cache_config, settings, layers))
    return lines


def _set(settings: Settings, field: str, value: object) -> str:
    source = settings.source(field)
    return f"set {source if source.startswith('VLLM_') else field}={value}"


def _specs(groups: Iterable[KVCacheGroupSpec]) -> dict[str, KVCacheSpec]:
    specs: dict[str, KVCacheSpec] = {}
    for group in groups:
        own = dict.fromkeys(group.layer_names, group.kv_cache_spec)
        specs |= getattr(group.kv_cache_spec, "kv_cache_specs", own)
    return specs


def _useless_prefix_cache(vllm_config: VllmConfig, settings: Settings, smallest: int) -> str:
    auto = _set(settings, "prefix_match_unit", "auto")
    finer = "" if settings.prefix_match_unit == "auto" else f"{auto}, "
    return (
        f"prefix caching is on but can never hit: the shortest prompt that can hit has "
        f"{smallest:,} tokens, and with one token of answer it exceeds --max-model-len "
        f"{vllm_config.model_config.max_model_len:,}; {finer}raise --max-model-len above "
        f"{smallest:,}, or pass --no-enable-prefix-caching"
    )


def _unused_cache_dtype(
    vllm_config: VllmConfig, settings: Settings, layers: Mapping[str, KVCacheSpec]
) -> str:
    attention = sum(isinstance(spec, AttentionSpec) for spec in layers.values())
    skipped = vllm_config.cache_config.kv_cache_dtype_skip_layers
    problem = "this model has no attention layer with a KV cache"
    advice = "pass --kv-cache-dtype auto, which stores the same"
    if attention:
        problem = f"none of the {attention} attention layers with a KV cache uses it"
        if skipped:
            quantise = quantise_all(vllm_config, settings)
            advice = f"layers {' '.join(skipped)} are skipped: {quantise}"
    dtype = vllm_config.cache_config.cache_dtype
    return f"--kv-cache-dtype {dtype} has no effect: {problem}; {advice}"


def _stores(vllm_config: VllmConfig, spec: KVCacheSpec, dtype: str) -> bool:
    """Return whether a layer uses the cache dtype, or True if this is uncertain."""
    if not isinstance(spec, AttentionSpec):
        return False
    mode = get_kv_quant_mode(dtype)
    # Some models store fp8 in pages whose torch dtype is fp8, without a quantisation mode.
    plain = mode in (KVQuantMode.NONE, KVQuantMode.FP8_PER_TENSOR)
    return (
        (mode != KVQuantMode.NONE and spec.kv_quant_mode == mode)
        # MLA has its own formats, named by a string.
        or getattr(spec, "cache_dtype_str", None) not in (None, "auto")
        or (plain and spec.dtype == kv_cache_dtype_str_to_dtype(dtype, vllm_config.model_config))
    )


def quantise_all(vllm_config: VllmConfig, settings: Settings) -> str:
    """Advise how to quantise more of the skipped layers."""
    has_boundary = (
        vllm_config.cache_config.cache_dtype == CACHE_DTYPE
        and not vllm_config.model_config.is_hybrid
    )
    if settings.boundary_layers and has_boundary:
        return f"{_set(settings, 'boundary_layers', 0)} to quantise the outermost layers, too"
    return "remove --kv-cache-dtype-skip-layers to quantise all layers"


def padding_share(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> float:
    """Return the share of padding, from 0 to 1, in a pool that is full of the longest requests.

    If a group has fewer layers than the largest group, part of its blocks stays unused. This space
    does not count, because no setting changes it.
    """
    return sum(share for share, _ in _padding_by_group(vllm_config, kv_cache_config))


def _padding_by_group(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
) -> list[tuple[float, KVCacheGroupSpec]]:
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
    return 1 - sum(map(content_bytes, layers)) / sum(layer.page_size_bytes for layer in layers)


def _padded_pool(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    settings: Settings,
    layers: Mapping[str, KVCacheSpec],
) -> str:
    by_group = _padding_by_group(vllm_config, kv_cache_config)
    _, group = max(by_group, key=lambda pair: pair[0])
    layer, spec = max(_specs([group]).items(), key=lambda item: _padding_of_page(item[1]))
    if isinstance(spec, MambaSpec) and getattr(layers.get(layer), "page_size_padded", None):
        advice = _less_padding_of_states(vllm_config, layers)
    else:
        advice = _less_padding(vllm_config, settings, layers)
    share = sum(share for share, _ in by_group)
    return (
        f"{100 * share:.1f} % of the KV pool is padding, most of it in pages like that of layer "
        f"{layer} ({content_bytes(spec):,} of {spec.page_size_bytes:,} bytes used); {advice}"
    )


def _less_padding_of_states(vllm_config: VllmConfig, layers: Mapping[str, KVCacheSpec]) -> str:
    """Advise how to reduce the padding of states that vLLM itself padded.

    vLLM enlarges blocks until a page of attention holds a state, and pads the state to that page.
    """
    attention = [spec for spec in layers.values() if isinstance(spec, AttentionSpec)]
    states = [content_bytes(spec) for spec in layers.values() if isinstance(spec, MambaSpec)]
    if attention and states:
        per_token = max(content_bytes(spec) / spec.block_size for spec in attention)
        tokens = math.ceil(max(states) / per_token)
        # On CPUs, vLLM takes multiples of 32. If several have the same effect, take the largest.
        sizes = {-(-tokens // size) * size: size for size in (32, 64, 128)}
        if min(sizes) < vllm_config.cache_config.block_size:
            size = sizes[min(sizes)]
            return f"pass --block-size {size}, because vLLM pads states to a page of attention"
    if vllm_config.cache_config.kv_cache_dtype_skip_layers:
        return (
            "remove --kv-cache-dtype-skip-layers, because vLLM pads states to the largest page of "
            "attention"
        )
    return (
        "no setting reduces it, because vLLM pads states to a page of attention and no other "
        "--block-size makes that page smaller"
    )


def _less_padding(
    vllm_config: VllmConfig, settings: Settings, layers: Mapping[str, KVCacheSpec]
) -> str:
    """Advise how to reduce padding. No other strategy wastes less than `min_waste`."""
    if settings.unify_page_sizes != "min_waste":
        return _set(settings, "unify_page_sizes", "min_waste")
    modes = {spec.kv_quant_mode for spec in layers.values() if isinstance(spec, AttentionSpec)}
    if len(modes) > 1:
        return quantise_all(vllm_config, settings)
    return "no setting reduces it, because no other page size leaves less padding for these layers"


def own_grouping(vllm_config: VllmConfig | None) -> str | None:
    """Return the platform's builder or the model's class that makes the KV cache groups, or None.

    None means that only vLLM's `get_kv_cache_groups` makes them, as always in vLLM 0.32. Without a
    configuration, only the platform is checked.
    """
    platform = type(vllm.platforms.current_platform)
    if not hasattr(platform, "get_kv_cache_config_builder_cls"):
        return None
    from vllm.v1.core.kv_cache_planning import DefaultKVCacheConfigBuilder

    try:
        name = platform.get_kv_cache_config_builder_cls(vllm_config)
    except Exception:
        # Some platforms cannot choose without a configuration.
        return f"the KV cache config builder that {platform.__module__}.{platform.__name__} chooses"
    builder = resolve_obj_by_qualname(name)
    if builder.get_kv_cache_groups is not DefaultKVCacheConfigBuilder.get_kv_cache_groups:
        return f"the platform's KV cache config builder {name}"
    if vllm_config is not None and vllm_config.model_config.supports_kv_cache_grouping:
        return f"the model's class {vllm_config.model_config.architecture}"
    return None
