# SPDX-License-Identifier: Apache-2.0
"""Patches that read an engine's configuration early, and register our variables in vLLM."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from typing import Any

import vllm.platforms
from vllm import envs
from vllm.config import VllmConfig

from vllm_hybrid_kv.constants import CACHE_DTYPE
from vllm_hybrid_kv.coordinator.upstream_fixes import check_drafts
from vllm_hybrid_kv.errors import HybridKVError
from vllm_hybrid_kv.hooks import HOOK_OF_SETTING
from vllm_hybrid_kv.patches.attention import refuse_without_cpu_kernels
from vllm_hybrid_kv.patches.context import Context
from vllm_hybrid_kv.patches.mechanism import Edit, Patch, UnchangedTarget
from vllm_hybrid_kv.settings import ENVIRONMENT_PREFIX
from vllm_hybrid_kv.state import STATE


def settings_patch(context: Context) -> Patch:
    """Check the settings as soon as a process has its configuration, before it loads anything.

    An engine core gets a finished configuration, so the patches of planning check its settings.
    """

    def create_engine_config(original: Any, self: Any, *args: Any, **kwargs: Any) -> VllmConfig:
        try:
            settings = context.check(self.additional_config)
            if vllm.platforms.current_platform.is_cpu():
                refuse_without_cpu_kernels(self.kv_cache_dtype)
            STATE.engine_config, STATE.engine_settings = None, settings
            # No checkpoint turns `auto` into a k8v4 cache, so the option alone decides.
            if self.kv_cache_dtype == CACHE_DTYPE:
                STATE.boundary_layers = settings.boundary_layers
            vllm_config: VllmConfig = original(self, *args, **kwargs)
            cache_dtype = vllm_config.cache_config.cache_dtype
            if cache_dtype == CACHE_DTYPE:
                # vLLM forces FlashAttention 2 with any TurboQuant cache. Restore the user's choice,
                # because FlashAttention now runs only the layers that select it.
                vllm_config.attention_config.flash_attn_version = (
                    self.attention_config.flash_attn_version
                )
            # The plugin must not refuse an engine that uses only vLLM's dtypes and strategies.
            as_stock = cache_dtype != CACHE_DTYPE and all(
                getattr(settings, name) == "stock" for name in HOOK_OF_SETTING
            )
            if not as_stock and not settings.allow_unsafe_drafts:
                check_drafts(vllm_config)
            context.activate_settings(vllm_config, settings)
        except HybridKVError as error:
            context.stop(error)
        finally:
            STATE.boundary_layers = None
        return vllm_config

    def init(original: Any, self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        context.activate_settings(vllm_config)
        transfer = vllm_config.kv_transfer_config
        if context.on_cpu and transfer is not None:
            from vllm_hybrid_kv.transfer.cpu_offloading import check_memory

            # Check here, because the model is not loaded yet, and `replay` makes no workers.
            check_memory(transfer.kv_connector_extra_config)
        original(self, vllm_config, *args, **kwargs)

    return Patch(
        "settings",
        replaces="EngineArgs.create_engine_config and WorkerBase.__init__",
        why="vLLM loads plugins before the configuration is known, and does not pass it later; "
        "and it overrides the version of FlashAttention that the user chose",
        until="vLLM calls plugins with the configuration",
        edits=[
            context.rebind("EngineArgs.create_engine_config", create_engine_config),
            context.rebind("WorkerBase.__init__", init),
        ],
    )


class KnownVariables(Edit):
    """Adds our environment variables to vLLM's known variables, if they are set."""

    _added: Iterable[str] = ()

    def apply(self) -> None:
        """Add only variables that are set, because each changes the key of vLLM's compile cache."""
        ours = {name for name in os.environ if name.startswith(ENVIRONMENT_PREFIX)}
        self._added = sorted(ours - envs.environment_variables.keys())
        for name in self._added:
            envs.environment_variables[name] = functools.partial(os.environ.get, name)

    def undo(self) -> None:
        for name in self._added:
            envs.environment_variables.pop(name, None)

    def __str__(self) -> str:
        return "vllm.envs.environment_variables"


def known_variables_patch(context: Context) -> Patch:
    """Keep vLLM from reporting our variables as unknown."""
    return Patch(
        "known_variables",
        replaces="nothing; adds to vllm.envs.environment_variables",
        why="vLLM warns of unknown VLLM_* variables, or stops if it is told to",
        until="vLLM lets plugins register variables",
        # validate_environ reads the table to which KnownVariables adds ours.
        edits=[UnchangedTarget(context.targets["Platform.validate_environ"]), KnownVariables()],
    )
