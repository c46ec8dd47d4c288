# SPDX-License-Identifier: Apache-2.0
"""The patch that aligns blocks for k8v4 layers next to unquantised ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_hybrid_kv.constants import CACHE_DTYPE
from vllm_hybrid_kv.patches.base import MethodRebinding, Patch, PatchInfo, Target
from vllm_hybrid_kv.state import STATE

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def unifies_as_stock(vllm_config: VllmConfig) -> bool:
    """Whether an engine's pages are unified by vLLM's own rule, for which vLLM aligns blocks."""
    return STATE.settings_of(vllm_config).unify_page_sizes == "stock"


def block_alignment_patch(align_hybrid: Target, align_heterogeneous: Target) -> Patch:
    """Plan blocks of k8v4 engines with unquantised layers as `unify_page_sizes` needs them.

    Blocks are aligned before any spec exists, so that vLLM's own unification finds equal pages. A
    strategy of the plugin needs no such help, and cannot undo it: blocks only grow.

    Args:
        align_hybrid: `Platform._align_hybrid_block_size`.
        align_heterogeneous: `Platform._align_heterogeneous_kv_block_size`.
    """

    def make_hybrid(original: Any) -> Any:
        def align(cls: type, vllm_config: VllmConfig, backend_cls: type) -> None:
            if not _strategy_unifies(vllm_config):
                original(cls, vllm_config, backend_cls)
                return
            cache = vllm_config.cache_config
            skipped = cache.kv_cache_dtype_skip_layers
            # Blocks of states as with an unquantised cache: long enough that a page of every layer
            # covers a state, for the unquantised layers have the largest page of a block.
            cache.cache_dtype, cache.kv_cache_dtype_skip_layers = "auto", []
            try:
                original(cls, vllm_config, backend_cls)
            finally:
                cache.cache_dtype, cache.kv_cache_dtype_skip_layers = CACHE_DTYPE, skipped

        return align

    def make_heterogeneous(original: Any) -> Any:
        def align(cls: type, vllm_config: VllmConfig, backend_cls: type) -> None:
            if not _strategy_unifies(vllm_config):
                original(cls, vllm_config, backend_cls)

        return align

    return Patch(
        "block_alignment",
        PatchInfo(
            replaces="Platform._align_hybrid_block_size and _align_heterogeneous_kv_block_size, "
            "which it wraps for k8v4 engines with unquantised layers",
            why="the first makes states 16 tokens long, which turns prefix caching off for most "
            "prompts; the second pads unquantised layers to a block of the quantised ones",
            upstream="none known",
            until="vLLM leaves page sizes of several cache dtypes to their unification",
        ),
        [
            MethodRebinding(align_hybrid, make_hybrid),
            MethodRebinding(align_heterogeneous, make_heterogeneous),
        ],
    )


def _strategy_unifies(vllm_config: VllmConfig) -> bool:
    """Whether k8v4 pages and unquantised ones are unified by another strategy than vLLM's."""
    cache = vllm_config.cache_config
    if cache.cache_dtype != CACHE_DTYPE or not cache.kv_cache_dtype_skip_layers:
        return False
    return not unifies_as_stock(vllm_config)
