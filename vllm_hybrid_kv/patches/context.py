# SPDX-License-Identifier: Apache-2.0
"""The context that the patches of one process share: targets, strategies and callbacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from vllm_hybrid_kv.errors import HybridKVError
from vllm_hybrid_kv.hooks import Strategies
from vllm_hybrid_kv.patches.mechanism import Rebinding, Target
from vllm_hybrid_kv.settings import Settings, resolve
from vllm_hybrid_kv.state import STATE

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class Context:
    """The objects that all patches of one process share.

    Attributes:
        targets: The functions of vLLM to patch, by name.
        relied_on: The methods of vLLM that the coordinator relies on.
        offloading: The methods of vLLM that an engine with an OffloadingConnector relies on.
        strategies: The strategies of this process.
        on_cpu: Whether the platform is a CPU.
        on_gpu: Whether the platform is a GPU of NVIDIA or AMD.
        stop: Raises an error that ends start-up. A `vllm` command prints only its message.
        on_engine_config: Called with an engine's configuration and settings, before any layer is
            made.
    """

    targets: Mapping[str, Target]
    relied_on: Sequence[Target]
    offloading: Sequence[Target]
    strategies: Strategies
    on_cpu: bool
    on_gpu: bool
    stop: Callable[[HybridKVError], NoReturn]
    on_engine_config: list[Callable[[VllmConfig, Settings], None]] = field(default_factory=list)

    def rebind(self, name: str, around: Callable[..., Any]) -> Rebinding:
        """Return an edit that redirects all calls of a target to `around`: see `Rebinding`."""
        return Rebinding(self.targets[name], around)

    def check(self, additional_config: object) -> Settings:
        """Resolve and check the settings of a command line and the environment.

        Raises:
            HybridKVError: A setting is not valid, or names a strategy that does not exist.
        """
        settings = resolve(additional_config)
        self.strategies.check(settings)
        if self.on_cpu and settings.cpu_isa != "auto":
            # An engine without a k8v4 cache loads no kernels, so "auto" is not checked here.
            settings.kernel_isa()
        return settings

    def activate_settings(
        self, vllm_config: VllmConfig, settings: Settings | None = None
    ) -> Settings:
        """Activate an engine's settings in this process, and return them.

        Other callers of vLLM's planning functions may pass an object that is not a `VllmConfig`.
        The current settings then stay active.

        Raises:
            HybridKVError: See `check`.
        """
        if not is_engine_config(vllm_config):
            return STATE.settings
        if settings is None and STATE.engine_config is vllm_config:
            settings = STATE.engine_settings
        STATE.engine_settings = settings or self.check(vllm_config.additional_config)
        STATE.engine_config = vllm_config
        for callback in self.on_engine_config:
            callback(vllm_config, STATE.engine_settings)
        return STATE.engine_settings


def is_engine_config(vllm_config: object) -> bool:
    """Return whether this is a `VllmConfig`. Some callers of planning pass other objects."""
    from vllm.config import VllmConfig

    return isinstance(vllm_config, VllmConfig)
