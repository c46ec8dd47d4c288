# SPDX-License-Identifier: Apache-2.0
"""The patch of vLLM's rule for boundary layers: how many, and counted among which layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_hybrid_kv.attention.unsupported import UnsupportedModelError, refuse_model
from vllm_hybrid_kv.patches.base import MethodRebinding, Patch, PatchInfo, Target
from vllm_hybrid_kv.state import STATE

if TYPE_CHECKING:
    from vllm.config import ModelConfig

    from vllm_hybrid_kv.patches.context import Context

logger = init_logger("vllm.hybrid_kv.planning")


def boundary_patch(context: Context, get_boundary_layers: Target) -> Patch:
    """Replace vLLM's rule for engines with a k8v4 cache.

    Args:
        context: The process's.
        get_boundary_layers: `TurboQuantConfig.get_boundary_skip_layers`.
    """

    def make(original: Any) -> Any:
        def get_boundary_skip_layers(model_config: ModelConfig, n: int = 2) -> list[str]:
            asked = STATE.boundary_layers
            if asked is None:
                layers: list[str] = original(model_config, n)
                return layers
            if (refusal := refuse_model(model_config)) is not None:
                context.stop(UnsupportedModelError(model_config.model, refusal))
            # As in vLLM's rule. It also refuses hybrid models whose config does not list their
            # attention layers, and uses that list for nothing.
            if model_config.is_hybrid:
                return []
            owners = cache_owners(model_config.hf_text_config)
            count = min(asked, len(owners) // 2)
            kept = [str(index) for index in [*owners[:count], *owners[len(owners) - count :]]]
            if kept:
                logger.info_once(
                    "boundary_layers=%d: %d of %d attention layers stay unquantised (%s)",
                    *(asked, len(kept), len(owners), ", ".join(kept)),
                )
            return kept

        return get_boundary_skip_layers

    return Patch(
        "boundary_layers",
        PatchInfo(
            replaces="TurboQuantConfig.get_boundary_skip_layers, for engines with a k8v4 cache",
            why="vLLM's number is fixed, was found for coarser presets, and no option lowers it; "
            "it counts layers without a cache of their own; it refuses some hybrid models",
            upstream="vllm-project/vllm#39931 (no boundary layers in hybrid models), #40108",
            until="vLLM lets users choose it, and counts layers that own a KV cache",
        ),
        [MethodRebinding(get_boundary_layers, make)],
    )


def cache_owners(text_config: Any) -> list[int]:
    """Return the indices of the layers of a model that own a KV cache.

    Layers without attention own none, nor do the last `num_kv_shared_layers` of Gemma 3n and
    Gemma 4, which use the pages of an earlier layer.

    Args:
        text_config: The language model's Hugging Face config.
    """
    count = text_config.num_hidden_layers - (getattr(text_config, "num_kv_shared_layers", 0) or 0)
    blocks = getattr(text_config, "block_configs", None) or []
    return [i for i in range(count) if i >= len(blocks) or not _lacks_attention(blocks[i])]


def _lacks_attention(block: Any) -> bool:
    """Whether a Nemotron-NAS (DeciLM) block has no attention."""
    attention = _get(block, "attention")
    return bool(_get(attention, "no_op") or _get(attention, "replace_with_linear"))


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
