# SPDX-License-Identifier: Apache-2.0
"""Whether a platform or a model groups the layers of a KV cache without vLLM's own function."""

from __future__ import annotations

from typing import TYPE_CHECKING

import vllm.platforms
from vllm.utils.import_utils import resolve_obj_by_qualname

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def own_grouping(vllm_config: VllmConfig | None) -> str | None:
    """Name what makes the KV cache groups instead of vLLM's `get_kv_cache_groups`.

    What it names may still call vLLM's function; whether it did is known after planning.

    Args:
        vllm_config: The engine's. None asks the platform alone, for any engine.

    Returns:
        The platform's builder or the model's class; None if vLLM groups the layers, as vLLM 0.32
        always does.
    """
    platform = type(vllm.platforms.current_platform)
    if not hasattr(platform, "get_kv_cache_config_builder_cls"):
        return None
    from vllm.v1.core.kv_cache_planning import DefaultKVCacheConfigBuilder

    try:
        name = platform.get_kv_cache_config_builder_cls(vllm_config)
    except Exception:
        # Without a configuration a platform may be unable to choose.
        return f"the KV cache config builder that {platform.__module__}.{platform.__name__} chooses"
    builder = resolve_obj_by_qualname(name)
    if builder.get_kv_cache_groups is not DefaultKVCacheConfigBuilder.get_kv_cache_groups:
        return f"the platform's KV cache config builder {name}"
    if vllm_config is not None and vllm_config.model_config.supports_kv_cache_grouping:
        return f"the model's class {vllm_config.model_config.architecture}"
    return None
