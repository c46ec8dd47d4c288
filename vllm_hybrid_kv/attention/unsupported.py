# SPDX-License-Identifier: Apache-2.0
"""What the k8v4 backend cannot serve, said in words before a server starts.

A message ends with the way out that works. What belongs to the whole model cannot be cured by
leaving one layer unquantised: vLLM would start, stop at the next layer, and so on. What belongs
to some layers can, and then all that are alike are named at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.platforms import current_platform

from vllm_hybrid_kv.constants import CACHE_DTYPE
from vllm_hybrid_kv.errors import HybridKVError
from vllm_hybrid_kv.kernels import k8v4

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.v1.attention.selector import AttentionSelectorConfig

SKIP = "--kv-cache-dtype-skip-layers"

MLA = "multi-head latent attention (MLA) has a latent cache of its own"

INSTEAD = "serve the model with --kv-cache-dtype auto"


class Refusal(str):
    """Why a layer cannot be served, and what can be done about it.

    Attributes:
        instead: What to do instead of serving the model as asked.
        skippable: Whether leaving this layer and those like it unquantised does it as well.
    """

    __slots__ = ("instead", "skippable")
    instead: str
    skippable: bool

    def __new__(cls, reason: str, instead: str = INSTEAD, *, skippable: bool = False) -> Refusal:
        """Take the reason as the text."""
        refusal = super().__new__(cls, reason)
        refusal.instead = instead
        refusal.skippable = skippable
        return refusal


class UnsupportedLayerError(HybridKVError):
    """A layer asks for something that the k8v4 cache cannot give."""

    def __init__(self, reason: str, layer: str | None = None) -> None:
        layer = layer or _layer_under_construction()
        refusal = reason if isinstance(reason, Refusal) else Refusal(reason, skippable=True)
        super().__init__(
            f"{layer}: --kv-cache-dtype {CACHE_DTYPE} cannot serve this layer: {reason}. "
            f"{_way_out(layer, refusal)}"
        )


class UnsupportedModelError(HybridKVError):
    """No layer of a model can have a k8v4 cache."""

    def __init__(self, model: str, refusal: Refusal) -> None:
        super().__init__(
            f"model {model}: --kv-cache-dtype {CACHE_DTYPE} cannot serve this model: {refusal}. "
            f"{_sentence(refusal.instead)}"
        )


def refuse_model(model_config: ModelConfig) -> Refusal | None:
    """Return why no layer of a model can have a k8v4 cache, or None.

    Args:
        model_config: vLLM's, known before any layer is built.
    """
    return Refusal(MLA) if model_config.use_mla else None


def _layer_under_construction() -> str:
    """Name the vLLM layer that is being made or asked for its cache.

    vLLM asks for a backend without saying for which layer. The name stands in the frame of the
    layer's own constructor as `prefix`, which some layers only hand on among their `kwargs`, and
    later in the layer itself; this runs only when start-up is about to stop.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        values = frame.f_locals
        names: list[Any] = []
        if frame.f_code.co_name == "__init__":
            handed_on = values.get("kwargs")
            names = [values.get("prefix")]
            names += [handed_on.get("prefix")] if isinstance(handed_on, dict) else []
        elif frame.f_code.co_name == "get_kv_cache_spec":
            names = [values.get("layer_name"), getattr(values.get("self"), "layer_name", None)]
        for name in names:
            if isinstance(name, str) and name:
                return f"layer {name}"
        frame = frame.f_back
    return "an attention layer"


def _way_out(layer: str, refusal: Refusal) -> str:
    indices = [int(part) for part in layer.split(".") if part.isdigit()]
    # vLLM skips by the one number in a layer's name.
    if not refusal.skippable or len(indices) != 1:
        return _sentence(refusal.instead)
    alike = _layers_like(indices[0])
    whom = "the layers of its kind" if len(alike) > 1 else "it"
    skipped = " ".join([*map(str, sorted(alike | _skipped_indices())), *_skipped_kinds()])
    return f"Either keep {whom} unquantised with {SKIP} {skipped}, or {refusal.instead}"


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:]


def _layers_like(index: int) -> set[int]:
    """Return the layers that the model's configuration gives the same type, itself included.

    Where that is all layers, types say nothing of what is odd about this one.
    """
    config = get_current_vllm_config_or_none()
    text_config = getattr(getattr(config, "model_config", None), "hf_text_config", None)
    types = getattr(text_config, "layer_types", None) or []
    if index >= len(types) or len(set(types)) == 1:
        return {index}
    return {other for other, kind in enumerate(types) if kind == types[index]}


def _skipped() -> list[str]:
    # Named again in the advice, for the option replaces what it was given before.
    cache_config = getattr(get_current_vllm_config_or_none(), "cache_config", None)
    return list(getattr(cache_config, "kv_cache_dtype_skip_layers", None) or [])


def _skipped_indices() -> set[int]:
    return {int(name) for name in _skipped() if name.isdigit()}


def _skipped_kinds() -> list[str]:
    return sorted(name for name in _skipped() if not name.isdigit())


def _serve_unquantised(head_size: int) -> str:
    """Say what vLLM's own kernels can do for layers that differ in nothing but this."""
    if not current_platform.is_cpu():
        return f"{INSTEAD} or fp8"
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    listed = CPUAttentionBackend.get_supported_head_sizes()
    if head_size not in listed:
        # It takes some that it does not list, and finds out only with the first request.
        return (
            f"{INSTEAD}, if vLLM's own CPU kernels take heads of {head_size} (they list "
            f"{', '.join(map(str, listed))})"
        )
    # The condition of those kernels for an fp8 cache.
    fp8 = head_size % 32 == 0 and torch.cpu._is_avx512_supported()
    return f"{INSTEAD} or fp8" if fp8 else INSTEAD


def refuse_selection(config: AttentionSelectorConfig) -> Refusal | None:
    """Return why a layer that vLLM selects a backend for cannot have a k8v4 cache.

    Args:
        config: What vLLM knows of the layer: head size, dtype, kind of attention.

    Returns:
        The reason as a `Refusal`, or None if the layer can be served.
    """

    def asks(name: str) -> bool:
        # Both supported vLLM minors have most of these; one that a minor lacks is not asked.
        return bool(getattr(config, name, False))

    for unsupported, reason in (
        (asks("use_mla"), MLA),
        (asks("use_sparse"), "sparse attention selects keys that k8v4 pages do not index"),
        (asks("use_mm_prefix"), "bidirectional attention inside multimodal prefixes"),
        (asks("use_per_head_quant_scales"), "per-head scales from the checkpoint"),
        (asks("use_rswa"), "reference sliding window attention (R-SWA)"),
    ):
        if unsupported:
            return Refusal(reason)
    for parallel in ("decode", "prefill"):
        if asks(f"use_{parallel[0]}cp"):
            return Refusal(
                f"{parallel} context parallelism",
                f"serve the model with --{parallel}-context-parallel-size 1",
            )
    return _refuse_kind(config.attn_type) or _refuse_head_size(config.head_size)


def _refuse_kind(attn_type: str) -> Refusal | None:
    attn_type = str(getattr(attn_type, "value", attn_type))
    if attn_type == "decoder":
        return None
    # vLLM selects the backend of these layers without looking at those to skip.
    return Refusal(f"attention type {attn_type!r} is not decoder self-attention")


def refuse_cache_dtype(kv_cache_dtype: str, head_size: int) -> Refusal:
    """Return why a layer with another cache dtype cannot have this backend.

    The patch of `Attention.__init__` prevents this; skipping more layers would change nothing.

    Args:
        kv_cache_dtype: The layer's.
        head_size: Dims of a head.
    """
    return Refusal(f"its KV cache dtype is {kv_cache_dtype}", _serve_unquantised(head_size))


def refuse_value_size(head_size: int, value_size: int) -> Refusal | None:
    """Return why keys and values of these sizes cannot share k8v4 pages, or None if they can.

    Args:
        head_size: Dims of a key.
        value_size: Dims of a value.
    """
    if value_size == head_size:
        return None
    reason = f"its keys have {head_size} dims and its values {value_size}, k8v4 needs equal sizes"
    return Refusal(reason, _serve_unquantised(head_size))


def refuse_backend(name: str) -> Refusal:
    """Return why a k8v4 layer cannot run on the backend that its model chose.

    Args:
        name: The backend's, as vLLM logs it.
    """
    if "SPARSE" in name:
        return Refusal(f"sparse attention ({name}) selects keys that k8v4 pages do not index")
    return Refusal(f"its model runs it on {name}, which cannot read k8v4 pages")


def _refuse_head_size(head_size: int) -> Refusal | None:
    reason = k8v4.refuse_head_size(head_size)
    if reason is None:
        return None
    odd = any(k8v4.refuse_head_size(size) is None for size in _head_sizes_of_the_model())
    return Refusal(reason, _serve_unquantised(head_size), skippable=odd)


def _head_sizes_of_the_model() -> Iterable[int]:
    """Return the head sizes known while layers are made: the model's and those of layers so far."""
    config = get_current_vllm_config_or_none()
    if config is None or config.model_config is None:
        return set()
    layers = config.compilation_config.static_forward_context.values()
    sizes = {getattr(layer, "head_size", None) for layer in layers}
    sizes.add(config.model_config.get_head_size())
    return {size for size in sizes if isinstance(size, int)}


def refuse_implementation(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    alibi_slopes: list[float] | None,
    attn_type: str,
    extra: dict[str, Any],
) -> str | None:
    """Return why a layer's own parameters rule the k8v4 cache out, as a `Refusal`, or None.

    Args:
        num_heads: Query heads.
        num_kv_heads: KV heads.
        head_size: Dims of a head.
        alibi_slopes: Set for models that bias scores by distance.
        attn_type: vLLM's kind of attention.
        extra: Parameters of the layer that this backend has no meaning for.
    """
    if alibi_slopes is not None:
        # On GPUs only FlashAttention 2 takes ALiBi, and it has no fp8 cache.
        instead = _serve_unquantised(head_size) if current_platform.is_cpu() else INSTEAD
        return Refusal("ALiBi position biases", instead)
    if (refusal := _refuse_kind(attn_type)) is not None:
        return refusal
    if num_heads % num_kv_heads:
        reason = f"{num_heads} query heads are not a multiple of {num_kv_heads} KV heads"
        return Refusal(reason, skippable=True)
    unknown = sorted(name for name, value in extra.items() if value not in (None, False, -1))
    if unknown:
        reason = f"it sets {', '.join(unknown)}, which the k8v4 kernels do not implement"
        return Refusal(reason, skippable=True)
    return _refuse_head_size(head_size)
