# SPDX-License-Identifier: Apache-2.0
"""The patches that keep every attention layer and the pages that it uses in the same layout."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any, cast

import torch
from vllm.config import get_current_vllm_config, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from vllm_hybrid_kv.attention.layer_check import (
    built_layers,
    check_k8v4_layers,
    check_plan,
    check_views,
)
from vllm_hybrid_kv.constants import CACHE_DTYPE
from vllm_hybrid_kv.patches.base import FunctionRebinding, MethodRebinding, Patch, PatchInfo, Target

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger("vllm.hybrid_kv.attention")


def layer_dtype_patch(init_attention: Target) -> Patch:
    """Give layers that share pages their target's cache dtype, and skipped ones a fitting backend.

    Args:
        init_attention: `Attention.__init__`.
    """

    def make(original: Any) -> Any:
        signature = inspect.signature(original)

        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            call = signature.bind(self, *args, **kwargs)
            cache_config = call.arguments.get("cache_config")
            if cache_config is not None and cache_config.cache_dtype == CACHE_DTYPE:
                _follow_target(call.arguments)
                _choose_wrapped_backend(self, call.arguments)
            original(*call.args, **call.kwargs)

        return init

    return Patch(
        "layer_dtypes",
        PatchInfo(
            replaces="Attention.__init__, which it wraps for engines with a k8v4 cache",
            why="vLLM chooses a layer's cache dtype by its own index, though it may read another "
            "layer's pages, and the backend of chunked attention without looking at skipped layers",
            upstream="vllm-project/vllm#40108, #48721",
            until="a layer with kv_sharing_target_layer_name has its target's cache dtype",
        ),
        [MethodRebinding(init_attention, make)],
    )


def _follow_target(arguments: dict[str, Any]) -> None:
    """Have a layer that shares another layer's pages skipped exactly if the other one was."""
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
    """Replace the k8v4 backend that a layer's class wrapped though the layer is left unquantised.

    Static sinks are not among these classes: their models choose a backend themselves.
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


def built_model_patch(initialize_model: Target) -> Patch:
    """Stop start-up, before weights are loaded, if a layer that was built cannot have its cache.

    Args:
        initialize_model: Builds a model, for servers and dry runs.
    """

    def make(original: Any) -> Any:
        def initialize(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Any:
            model = original(vllm_config, *args, **kwargs)
            if vllm_config.cache_config.cache_dtype == CACHE_DTYPE:
                layers = get_layers_from_vllm_config(vllm_config, cast(Any, AttentionLayerBase))
                check_k8v4_layers(layers)
            return model

        return initialize

    return Patch(
        "built_model",
        PatchInfo(
            replaces="initialize_model, which it wraps for engines with a k8v4 cache",
            why="vLLM does not ask a backend about values of another size than keys, nor whether "
            "the backend that a model chose itself can read the cache",
            upstream="none yet",
            until="vLLM checks every layer's backend against its cache dtype and head sizes",
        ),
        [FunctionRebinding(initialize_model, make)],
    )


def layer_pages_patch(initialize_from_config: Target) -> Patch:
    """Stop start-up if a layer's pages have another layout than the layer.

    Args:
        initialize_from_config: `WorkerWrapperBase.initialize_from_config`, where a rank's layers
            and its plan meet, in every executor and for both model runners.
    """

    def make(original: Any) -> Any:
        def initialize(self: Any, kv_cache_configs: list[KVCacheConfig]) -> None:
            config = self.vllm_config
            if config.cache_config.cache_dtype != CACHE_DTYPE:
                original(self, kv_cache_configs)
                return
            # The type is abstract, which mypy does not take.
            layers = get_layers_from_vllm_config(config, cast(Any, AttentionLayerBase))
            built = built_layers(layers, config)
            check_plan(built, kv_cache_configs[self.global_rank].kv_cache_groups)
            original(self, kv_cache_configs)
            check_views(built, {name: layers[name].kv_cache for name in built})

        return initialize

    return Patch(
        "layer_pages",
        PatchInfo(
            replaces="WorkerWrapperBase.initialize_from_config, which it wraps",
            why="vLLM does not compare layers with the pages that they read and write; a layer "
            "with pages of another layout computes garbage without an error",
            upstream="vllm-project/vllm#40108, #48721",
            until="vLLM compares every layer with its KV cache group",
        ),
        [MethodRebinding(initialize_from_config, make)],
    )
