# SPDX-License-Identifier: Apache-2.0
"""Classify models by the properties that matter to a KV cache."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple


class Pattern(NamedTuple):
    """The properties of a model that matter to a KV cache.

    Attributes:
        attention: The kinds of attention in its layers.
        state: The kinds of recurrent states.
        window: What limits attention, such as sliding windows.
        sharing: Whether some layers read another layer's cache.
        experts: Whether the model is a mixture of experts.
    """

    attention: tuple[str, ...]
    state: tuple[str, ...]
    window: tuple[str, ...]
    sharing: bool
    experts: bool

    def __str__(self) -> str:
        parts = [
            " + ".join(self.attention) or "no attention",
            " + ".join(self.state),
            " + ".join(self.window),
            "shared caches" if self.sharing else "",
            "experts" if self.experts else "",
        ]
        return ", ".join(filter(None, parts))

    @classmethod
    def from_json(cls, values: list[Any]) -> Pattern:
        return cls(*(tuple(value) if isinstance(value, list) else value for value in values))


_STATES = {
    "MAMBA1": "Mamba 1",
    "MAMBA2": "Mamba 2",
    "GDN": "Gated DeltaNet",
    "KDA": "Kimi delta",
    "LINEAR": "linear attention",
    "SHORT_CONV": "short convolution",
}


def pattern_of(model: Any, layers: dict[str, Any]) -> Pattern:
    """Classify a model that vLLM built.

    Args:
        model: The model.
        layers: The layers that have a KV cache, by name.

    Raises:
        LookupError: A layer's kind is unknown.
    """
    found: dict[str, set[str]] = {"attention": set(), "state": set(), "window": set()}
    for layer in layers.values():
        for part, kind in _kinds_of(layer):
            found[part].add(kind)
    names = {type(module).__name__ for module in model.modules()}
    return Pattern(
        **{part: tuple(sorted(kinds)) for part, kinds in found.items()},
        sharing=any(
            getattr(layer, "kv_sharing_target_layer_name", None) for layer in layers.values()
        ),
        experts=any(("MoE" in name and "Fused" in name) or name == "MoERunner" for name in names),
    )


def _kinds_of(layer: Any) -> Iterable[tuple[str, str]]:
    from vllm.model_executor.layers.attention import Attention, MLAAttention
    from vllm.model_executor.layers.mamba.abstract import MambaBase

    if isinstance(layer, MambaBase):
        kind = str(getattr(layer.mamba_type, "name", layer.mamba_type)).upper()
        yield "state", _STATES[kind.removesuffix("_ATTN").removesuffix("_ATTENTION")]
    elif isinstance(layer, MLAAttention):
        yield "attention", "sparse MLA" if getattr(layer, "use_sparse", False) else "MLA"
        if getattr(layer, "sliding_window", None):
            yield "window", "sliding window"
    elif isinstance(layer, Attention):
        yield "attention", _attention_of(layer)
        if getattr(layer, "attention_chunk_size", None) or "Chunked" in type(layer).__name__:
            yield "window", "chunked local"
        elif layer.sliding_window is not None:
            yield "window", "sliding window"
    else:
        # The model brings its own class for this layer, such as an indexer.
        yield "attention", "sparse"


def _attention_of(layer: Any) -> str:
    impl = layer.impl
    kinds = {
        "cross": str(getattr(layer.attn_type, "value", layer.attn_type)) == "encoder_decoder",
        "full with ALiBi": getattr(impl, "alibi_slopes", None) is not None,
        "full with sinks": getattr(impl, "sinks", None) is not None,
        "full with soft cap": getattr(impl, "logits_soft_cap", None),
        "full, keys and values of other sizes": (
            getattr(layer, "head_size_v", layer.head_size) != layer.head_size
        ),
    }
    return next((kind for kind, matches in kinds.items() if matches), "full")
