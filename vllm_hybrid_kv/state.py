# SPDX-License-Identifier: Apache-2.0
"""Holds the state of one process, the only mutable module-level state of the plugin."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec

    from vllm_hybrid_kv.errors import HybridKVError
    from vllm_hybrid_kv.hooks import Strategies
    from vllm_hybrid_kv.patches.mechanism import ActivePatches
    from vllm_hybrid_kv.settings import Settings


@dataclass
class ProcessState:
    """The plugin's state in one process, which may set up several engines one after another.

    Attributes:
        active_patches: The patches of vLLM; None if the plugin is inactive.
        why_inactive: Why `register` left vLLM unchanged; None if the plugin is active, and before
            `register` runs.
        strategies: The registered strategies; None if the plugin is inactive.
        engine_config: The configuration of the last engine.
        engine_settings: The settings of the last engine.
        boundary_layers: The setting of the engine whose configuration vLLM is creating; None if
            vLLM's own rule for boundary layers applies.
        planning_for: The configuration of the engine whose layers vLLM is grouping now, otherwise
            None.
        planned_layers: The configuration of the engine whose layers vLLM grouped last, and the
            spec of each layer. The plan keeps only one spec for all layers of a group.
        metrics_files: The open files of counters (`MmapedDict`), by process id and folder.
        metrics_owner: Id of the process that publishes the folder of metric files; None if this
            process has published none.
    """

    active_patches: ActivePatches | None = None
    why_inactive: HybridKVError | None = None
    strategies: Strategies | None = None
    engine_config: VllmConfig | None = None
    engine_settings: Settings | None = None
    boundary_layers: int | None = None
    planning_for: VllmConfig | None = None
    planned_layers: tuple[VllmConfig, dict[str, KVCacheSpec]] | None = None
    metrics_files: dict[tuple[int, Path], Any] = field(default_factory=dict)
    metrics_owner: int | None = None

    @property
    def settings(self) -> Settings:
        """See `current_settings`."""
        from vllm_hybrid_kv.settings import resolve

        return self.engine_settings or resolve(None)


STATE = ProcessState()
"""The state of this process."""


def current_settings() -> Settings:
    """Return the settings of this process's last engine, or the environment's before any engine.

    Raises:
        HybridKVSettingsError: The environment holds an unknown or invalid setting.
    """
    return STATE.settings
