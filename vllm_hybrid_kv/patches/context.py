# SPDX-License-Identifier: Apache-2.0
"""What the patches of one process share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from vllm_hybrid_kv import settings
from vllm_hybrid_kv.errors import HybridKVError
from vllm_hybrid_kv.hooks import Strategies

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_hybrid_kv.settings import Settings


@dataclass(frozen=True)
class Context:
    """What the patches of one process share.

    Attributes:
        strategies: The strategies of this process.
        on_cpu: Whether the platform is a CPU.
        on_gpu: Whether it is a GPU of NVIDIA's or AMD's.
        announce: Is told an engine's configuration and settings wherever they become known.
        stop: Ends start-up with an error from the process that the user started.
        followers: Are told an engine's configuration likewise, before any layer is made.
    """

    strategies: Strategies
    on_cpu: bool
    on_gpu: bool
    announce: Callable[[VllmConfig, Settings], None]
    stop: Callable[[HybridKVError], NoReturn]
    followers: list[Callable[[VllmConfig], None]] = field(default_factory=list)

    def check(self, additional_config: object) -> Settings:
        """Return the settings that a command line and the environment make.

        Raises:
            HybridKVError: They are not valid, or name a strategy that does not exist.
        """
        resolved = settings.resolve(additional_config)
        self.strategies.check(resolved)
        if self.on_cpu and resolved.cpu_isa != "auto":
            # Not asked where nothing was chosen: an engine without our cache loads no kernels.
            resolved.kernel_isa()
        return resolved

    def adopt(self, vllm_config: VllmConfig) -> Settings:
        """Put an engine's settings in force in this process.

        Whoever calls vLLM's planning functions by themselves may have something else than an
        engine's configuration; what is in force then stays.

        Raises:
            HybridKVError: See `check`.
        """
        from vllm.config import VllmConfig

        if not isinstance(vllm_config, VllmConfig):
            return settings.current_settings()
        self.check(vllm_config.additional_config)
        adopted = settings.adopt(vllm_config)
        for follow in self.followers:
            follow(vllm_config)
        self.announce(vllm_config, adopted)
        return adopted
