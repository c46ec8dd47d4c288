# SPDX-License-Identifier: Apache-2.0
"""Warnings at start-up: no possible cache hit, an unused cache dtype, much padding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import vllm.platforms
from vllm.utils.import_utils import resolve_obj_by_qualname
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

from vllm_hybrid_kv.constants import CACHE_DTYPE
from vllm_hybrid_kv.planning.capacity import blocks_per_request
from vllm_hybrid_kv.planning.smallest_hit import hits_are_possible, smallest_hit

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_hybrid_kv.settings import Settings

MOST_PADDING = 0.05
"""The share of the pool above which padding is reported."""


def startup_warnings(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    scheduler_block_size: int,
    hash_block_size: int,
    settings: Settings,
    layers: Mapping[str, KVCacheSpec] | None = None,
) -> list[str]:
    """Return one line for each problem of a plan, with what to change.

    The problems also occur without the plugin's strategies.

    Args:
        vllm_config: The engine's configuration.
        kv_cache_config: The plan.
        scheduler_block_size: Tokens, from `resolve_kv_cache_block_sizes`.
        hash_block_size: The match unit in tokens, from the same function.
        settings: The plugin's settings.
        layers: The spec of every layer by name before planning. Required for the scheduler's plan,
            which has only one spec for each group. None takes the specs of a worker's plan.
    """
    if layers is None:
        layers = _specs(kv_cache_config.kv_cache_groups)
    sizes = scheduler_block_size, hash_block_size
    lines = (
        _useless_prefix_cache(vllm_config, kv_cache_config, sizes, settings),
        _unused_cache_dtype(vllm_config, settings, layers),
        _padded_pool(vllm_config, kv_cache_config, settings, layers),
    )
    return [line for line in lines if line is not None]


def _set(settings: Settings, field: str, value: object) -> str:
    source = settings.source(field)
    return f"set {source if source.startswith('VLLM_') else field}={value}"


def _useless_prefix_cache(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    sizes: tuple[int, int],
    settings: Settings,
) -> str | None:
    if not vllm_config.cache_config.enable_prefix_caching:
        return None
    smallest = smallest_hit(vllm_config, kv_cache_config, *sizes)
    if hits_are_possible(vllm_config, smallest):
        return None
    auto = _set(settings, "prefix_match_unit", "auto")
    finer = "" if settings.prefix_match_unit == "auto" else f"{auto}, "
    return (
        f"prefix caching is on but can never hit: the shortest prompt that can hit has "
        f"{smallest:,} tokens, and with one token of answer it exceeds --max-model-len "
        f"{vllm_config.model_config.max_model_len:,}; {finer}raise --max-model-len above "
        f"{smallest:,}, or pass --no-enable-prefix-caching"
    )


def _specs(groups: Iterable[KVCacheGroupSpec]) -> dict[str, KVCacheSpec]:
    """Return the spec of every layer of some groups by the layer's name."""
    specs: dict[str, KVCacheSpec] = {}
    for group in groups:
        if isinstance(group.kv_cache_spec, UniformTypeKVCacheSpecs):
            specs.update(group.kv_cache_spec.kv_cache_specs)
        else:
            specs.update(dict.fromkeys(group.layer_names, group.kv_cache_spec))
    return specs


def _unused_cache_dtype(
    vllm_config: VllmConfig, settings: Settings, layers: Mapping[str, KVCacheSpec]
) -> str | None:
    dtype = vllm_config.cache_config.cache_dtype
    if dtype == "auto" or any(_stores(vllm_config, spec, dtype) for spec in layers.values()):
        return None
    attention = sum(isinstance(spec, AttentionSpec) for spec in layers.values())
    skipped = vllm_config.cache_config.kv_cache_dtype_skip_layers
    advice = "pass --kv-cache-dtype auto, which stores the same"
    if skipped and attention:
        advice = f"layers {' '.join(skipped)} are skipped: {_quantise_all(vllm_config, settings)}"
    problem = (
        f"none of the {attention} attention layers with a KV cache uses it"
        if attention
        else "this model has no attention layer with a KV cache"
    )
    return f"--kv-cache-dtype {dtype} has no effect: {problem}; {advice}"


def _stores(vllm_config: VllmConfig, spec: KVCacheSpec, dtype: str) -> bool:
    """Return whether a layer uses the cache dtype; True in doubt."""
    if not isinstance(spec, AttentionSpec):
        return False
    mode = get_kv_quant_mode(dtype)
    if mode != KVQuantMode.NONE and spec.kv_quant_mode == mode:
        return True
    # MLA has its own formats, named by a string.
    if getattr(spec, "cache_dtype_str", None) not in (None, "auto"):
        return True
    # Some models store fp8 in pages of that torch dtype without a quantisation mode.
    stored = kv_cache_dtype_str_to_dtype(dtype, vllm_config.model_config)
    return mode in (KVQuantMode.NONE, KVQuantMode.FP8_PER_TENSOR) and bool(spec.dtype == stored)


def _quantise_all(vllm_config: VllmConfig, settings: Settings) -> str:
    """Return the option that quantises more of the skipped layers."""
    has_boundary = (
        vllm_config.cache_config.cache_dtype == CACHE_DTYPE
        and not vllm_config.model_config.is_hybrid
    )
    if settings.boundary_layers and has_boundary:
        return f"{_set(settings, 'boundary_layers', 0)} to quantise the outermost layers, too"
    return "remove --kv-cache-dtype-skip-layers to quantise all layers"


def padding_share(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> float:
    """Return the share of the pool, from 0 to 1, that is padding of pages.

    The pool is full of requests of `max_model_len`: each group's pages count by the blocks that
    such a request holds of it. If a group has fewer layers than the largest group, its unused
    space does not count, because no setting changes that.
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
    page = sum(layer.page_size_bytes for layer in layers)
    return 1 - sum(map(content_bytes, layers)) / page


def content_bytes(spec: KVCacheSpec) -> int:
    """Return the bytes of a page that hold tokens or a state, without padding."""
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
    layer, spec = max(_specs([group]).items(), key=lambda item: _padding_of_page(item[1]))
    if isinstance(spec, MambaSpec) and getattr(layers.get(layer), "page_size_padded", None):
        advice = _less_padding_of_states(vllm_config, layers)
    else:
        advice = _less_padding(vllm_config, settings, layers)
    return (
        f"{100 * share:.1f} % of the KV pool is padding, most of it in pages like that of layer "
        f"{layer} ({content_bytes(spec):,} of {spec.page_size_bytes:,} bytes used); {advice}"
    )


def _less_padding_of_states(vllm_config: VllmConfig, layers: Mapping[str, KVCacheSpec]) -> str:
    """Return what reduces the padding of states that vLLM itself padded."""
    if (smaller := _block_size_that_pads_less(vllm_config, layers)) is not None:
        return f"pass --block-size {smaller}, because vLLM pads states to a page of attention"
    if vllm_config.cache_config.kv_cache_dtype_skip_layers:
        return (
            "remove --kv-cache-dtype-skip-layers, because vLLM pads states to the largest page of "
            "attention"
        )
    return "vLLM pads states to a page of attention, and no --block-size makes that page smaller"


def _block_size_that_pads_less(
    vllm_config: VllmConfig, layers: Mapping[str, KVCacheSpec]
) -> int | None:
    """Return a `--block-size` that makes the blocks that hold a state shorter, or None.

    vLLM multiplies the block until a page of attention covers a state.
    """
    attention = [
        spec.real_page_size_bytes / spec.block_size
        for spec in layers.values()
        if isinstance(spec, AttentionSpec)
    ]
    states = [spec.real_page_size_bytes for spec in layers.values() if isinstance(spec, MambaSpec)]
    if not attention or not states:
        return None
    tokens = math.ceil(max(states) / max(attention))
    # On CPUs vLLM takes multiples of 32. Of equal blocks the first size is advised.
    block, size = min((-(-tokens // size) * size, -size) for size in (128, 64, 32))
    return -size if block < vllm_config.cache_config.block_size else None


def _less_padding(
    vllm_config: VllmConfig, settings: Settings, layers: Mapping[str, KVCacheSpec]
) -> str:
    """Return what reduces padding: `min_waste` wastes no more than other strategies."""
    if settings.unify_page_sizes != "min_waste":
        return _set(settings, "unify_page_sizes", "min_waste")
    modes = {spec.kv_quant_mode for spec in layers.values() if isinstance(spec, AttentionSpec)}
    if len(modes) > 1:
        return _quantise_all(vllm_config, settings)
    return "no other page size leaves less padding for the layers of this model"


def own_grouping(vllm_config: VllmConfig | None) -> str | None:
    """Return what makes the KV cache groups instead of vLLM's `get_kv_cache_groups`.

    It may still call vLLM's function; whether it did is known only after planning.

    Args:
        vllm_config: The engine's configuration. None checks the platform only.

    Returns:
        The platform's builder or the model's class; None if vLLM groups the layers, as vLLM 0.32
        always does.
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
