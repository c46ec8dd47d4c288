# SPDX-License-Identifier: Apache-2.0
"""Patches that choose the unquantised layers, and check that layers fit their pages."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from vllm.config import (
    ModelConfig,
    VllmConfig,
    get_current_vllm_config,
    get_layers_from_vllm_config,
)
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_hybrid_kv.attention.layer_check import (
    built_layers,
    check_k8v4_layers,
    check_plan,
    check_views,
)
from vllm_hybrid_kv.attention.unsupported import UnsupportedModelError
from vllm_hybrid_kv.constants import CACHE_DTYPE
from vllm_hybrid_kv.patches.context import Context
from vllm_hybrid_kv.patches.mechanism import Patch
from vllm_hybrid_kv.state import STATE

logger = init_logger("vllm.hybrid_kv.attention")


def boundary_patch(context: Context) -> Patch:
    """Let the setting `boundary_layers` replace vLLM's rule in engines with a k8v4 cache."""

    def get_boundary_skip_layers(original: Any, model_config: ModelConfig, n: int = 2) -> Any:
        if (number := STATE.boundary_layers) is None:
            return original(model_config, n)
        if model_config.use_mla:
            context.stop(UnsupportedModelError(model_config.model))
        # vLLM's rule also returns [] for hybrid models. But it first raises an error if the config
        # does not list the attention layers, although it only needs the list for a log line.
        if model_config.is_hybrid:
            return []
        owners = cache_owners(model_config.hf_text_config)
        count = min(number, len(owners) // 2)
        unquantised = list(map(str, [*owners[:count], *owners[len(owners) - count :]]))
        if unquantised:
            logger.info_once(
                "boundary_layers=%d: %d of %d attention layers stay unquantised (%s)",
                *(number, len(unquantised), len(owners), ", ".join(unquantised)),
            )
        return unquantised

    return Patch(
        "boundary_layers",
        replaces="TurboQuantConfig.get_boundary_skip_layers, for engines with a k8v4 cache",
        why="vLLM leaves two layers at each end unquantised, which only its coarser presets need, "
        "and no option changes that; it also counts layers without their own cache, and refuses "
        "some hybrid models",
        upstream="vllm-project/vllm#39931 (no boundary layers in hybrid models), #40108",
        until="vLLM lets users choose it, and counts layers that own a KV cache",
        edits=[
            context.rebind("TurboQuantConfig.get_boundary_skip_layers", get_boundary_skip_layers)
        ],
    )


def cache_owners(text_config: Any) -> list[int]:
    """Return the indices of a model's layers that own a KV cache, from its Hugging Face config.

    Layers without attention own no cache. The last `num_kv_shared_layers` layers of Gemma 3n and
    Gemma 4 use the pages of an earlier layer.
    """
    count = text_config.num_hidden_layers - (getattr(text_config, "num_kv_shared_layers", 0) or 0)
    blocks = getattr(text_config, "block_configs", None) or []
    return [i for i in range(count) if i >= len(blocks) or not _lacks_attention(blocks[i])]


def _lacks_attention(block: Any) -> bool:
    """Return whether a Nemotron-NAS (DeciLM) block has no attention."""
    attention = _get(block, "attention")
    return bool(_get(attention, "no_op") or _get(attention, "replace_with_linear"))


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def layer_dtype_patch(context: Context) -> Patch:
    """Correct the cache dtype of layers that share pages, and the backend of unquantised layers."""

    def init(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        call = inspect.signature(original).bind(self, *args, **kwargs)
        cache_config = call.arguments.get("cache_config")
        if cache_config is not None and cache_config.cache_dtype == CACHE_DTYPE:
            _use_target_dtype(call.arguments)
            _choose_wrapped_backend(self, call.arguments)
        original(*call.args, **call.kwargs)

    return Patch(
        "layer_dtypes",
        replaces="Attention.__init__, for engines with a k8v4 cache",
        why="vLLM chooses a layer's cache dtype by its index, even if the layer reads another's "
        "pages, and chooses the backend of chunked attention as if no layer were skipped",
        upstream="vllm-project/vllm#40108, #48721",
        until="a layer with kv_sharing_target_layer_name has its target's cache dtype",
        edits=[context.rebind("Attention.__init__", init)],
    )


def _use_target_dtype(arguments: dict[str, Any]) -> None:
    """Give a layer that uses another layer's pages the cache dtype of that layer."""
    from vllm.model_executor.models.utils import extract_layer_index

    cache_config = copy.copy(arguments["cache_config"])
    name, target_name = arguments["prefix"], arguments.get("kv_sharing_target_layer_name")
    target = get_current_vllm_config().compilation_config.static_forward_context.get(target_name)
    if target is None or not cache_config.kv_cache_dtype_skip_layers:
        return
    skipped = target.kv_cache_dtype != CACHE_DTYPE
    own = str(extract_layer_index(name))
    if own in cache_config.kv_cache_dtype_skip_layers and not skipped:
        logger.warning(
            "Layer %s uses the KV cache of layer %s and so has its dtype, %s. To leave both "
            "unquantised, pass --kv-cache-dtype-skip-layers %d.",
            name,
            target_name,
            CACHE_DTYPE,
            extract_layer_index(target_name),
        )
    cache_config.kv_cache_dtype_skip_layers = [own] if skipped else []
    arguments["cache_config"] = cache_config


def _choose_wrapped_backend(layer: Any, arguments: dict[str, Any]) -> None:
    """Choose the backend that an unquantised layer's class wraps. By default, it wraps ours.

    Layers with static sinks need no change, because their models choose a backend.
    """
    from vllm.model_executor.layers.attention.chunked_local_attention import (
        ChunkedLocalAttention,
        create_chunked_local_attention_backend,
    )
    from vllm.model_executor.layers.attention.encoder_only_attention import (
        create_encoder_only_attention_backend,
    )
    from vllm.model_executor.layers.attention.prefill_prefix_lm_attention import (
        PrefillPrefixLMAttention,
    )
    from vllm.model_executor.models.utils import extract_layer_index
    from vllm.v1.attention.selector import get_attn_backend

    skipped = arguments["cache_config"].kv_cache_dtype_skip_layers
    if not skipped or not isinstance(layer, ChunkedLocalAttention | PrefillPrefixLMAttention):
        return
    if str(extract_layer_index(arguments["prefix"])) not in skipped:
        return
    backend = get_attn_backend(arguments["head_size"], torch.get_default_dtype(), "auto")
    arguments["attn_backend"] = (
        create_chunked_local_attention_backend(backend, layer.attention_chunk_size)
        if isinstance(layer, ChunkedLocalAttention)
        else create_encoder_only_attention_backend(backend)
    )


def built_model_patch(context: Context) -> Patch:
    """Stop start-up before weights are loaded if the k8v4 cache cannot serve a layer.

    If the checkpoint has scales of keys and values, log that they are not used.
    """

    def initialize_model(original: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Any:
        model = original(vllm_config, *args, **kwargs)
        if vllm_config.cache_config.cache_dtype == CACHE_DTYPE:
            layers = _attention_layers(vllm_config)
            check_k8v4_layers(layers)
            _report_unused_scales(layers)
        return model

    return Patch(
        "built_model",
        replaces="initialize_model, for engines with a k8v4 cache",
        why="vLLM does not check whether a backend can have values of another size than keys, "
        "nor whether the backend that a model chose itself can read the cache; it loads scales "
        "that no k8v4 kernel reads",
        until="vLLM checks every layer's backend against its cache dtype and head sizes",
        edits=[context.rebind("initialize_model", initialize_model)],
    )


def _report_unused_scales(layers: Mapping[str, Any]) -> None:
    """Log one line when vLLM loads a checkpoint's scales of a k8v4 layer."""
    for layer in layers.values():
        if getattr(layer, "kv_cache_dtype", None) != CACHE_DTYPE:
            continue
        for name in ("k_scale", "v_scale"):
            if (scale := getattr(layer, name, None)) is not None:
                load = getattr(scale, "weight_loader", default_weight_loader)
                scale.weight_loader = functools.partial(_load_unused_scale, load)


def _load_unused_scale(load: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    logger.info_once(
        "The checkpoint's KV cache scales (k_scale, v_scale) are not needed and not used: "
        "k8v4 computes a scale for each token and head"
    )
    load(*args, **kwargs)


def layer_pages_patch(context: Context) -> Patch:
    """Stop start-up if the layouts of a layer and of its pages differ.

    Every executor and both model runners call the patched method after the layers are built.
    """

    def initialize_from_config(
        original: Any, self: Any, kv_cache_configs: list[KVCacheConfig]
    ) -> None:
        config = self.vllm_config
        if config.cache_config.cache_dtype != CACHE_DTYPE:
            original(self, kv_cache_configs)
            return
        layers = _attention_layers(config)
        built = built_layers(layers, config)
        check_plan(built, kv_cache_configs[self.global_rank].kv_cache_groups)
        original(self, kv_cache_configs)
        check_views(built, {name: layers[name].kv_cache for name in built})

    return Patch(
        "layer_pages",
        replaces="WorkerWrapperBase.initialize_from_config",
        why="vLLM does not compare layers with the pages that they read and write; a layer "
        "with pages of another layout computes garbage without an error",
        upstream="vllm-project/vllm#40108, #48721",
        until="vLLM compares every layer with its KV cache group",
        edits=[context.rebind("WorkerWrapperBase.initialize_from_config", initialize_from_config)],
    )


def _attention_layers(vllm_config: VllmConfig) -> dict[str, Any]:
    # Cast the type, because mypy does not accept an abstract class here.
    return get_layers_from_vllm_config(vllm_config, cast(Any, AttentionLayerBase))
