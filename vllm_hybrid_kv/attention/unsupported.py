# SPDX-License-Identifier: Apache-2.0
"""Refuses layers and models that a k8v4 cache cannot serve, before a server starts.

Each message ends with advice that works. If the model can be served with some layers unquantised,
the advice lists all of these layers. If every layer has the problem, it names other cache dtypes.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, NamedTuple

import torch
from vllm import triton_utils
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.platforms import current_platform

from vllm_hybrid_kv.constants import CACHE_DTYPE
from vllm_hybrid_kv.errors import HybridKVError
from vllm_hybrid_kv.kernels import k8v4

ADVICE = "serve the model with --kv-cache-dtype auto"

WITHOUT_DCP = "serve the model with --decode-context-parallel-size 1"


class Refusal(NamedTuple):
    """Why a layer cannot be served, and what to do.

    If `skippable`, the model can be served with all layers of this type unquantised.
    """

    reason: str
    advice: str = ADVICE
    skippable: bool = False


def _not_implemented(feature: str, advice: str = ADVICE) -> Refusal:
    return Refusal(f"the k8v4 kernels do not implement {feature}", advice)


REFUSED = {
    "use_mla": Refusal("multi-head latent attention (MLA) has its own latent cache"),
    "use_sparse": _not_implemented("sparse attention"),
    "use_mm_prefix": _not_implemented("bidirectional attention inside multimodal prefixes"),
    "use_rswa": _not_implemented("reference sliding window attention (R-SWA)"),
    "use_pcp": _not_implemented(
        "prefill context parallelism", "serve the model with --prefill-context-parallel-size 1"
    ),
}
"""Why a layer is refused if it sets a field of vLLM's `AttentionSelectorConfig`, by field."""


class UnsupportedLayerError(HybridKVError):
    """The k8v4 cache cannot serve a layer."""

    def __init__(self, refusal: Refusal, layer: str | None = None) -> None:
        layer = layer or _layer_under_construction()
        super().__init__(
            f"{layer}: --kv-cache-dtype {CACHE_DTYPE} cannot serve this layer: {refusal.reason}. "
            f"{_advice_for(layer, refusal)}"
        )


class UnsupportedModelError(HybridKVError):
    """The k8v4 cache cannot serve a model with MLA."""

    def __init__(self, model: str) -> None:
        refusal = REFUSED["use_mla"]
        super().__init__(
            f"model {model}: --kv-cache-dtype {CACHE_DTYPE} cannot serve this model: "
            f"{refusal.reason}. {_sentence(refusal.advice)}"
        )


def refuse_selection(config: Any) -> Refusal | None:
    """Return why a layer with this `AttentionSelectorConfig` cannot have a k8v4 cache, or None."""
    for field, refusal in REFUSED.items():
        # Each vLLM minor lacks some of the fields, so they need a default.
        if getattr(config, field, False):
            return refusal
    without_triton = current_platform.is_cpu() and not triton_utils.HAS_TRITON
    if getattr(config, "use_dcp", False) and without_triton:
        reason = "decode context parallelism needs Triton, which vLLM disables on this CPU"
        return Refusal(reason, WITHOUT_DCP)
    return _refuse_type(config.attn_type) or _refuse_head_size(config.head_size)


def refuse_implementation(
    *,
    kv_cache_dtype: str,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    alibi_slopes: list[float] | None,
    attn_type: str,
    extra: dict[str, Any],
) -> Refusal | None:
    """Return why a layer's parameters rule out a k8v4 cache, or None.

    Parameters are named as in vLLM. `extra` has the ones that this backend does not implement.
    """
    if kv_cache_dtype != CACHE_DTYPE:
        # `layer_dtype_patch` should have given this unquantised layer another backend. Leaving more
        # layers unquantised would cause the same error.
        reason = f"its KV cache dtype is {kv_cache_dtype}, but the k8v4 backend was selected for it"
        return Refusal(reason, _serve_unquantised(head_size))
    if alibi_slopes is not None:
        # On GPUs only FlashAttention 2 supports ALiBi, and it cannot read an fp8 cache.
        advice = _serve_unquantised(head_size) if current_platform.is_cpu() else ADVICE
        return _not_implemented("ALiBi position biases", advice)
    if (refusal := _refuse_type(attn_type)) is not None:
        return refusal
    if num_heads % num_kv_heads:
        reason = f"{num_heads} query heads are not a multiple of {num_kv_heads} KV heads"
        return Refusal(reason, skippable=True)
    if unknown := sorted(name for name, value in extra.items() if value not in (None, False, -1)):
        reason = f"it sets {', '.join(unknown)}, which the k8v4 kernels do not implement"
        return Refusal(reason, skippable=True)
    return _refuse_head_size(head_size)


def refuse_context_parallel(size: int, *, head_size: int, window: int | None) -> Refusal | None:
    """Return why a layer cannot have its pages on `size` context parallel ranks, or None."""
    if size == 1:
        return None
    with_dcp = "with decode context parallelism"
    if window is not None:
        # vLLM's ranks store tokens in turn, so a window is no range of a rank's tokens.
        return Refusal(f"it has a sliding window, which is not supported {with_dcp}", WITHOUT_DCP)
    for name, number in (("head size", head_size), ("number of ranks", size)):
        if number & (number - 1):
            return Refusal(
                f"{with_dcp} vLLM's kernels need a {name} that is a power of two, not {number}",
                WITHOUT_DCP,
            )
    return None


def refuse_sharding(ranks: int, planned: int) -> Refusal | None:
    """Return why a layer that attends on `ranks` context parallel ranks cannot use its pages.

    `planned` is the number of ranks among which the plan divides the sequences of the pages.
    """
    if ranks == planned:
        return None
    reason = (
        f"it attends to pages of {ranks} context parallel ranks, but its pages are planned for "
        f"{planned}"
    )
    return Refusal(reason, WITHOUT_DCP)


def refuse_value_size(head_size: int, value_size: int) -> Refusal:
    """Say why a layer whose keys and values differ in size (in dims) cannot have k8v4 pages."""
    sizes = f"its keys have {head_size} dims and its values {value_size}"
    return Refusal(f"{sizes}, but k8v4 pages need equal sizes", _serve_unquantised(head_size))


def refuse_backend(name: str) -> Refusal:
    """Return why a k8v4 layer cannot run on the backend that its model chose."""
    if "SPARSE" in name:
        return _not_implemented(f"sparse attention ({name})")
    return Refusal(f"its model runs it on {name}, which cannot read k8v4 pages")


def _refuse_type(attn_type: str) -> Refusal | None:
    attn_type = str(getattr(attn_type, "value", attn_type))
    if attn_type == "decoder":
        return None
    # Skipping the layer would not help: vLLM would still select a backend for this type.
    return Refusal(f"attention type {attn_type!r} is not decoder self-attention")


def _refuse_head_size(head_size: int) -> Refusal | None:
    reason = k8v4.unsupported_head_size(head_size)
    if reason is None:
        return None
    others_fit = any(k8v4.unsupported_head_size(size) is None for size in _head_sizes())
    skippable = others_fit and (not current_platform.is_cpu() or head_size in _cpu_head_sizes())
    return Refusal(reason, _serve_unquantised(head_size), skippable=skippable)


def _head_sizes() -> list[int]:
    """Return the head size of the model's configuration, and those of the layers built so far."""
    config = get_current_vllm_config_or_none()
    if config is None or config.model_config is None:
        return []
    layers = config.compilation_config.static_forward_context.values()
    sizes = [getattr(layer, "head_size", None) for layer in layers]
    return [size for size in sizes if size] + [config.model_config.get_head_size()]


def _serve_unquantised(head_size: int) -> str:
    """Advise a cache dtype with which vLLM's own kernels can serve heads of this size."""
    if not current_platform.is_cpu():
        return f"{ADVICE} or fp8"
    if head_size not in _cpu_head_sizes():
        sizes = ", ".join(map(str, _cpu_head_sizes()))
        return f"serve the model on a GPU: vLLM's own CPU kernels only take heads of {sizes}"
    # vLLM's CPU kernels take an fp8 cache only with AVX-512, and for these head sizes.
    fp8 = head_size % 32 == 0 and torch.cpu._is_avx512_supported()
    return f"{ADVICE} or fp8" if fp8 else ADVICE


def _cpu_head_sizes() -> list[int]:
    """Return the head sizes of vLLM's CPU kernels. `CPUAttentionBackend` does not list 48."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return sorted({48, *CPUAttentionBackend.get_supported_head_sizes()})


def _layer_under_construction() -> str:
    """Return the name of the vLLM layer that is being built, or whose cache is being planned.

    vLLM selects a backend without the layer's name, so search the call stack for the name. It is
    the argument `prefix` of a constructor, or the `layer_name` in `get_kv_cache_spec`.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        values, name = frame.f_locals, None
        if frame.f_code.co_name == "__init__":
            name = values.get("prefix") or dict(values.get("kwargs") or {}).get("prefix")
        elif frame.f_code.co_name == "get_kv_cache_spec":
            name = values.get("layer_name") or getattr(values.get("self"), "layer_name", None)
        if name and isinstance(name, str):
            return f"layer {name}"
        frame = frame.f_back
    return "an attention layer"


def _advice_for(layer: str, refusal: Refusal) -> str:
    numbers = [int(part) for part in layer.split(".") if part.isdigit()]
    # vLLM skips layers by the number in their names, so a name must have exactly one number.
    if not refusal.skippable or len(numbers) != 1:
        return _sentence(refusal.advice)
    config = get_current_vllm_config_or_none()
    alike = _layers_like(numbers[0], config)
    which = "the layers of its type" if len(alike) > 1 else "it"
    # The advised option replaces the user's option, so repeat the layers that are already skipped.
    skipped = config.cache_config.kv_cache_dtype_skip_layers if config else []
    indices = sorted(alike.union(int(name) for name in skipped if name.isdigit()))
    types = sorted(name for name in skipped if not name.isdigit())
    names = " ".join(map(str, [*indices, *types]))
    return (
        f"Either keep {which} unquantised with --kv-cache-dtype-skip-layers {names}, or "
        f"{refusal.advice}"
    )


def _layers_like(index: int, config: VllmConfig | None) -> set[int]:
    """Return the layers of the same type as `index`, or only `index` if all have one type."""
    text_config = config.model_config.hf_text_config if config and config.model_config else None
    types = getattr(text_config, "layer_types", None) or []
    if index >= len(types) or len(set(types)) == 1:
        return {index}
    return {other for other, kind in enumerate(types) if kind == types[index]}


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:]
