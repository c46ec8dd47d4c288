# SPDX-License-Identifier: Apache-2.0
"""What the k8v4 backend cannot serve, said in words before a server starts."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from vllm_hybrid_kv.kernels import k8v4

if TYPE_CHECKING:
    from vllm.v1.attention.selector import AttentionSelectorConfig

CACHE_DTYPE = "turboquant_k8v4"


class UnsupportedLayerError(ValueError):
    """A layer asks for something that the k8v4 cache cannot give."""

    def __init__(self, reason: str, layer: str | None = None) -> None:
        layer = layer or _layer_under_construction()
        super().__init__(
            f"{layer}: --kv-cache-dtype {CACHE_DTYPE} cannot serve this layer: {reason}. "
            f"{_way_out(layer)}"
        )


def _layer_under_construction() -> str:
    """Name the vLLM layer whose constructor is running.

    vLLM asks for a backend without saying for which layer. The name stands in the frame of the
    layer's own constructor as `prefix`; this runs only when start-up is about to stop.
    """
    frame = sys._getframe(1)
    while frame is not None:
        prefix = frame.f_locals.get("prefix")
        if frame.f_code.co_name == "__init__" and isinstance(prefix, str) and prefix:
            return f"layer {prefix}"
        if frame.f_back is None:
            break
        frame = frame.f_back
    return "an attention layer"


def _way_out(layer: str) -> str:
    indices = [part for part in layer.split(".") if part.isdigit()]
    skip = f"--kv-cache-dtype-skip-layers {indices[0]}" if indices else ""
    keep = f"keep it unquantised with {skip}, or " if skip else ""
    return f"Either {keep}serve the model with --kv-cache-dtype auto or fp8"


def refuse_selection(config: AttentionSelectorConfig) -> str | None:
    """Return why a layer that vLLM selects a backend for cannot have a k8v4 cache.

    Args:
        config: What vLLM knows of the layer: head size, dtype, kind of attention.

    Returns:
        The reason, or None if the layer can be served.
    """

    def asks(name: str) -> bool:
        # Both supported vLLM minors have most of these; one that a minor lacks is not asked.
        return bool(getattr(config, name, False))

    attn_type = str(getattr(config.attn_type, "value", config.attn_type))
    for unsupported, reason in (
        (asks("use_mla"), "multi-head latent attention (MLA) has a latent cache of its own"),
        (asks("use_sparse"), "sparse attention selects keys that k8v4 pages do not index"),
        (attn_type != "decoder", f"attention type {attn_type!r} is not decoder self-attention"),
        (asks("use_mm_prefix"), "bidirectional attention inside multimodal prefixes"),
        (asks("use_per_head_quant_scales"), "per-head scales from the checkpoint"),
        (asks("use_dcp"), "decode context parallelism on CPUs"),
        (asks("use_pcp"), "prefill context parallelism on CPUs"),
        (asks("use_rswa"), "reference sliding window attention (R-SWA)"),
    ):
        if unsupported:
            return reason
    return k8v4.refuse_head_size(config.head_size)


def refuse_implementation(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    alibi_slopes: list[float] | None,
    attn_type: str,
    extra: dict[str, Any],
) -> str | None:
    """Return why a layer's own parameters rule the k8v4 cache out, or None.

    Args:
        num_heads: Query heads.
        num_kv_heads: KV heads.
        head_size: Dims of a head.
        alibi_slopes: Set for models that bias scores by distance.
        attn_type: vLLM's kind of attention.
        extra: Parameters of the layer that this backend has no meaning for.
    """
    if alibi_slopes is not None:
        return "ALiBi position biases"
    attn_type = str(getattr(attn_type, "value", attn_type))
    if attn_type != "decoder":
        return f"attention type {attn_type!r} is not decoder self-attention"
    if num_heads % num_kv_heads:
        return f"{num_heads} query heads are not a multiple of {num_kv_heads} KV heads"
    unknown = sorted(name for name, value in extra.items() if value not in (None, False, -1))
    if unknown:
        return f"it sets {', '.join(unknown)}, which the k8v4 kernels do not implement"
    return k8v4.refuse_head_size(head_size)
