# SPDX-License-Identifier: Apache-2.0
"""Checks that every attention layer gets pages of the layout that the layer was built for.

A layer fixes its page layout when it is built. Its pages are planned from the specs of the layers
that own a cache. If the two layouts differ, the layer misreads its pages without an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    KVCacheGroupSpec,
    KVCacheSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.worker.utils import customize_attention_spec

from vllm_hybrid_kv.attention.unsupported import (
    UnsupportedLayerError,
    refuse_backend,
    refuse_value_size,
)
from vllm_hybrid_kv.constants import BACKEND, CACHE_DTYPE
from vllm_hybrid_kv.errors import HybridKVError
from vllm_hybrid_kv.kernels import k8v4

ADVICE = (
    "Serve the model with --kv-cache-dtype auto or, if layers are left unquantised, "
    "set boundary_layers=0 and remove --kv-cache-dtype-skip-layers"
)


LAYOUT = {
    "quantisation": "kv_quant_mode",
    "torch dtype": "dtype",
    "head size": "head_size",
    "head size of values": "head_size_v",
    "number of KV heads": "num_kv_heads",
    "number of head slots": "num_heads",
    "slot size in bytes": "state_content_size_bytes",
    "number of tokens in a slot": "tokens_per_state",
}
"""Each property of a page's layout: its name in messages, and the attribute of the spec."""


class LayerPagesError(HybridKVError):
    """A layer would read or write pages whose layout differs from its own."""

    def __init__(self, disagreements: Sequence[str]) -> None:
        super().__init__(f"{'; '.join(disagreements)}. {ADVICE}")


@dataclass(frozen=True)
class BuiltLayer:
    """The backend and the page layout with which an attention layer was built.

    Attributes:
        backend: Name of its backend.
        cache_dtype: Its KV cache dtype, by vLLM's name.
        spec: The spec that the layer expects. Its pages may have another block size and padding.
        target: Name of the layer whose pages it uses, or None if it owns its pages.
    """

    backend: str
    cache_dtype: str
    spec: AttentionSpec
    target: str | None = None


def built_layers(layers: Mapping[str, Any], vllm_config: VllmConfig) -> dict[str, BuiltLayer]:
    """Describe the attention layers of a rank that have a KV cache, including draft layers."""
    built = {}
    for name, layer in layers.items():
        spec = layer.get_kv_cache_spec(vllm_config)
        if not isinstance(spec, AttentionSpec):
            continue
        backend = layer.get_attn_backend()
        built[name] = BuiltLayer(
            backend.get_name(),
            str(getattr(layer, "kv_cache_dtype", "auto")),
            customize_attention_spec(backend, spec),
            getattr(layer, "kv_sharing_target_layer_name", None),
        )
    return built


def check_k8v4_layers(layers: Mapping[str, Any]) -> None:
    """Check that the k8v4 kernels can serve every layer that was built for a k8v4 cache.

    vLLM does not check that values are as large as keys, or that a backend that a model chose can
    read k8v4 pages.

    Raises:
        UnsupportedLayerError: A layer cannot have a k8v4 cache.
    """
    for name, layer in layers.items():
        if getattr(layer, "kv_cache_dtype", None) != CACHE_DTYPE:
            continue
        keys, values = (getattr(layer, field, None) for field in ("head_size", "head_size_v"))
        if keys and values and keys != values:
            raise UnsupportedLayerError(refuse_value_size(keys, values), f"layer {name}")
        if (backend := layer.get_attn_backend().get_name()) != BACKEND:
            raise UnsupportedLayerError(refuse_backend(backend), f"layer {name}")


def check_plan(layers: Mapping[str, BuiltLayer], groups: Iterable[KVCacheGroupSpec]) -> None:
    """Compare every layer of a rank with the KV cache group that it reads and writes.

    The groups need not list the layers that use another layer's pages.

    Raises:
        LayerPagesError: A layer and its pages differ. The message names all such layers.
    """
    planned: dict[str, tuple[KVCacheSpec, str]] = {}
    per_layer: set[str] = set()
    problems = []
    for number, group in enumerate(groups):
        specs = dict.fromkeys(group.layer_names, group.kv_cache_spec)
        if isinstance(group.kv_cache_spec, UniformTypeKVCacheSpecs):
            specs = group.kv_cache_spec.kv_cache_specs
            per_layer.update(specs)
        for name, spec in specs.items():
            other = next((other for other in specs if other != name), None)
            shared = f", which it shares with layer {other}" if other else ""
            planned[name] = (spec, f"the pages of KV cache group {number}{shared}")
            if isinstance(spec, AttentionSpec) and name not in layers:
                problems.append(
                    f"KV cache group {number} lists layer {name}, which this rank lacks"
                )
    for name, layer in layers.items():
        owner = layer.target or name
        if owner not in planned:
            problems.append(f"layer {name} uses the pages of layer {owner}, which has none")
            continue
        spec, pages = planned[owner]
        differences = _differences(layer, spec)
        if layer.target is not None:
            pages = f"the pages of layer {owner}"
            if owner in per_layer:
                # vLLM's model runners would look up this layer in the group's specs and fail.
                differences.append(
                    "vLLM does not share pages in a KV cache group whose layers have pages of "
                    "different sizes, as with --disable-hybrid-kv-cache-manager"
                )
        if differences:
            problems.append(f"layer {name} cannot use {pages}: {', '.join(differences)}")
    if problems:
        raise LayerPagesError(problems)


def check_views(layers: Mapping[str, BuiltLayer], caches: Mapping[str, torch.Tensor]) -> None:
    """Check that k8v4 layers got k8v4 tensors, and that layers which share pages got one tensor.

    `caches` has each layer's tensor. For a k8v4 layer, it must be uint8 [blocks, KV heads, block
    size, slot]. A layer that uses another layer's pages must have that layer's tensor.

    Raises:
        LayerPagesError: A tensor has another layout. The message contains both layouts.
    """
    problems = []
    for name, layer in layers.items():
        cache, spec = caches[name], layer.spec
        quantised = layer.cache_dtype == CACHE_DTYPE
        # Unquantised layers may have head sizes that `slot_bytes` rejects, so it is not called.
        slot = k8v4.slot_bytes(spec.head_size) if quantised else 0
        if quantised and (
            cache.dtype != torch.uint8
            or cache.dim() != 4
            or (cache.shape[1], cache.shape[3]) != (spec.num_kv_heads, slot)
            or cache.shape[2] % k8v4.TILE_TOKENS
            or cache.stride()[2:] != (slot, 1)
        ):
            problems.append(
                f"layer {name} got a {cache.dtype} cache of shape {list(cache.shape)} and strides "
                f"{list(cache.stride())}; its pages are uint8 [blocks, {spec.num_kv_heads}, "
                f"a multiple of {k8v4.TILE_TOKENS}, {slot}]"
            )
        if (chunk := getattr(spec, "attention_chunk_size", None)) and chunk % cache.shape[2]:
            problems.append(
                f"layer {name} attends to chunks of {chunk} tokens, and its block of "
                f"{cache.shape[2]} tokens does not divide them"
            )
        own, shared = _location(cache), _location(caches[layer.target or name])
        if own != shared:
            problems.append(
                f"layer {name} got the pages {own}, and layer {layer.target}, whose pages it uses, "
                f"got {shared}"
            )
    if problems:
        raise LayerPagesError(problems)


def _location(cache: torch.Tensor) -> str:
    return f"{list(cache.shape)} at {cache.data_ptr():#x}"


def _differences(layer: BuiltLayer, planned: KVCacheSpec) -> list[str]:
    own = layer.spec
    found = []
    is_k8v4 = layer.cache_dtype == CACHE_DTYPE
    if (layer.backend == BACKEND) != is_k8v4:
        found.append(f"its backend is {layer.backend} and its cache dtype {layer.cache_dtype}")
    if not isinstance(planned, AttentionSpec):
        kind = type(planned).__name__
        return [*found, f"it is an attention layer, and its pages are planned by a {kind}"]
    for what, attribute in LAYOUT.items():
        mine, pages = (getattr(spec, attribute) for spec in (own, planned))
        if mine != pages:
            mine, pages = (getattr(value, "name", value) for value in (mine, pages))
            found.append(f"its {what} is {mine}, that of the pages is {pages}")
    if not _keeps_enough(own, planned):
        found.append(f"it attends to {_reach(own)}, the pages keep {_reach(planned)}")
    if is_k8v4 and planned.block_size % k8v4.TILE_TOKENS:
        found.append(
            f"its block must be a multiple of {k8v4.TILE_TOKENS} tokens, that of the pages has "
            f"{planned.block_size}"
        )
    return found


def _keeps_enough(own: AttentionSpec, planned: AttentionSpec) -> bool:
    """Return whether the planned pages keep every token that the layer attends to."""
    if isinstance(planned, SlidingWindowSpec):
        mine = getattr(own, "sliding_window", None) or getattr(own, "attention_chunk_size", None)
        return mine is not None and mine <= planned.sliding_window
    return not isinstance(planned, ChunkedLocalAttentionSpec) or _reach(own) == _reach(planned)


def _reach(spec: AttentionSpec) -> str:
    if isinstance(spec, ChunkedLocalAttentionSpec):
        return f"chunks of {spec.attention_chunk_size} tokens"
    if isinstance(spec, SlidingWindowSpec):
        return f"a window of {spec.sliding_window} tokens"
    return "all tokens"
