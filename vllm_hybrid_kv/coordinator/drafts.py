# SPDX-License-Identifier: Apache-2.0
"""Refuses speculative decoding with a prefix cache of states, which vLLM fills with wrong ones."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from vllm.model_executor.models.registry import ModelRegistry

from vllm_hybrid_kv.errors import HybridKVSettingsError

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

ALLOWED_BY = "allow_unsafe_drafts"
"""The setting that lets such an engine start."""

TEXT_METHODS = ("ngram", "suffix")
"""Methods that take drafts from the text, with no draft model and with synchronous scheduling."""

EXPORTING_LAYER = "MambaMixer2"
"""The layer that exports a state from within a prompt's last chunk in every configuration."""


def check_drafts(vllm_config: VllmConfig) -> None:
    """Refuse an engine whose draft tokens can corrupt the states in its prefix cache.

    The drafts of a model (MTP, EAGLE and others) can corrupt any cached state: the open issues
    vllm-project/vllm#47194 and #53912. One cause is in the source of 0.32 and 0.33: model runner V1
    with asynchronous scheduling may use another request's count of accepted drafts (#53919).
    Drafts from the text do so only where a kernel exports states, as Mamba 2's does: the worker
    then writes the exported state into a block that the scheduler has moved.

    Args:
        vllm_config: A finished configuration. The model need not be loaded.

    Raises:
        HybridKVSettingsError: The engine has such drafts and caches states.
    """
    speculative, cache = vllm_config.speculative_config, vllm_config.cache_config
    model = vllm_config.model_config
    if (
        speculative is None
        or not vllm_config.num_speculative_tokens
        or not cache.enable_prefix_caching
        or cache.mamba_cache_mode != "align"
        or not (model.is_hybrid or model.has_inner_state)
    ):
        return
    if speculative.method in TEXT_METHODS and not _exports_states(model):
        return
    raise HybridKVSettingsError(
        f"{model.model} ({model.architecture}) caches states, and speculative decoding "
        f"({speculative.method!r}, {vllm_config.num_speculative_tokens} tokens) can corrupt them: "
        "later requests that share the prefix then get wrong answers, with no error. "
        "vllm-project/vllm#43559 measured about 20 % lower accuracy; #47194 and #53912 are open. "
        "Pass --no-enable-prefix-caching, or drop --speculative-config, or accept the risk with "
        f"{ALLOWED_BY}=true in --additional-config 'hybrid_kv'"
    )


def _exports_states(model: ModelConfig) -> bool:
    """Whether the module of a model uses the exporting layer. Does not import the module."""
    for architecture in model.architectures:
        registered = ModelRegistry.models.get(architecture)
        module = getattr(registered, "module_name", None)
        if module is None:
            # A model of another plugin, imported already: fail closed.
            return True
        found = importlib.util.find_spec(module)
        if found is None or found.origin is None:
            return True
        if EXPORTING_LAYER in Path(found.origin).read_text(encoding="utf-8"):
            return True
    return False
