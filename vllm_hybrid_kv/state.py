# SPDX-License-Identifier: Apache-2.0
"""Holds the plugin's state in this process. All other mutable globals are caches."""

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
        boundary_layers: The setting of that name, but only while vLLM creates the configuration of
            an engine with a k8v4 cache. If None, vLLM's own rule for boundary layers applies.
        planning_for: The engine's configuration while vLLM groups its layers, otherwise None.
        planned_layers: The configuration of the engine whose layers vLLM grouped last, and the
            spec of each layer. They are kept because a plan has only one spec for each group.
        metrics_files: The open files of counters (`MmapedDict`), by process id and folder.
        metrics_owner: Id of the process that made the folder of metric files, or None. In a forked
            child it is not the child's own id, which shows that the folder is the parent's.
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


def current_settings() -> Settings:
    """Return the settings of the last engine or, before the first engine, of the environment.

    Raises:
        HybridKVSettingsError: The environment holds an unknown or invalid setting.
    """
    return STATE.settings
