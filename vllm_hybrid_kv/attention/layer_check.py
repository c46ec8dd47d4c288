# SPDX-License-Identifier: Apache-2.0
"""Compares what every attention layer reads and writes with the pages that it was given.

A layer fixes its page layout when it is built: backend, cache dtype, head size, KV heads. Its pages
are planned elsewhere, from the specs of the layers that own a cache. Where the two differ, the
layer would read bytes that mean something else, and nothing later would notice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
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

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheGroupSpec, KVCacheSpec

INSTEAD = (
    "Serve the model with --kv-cache-dtype auto, or with boundary_layers 0 and without "
    "--kv-cache-dtype-skip-layers if layers are left unquantised"
)


class LayerPagesError(HybridKVError):
    """A layer would read or write pages of another layout than its own."""

    def __init__(self, disagreements: Sequence[str]) -> None:
        super().__init__(f"{'; '.join(disagreements)}. {INSTEAD}")


@dataclass(frozen=True)
class BuiltLayer:
    """What an attention layer was built to read and write.

    Attributes:
        backend: Name of its backend.
        cache_dtype: Its KV cache dtype, by vLLM's name.
        spec: The spec of its own pages, packed by its backend. Block size and padding are the
            planner's choice and are not compared.
        target: Name of the layer whose pages it uses; None if it owns its pages.
    """

    backend: str
    cache_dtype: str
    spec: AttentionSpec
    target: str | None = None


def built_layers(layers: Mapping[str, Any], vllm_config: VllmConfig) -> dict[str, BuiltLayer]:
    """Return the attention layers with a KV cache among a rank's layers, by name.

    Args:
        layers: vLLM's layers by name, of the model and of a draft model.
        vllm_config: The engine's.
    """
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
    """Check that every layer that was built for a k8v4 cache can have one.

    vLLM asks no backend about sizes of values, and models may choose a backend themselves.

    Args:
        layers: vLLM's layers by name.

    Raises:
        UnsupportedLayerError: A layer cannot.
    """
    for name, layer in layers.items():
        if getattr(layer, "kv_cache_dtype", None) != CACHE_DTYPE:
            continue
        backend = layer.get_attn_backend().get_name()
        keys, values = (getattr(layer, field, None) for field in ("head_size", "head_size_v"))
        refusal = refuse_value_size(keys, values) if keys and values else None
        if refusal is None and backend != BACKEND:
            refusal = refuse_backend(backend)
        if refusal is not None:
            raise UnsupportedLayerError(refusal, f"layer {name}")


def check_plan(layers: Mapping[str, BuiltLayer], groups: Iterable[KVCacheGroupSpec]) -> None:
    """Compare every layer of a rank with the KV cache group that it reads and writes.

    Args:
        layers: The rank's attention layers by name.
        groups: The rank's KV cache groups. Layers that share pages may be listed or not.

    Raises:
        LayerPagesError: A layer and its pages differ; the message names all such layers.
    """
    planned: dict[str, tuple[KVCacheSpec, str]] = {}
    per_layer: set[str] = set()
    found = []
    for number, group in enumerate(groups):
        for name in group.layer_names:
            owner = (layers[name].target if name in layers else None) or name
            spec = _spec_of(group.kv_cache_spec, owner)
            if spec is None:
                found.append(f"KV cache group {number} lists layer {name} and has no pages for it")
                continue
            planned[name] = (spec, _group_of(name, group, number))
            if isinstance(group.kv_cache_spec, UniformTypeKVCacheSpecs):
                per_layer.add(name)
            if isinstance(spec, AttentionSpec) and name not in layers:
                found.append(f"KV cache group {number} lists layer {name}, which this rank lacks")
    for name, layer in layers.items():
        owner = layer.target or name
        if owner not in planned:
            found.append(f"layer {name} uses the pages of layer {owner}, which has none")
            continue
        spec, place = planned[owner]
        if layer.target is not None:
            place = f"the pages of layer {layer.target}"
            if owner in per_layer:
                # vLLM's model runners look the layer up among the group's specs: a KeyError.
                found.append(
                    f"layer {name} cannot use {place}: vLLM does not share pages in a KV cache "
                    "group whose layers have pages of different sizes, as "
                    "--disable-hybrid-kv-cache-manager makes them"
                )
        differences = _differences(layer, spec)
        if differences:
            found.append(f"layer {name} cannot use {place}: {', '.join(differences)}")
    if found:
        raise LayerPagesError(found)


def check_views(layers: Mapping[str, BuiltLayer], caches: Mapping[str, torch.Tensor]) -> None:
    """Compare k8v4 layers' tensors with the k8v4 layout, and shared tensors with each other.

    Args:
        layers: The rank's attention layers by name.
        caches: The tensor of each layer's pages, [blocks, KV heads, block size, slot] for k8v4.

    Raises:
        LayerPagesError: A tensor has another layout; the message has the numbers.
    """
    found = []
    for name, layer in layers.items():
        cache, spec = caches[name], layer.spec
        if layer.cache_dtype == CACHE_DTYPE:
            slot = k8v4.slot_bytes(spec.head_size)
            shape = tuple(cache.shape)
            if (
                str(cache.dtype) != "torch.uint8"
                or len(shape) != 4
                or (shape[1], shape[3]) != (spec.num_kv_heads, slot)
                or shape[2] % k8v4.TILE_TOKENS
                or cache.stride()[2:] != (slot, 1)
            ):
                found.append(
                    f"layer {name} got a {cache.dtype} cache of shape {list(shape)} and strides "
                    f"{list(cache.stride())}; its pages are uint8 [blocks, {spec.num_kv_heads}, "
                    f"a multiple of {k8v4.TILE_TOKENS}, {slot}]"
                )
        if (chunk := getattr(spec, "attention_chunk_size", None)) and chunk % cache.shape[2]:
            found.append(
                f"layer {name} attends to chunks of {chunk} tokens, and its block of "
                f"{cache.shape[2]} tokens does not divide them"
            )
        if layer.target is not None:
            ours, targets = _place(cache), _place(caches[layer.target])
            if ours != targets:
                found.append(
                    f"layer {name} got the pages {ours}, and layer {layer.target}, whose pages it "
                    f"uses, got {targets}"
                )
    if found:
        raise LayerPagesError(found)


def _spec_of(spec: KVCacheSpec, owner: str) -> KVCacheSpec | None:
    return spec.kv_cache_specs.get(owner) if isinstance(spec, UniformTypeKVCacheSpecs) else spec


def _group_of(name: str, group: KVCacheGroupSpec, number: int) -> str:
    other = next((other for other in group.layer_names if other != name), None)
    with_whom = "" if other is None else f", which it shares with layer {other}"
    return f"the pages of KV cache group {number}{with_whom}"


def _differences(layer: BuiltLayer, planned: KVCacheSpec) -> list[str]:
    """Say how a layer's own pages differ from the planned ones, its own value first."""
    own = layer.spec
    found = []
    ours = layer.cache_dtype == CACHE_DTYPE
    if (layer.backend == BACKEND) != ours:
        found.append(f"its backend is {layer.backend} and its cache dtype {layer.cache_dtype}")
    if not isinstance(planned, AttentionSpec):
        kind = type(planned).__name__
        return [*found, f"it is an attention layer and they are planned by a {kind}"]
    if own.kv_quant_mode != planned.kv_quant_mode:
        found.append(
            f"its cache dtype is {layer.cache_dtype} ({own.kv_quant_mode.name}), theirs is "
            f"{planned.kv_quant_mode.name}"
        )
    for what, mine, theirs in (
        ("torch dtype", own.dtype, planned.dtype),
        ("head size", own.head_size, planned.head_size),
        ("head size of values", own.head_size_v, planned.head_size_v),
        ("number of KV heads", own.num_kv_heads, planned.num_kv_heads),
        ("number of head slots", own.num_heads, planned.num_heads),
        ("slot", _slot(own), _slot(planned)),
        ("page", _page(own, planned), _page(planned, planned)),
    ):
        if mine != theirs:
            found.append(f"its {what} is {mine}, theirs is {theirs}")
    if not _keeps_enough(own, planned):
        found.append(f"it attends to {_reach(own)}, they keep {_reach(planned)}")
    if ours and planned.block_size % k8v4.TILE_TOKENS:
        found.append(
            f"its block is a multiple of {k8v4.TILE_TOKENS} tokens, theirs has {planned.block_size}"
        )
    return found


def _slot(spec: AttentionSpec) -> str:
    return f"{spec.state_content_size_bytes} bytes for {spec.tokens_per_state} tokens"


def _page(spec: AttentionSpec, planned: AttentionSpec) -> str:
    states = planned.block_size // spec.tokens_per_state
    size = spec.num_heads * states * spec.state_content_size_bytes
    return f"{size} bytes for {planned.block_size} tokens"


def _keeps_enough(own: AttentionSpec, planned: AttentionSpec) -> bool:
    """Whether the planned pages keep every token that the layer attends to."""
    if isinstance(planned, ChunkedLocalAttentionSpec):
        return _reach(own) == _reach(planned)
    if isinstance(planned, SlidingWindowSpec):
        mine = getattr(own, "sliding_window", None) or getattr(own, "attention_chunk_size", None)
        return mine is not None and mine <= planned.sliding_window
    return True


def _reach(spec: AttentionSpec) -> str:
    if isinstance(spec, ChunkedLocalAttentionSpec):
        return f"chunks of {spec.attention_chunk_size} tokens"
    if isinstance(spec, SlidingWindowSpec):
        return f"a window of {spec.sliding_window} tokens"
    return "all tokens"


def _place(cache: Any) -> str:
    return f"{list(cache.shape)} at {cache.data_ptr():#x}"
