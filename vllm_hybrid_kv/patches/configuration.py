# SPDX-License-Identifier: Apache-2.0
"""The patches that get an engine's configuration early, and tell vLLM our variables."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import vllm.platforms
from vllm import envs

from vllm_hybrid_kv.constants import CACHE_DTYPE
from vllm_hybrid_kv.coordinator.upstream_fixes import check_drafts
from vllm_hybrid_kv.errors import HybridKVError
from vllm_hybrid_kv.hooks import HOOK_OF_SETTING
from vllm_hybrid_kv.patches.attention import refuse_without_cpu_kernels
from vllm_hybrid_kv.patches.mechanism import Edit, Patch, PatchInfo, Rebinding, Target
from vllm_hybrid_kv.settings import ENVIRONMENT_PREFIX
from vllm_hybrid_kv.state import STATE

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_hybrid_kv.patches.context import Context


def runs_on_cpu() -> bool:
    """Return whether the engine that is being configured runs on a CPU."""
    return bool(vllm.platforms.current_platform.is_cpu())


def settings_patch(context: Context) -> Patch:
    """Check the settings where each process first gets them, before anything is loaded.

    The first calls are `create_engine_config` in the process that the user started, the worker's
    constructor in workers, and planning, which has patches of its own, in the engine core.
    """

    def make_create(original: Any) -> Any:
        def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> VllmConfig:
            try:
                settings = context.check(self.additional_config)
                if runs_on_cpu():
                    refuse_without_cpu_kernels(self.kv_cache_dtype)
            except HybridKVError as error:
                context.stop(error)
            # No checkpoint makes `auto` a k8v4 cache, so the option decides.
            k8v4 = self.kv_cache_dtype == CACHE_DTYPE
            STATE.boundary_layers = settings.boundary_layers if k8v4 else None
            try:
                vllm_config: VllmConfig = original(self, *args, **kwargs)
            finally:
                STATE.boundary_layers = None
            cache_dtype = vllm_config.cache_config.cache_dtype
            if cache_dtype == CACHE_DTYPE:
                # vLLM sets FlashAttention 2 with any TurboQuant cache, because newer versions need
                # every layer to be theirs. That no longer holds: they skip other layers.
                chosen = self.attention_config.flash_attn_version
                vllm_config.attention_config.flash_attn_version = chosen
            try:
                # With vLLM's own cache and rules an engine starts as it does without the plugin.
                as_stock = cache_dtype != CACHE_DTYPE and all(
                    getattr(settings, name) == "stock" for name in HOOK_OF_SETTING
                )
                if not as_stock and not settings.allow_unsafe_drafts:
                    check_drafts(vllm_config)
                context.activate_settings(vllm_config, settings)
            except HybridKVError as error:
                context.stop(error)
            return vllm_config

        return create_engine_config

    def make_init(original: Any) -> Any:
        def init(self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
            context.activate_settings(vllm_config)
            original(self, vllm_config, *args, **kwargs)

        return init

    return Patch(
        "settings",
        PatchInfo(
            replaces="EngineArgs.create_engine_config and WorkerBase.__init__",
            why="vLLM loads plugins before the configuration is known, and does not pass it later; "
            "and it overrides the version of FlashAttention that the user chose",
            upstream="none",
            until="vLLM calls plugins with the configuration",
        ),
        [
            Rebinding(context.targets["EngineArgs.create_engine_config"], make_create),
            Rebinding(context.targets["WorkerBase.__init__"], make_init),
        ],
    )


class KnownVariables(Edit):
    """Adds those of our environment variables that are set to vLLM's known variables."""

    def __init__(self, validate_environ: Target) -> None:
        self._validate_environ = validate_environ
        self._added: dict[str, Callable[[], Any]] = {}

    def problems(self) -> list[str]:
        """Check that vLLM still looks its variables up where we add ours."""
        return self._validate_environ.problems()

    def apply(self) -> None:
        """Add the variables that are set. Others would change the key of vLLM's compile cache."""
        for name in os.environ:
            if name.startswith(ENVIRONMENT_PREFIX) and name not in envs.environment_variables:
                self._added[name] = functools.partial(os.environ.get, name)
        envs.environment_variables.update(self._added)

    def failures(self) -> list[str]:
        return [
            f"vLLM no longer knows the variable {name}"
            for name, getter in self._added.items()
            if envs.environment_variables.get(name) is not getter
        ]

    def undo(self) -> None:
        for name in self._added:
            envs.environment_variables.pop(name, None)
        self._added.clear()

    def __str__(self) -> str:
        return "vllm.envs.environment_variables"


def known_variables_patch(context: Context) -> Patch:
    """Keep vLLM from reporting our variables as unknown."""
    return Patch(
        "known_variables",
        PatchInfo(
            replaces="nothing; adds to vllm.envs.environment_variables",
            why="vLLM warns of unknown VLLM_* variables, or stops if it is told to",
            upstream="none",
            until="vLLM lets plugins register variables",
        ),
        [KnownVariables(context.targets["Platform.validate_environ"])],
    )
