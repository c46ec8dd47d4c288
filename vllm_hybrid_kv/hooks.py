# SPDX-License-Identifier: Apache-2.0
"""The extension points (pluggy, project name `hybrid_kv`) and the strategies that implement them.

A strategy is an object or a module with hook implementations, registered in pluggy under a name.
For each hook a setting names one strategy, and only that strategy is called. The plugin checks the
result before vLLM gets it. If the strategy returns None, vLLM's own rule applies. The strategy
`stock` of every hook is vLLM's own rule.

Another package registers a strategy through the entry point group `vllm_hybrid_kv`; the entry
point's name is the strategy's name. A hook implementation names only the arguments that it needs.
`docs/configuration.md` has an example.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

from vllm_hybrid_kv.errors import HybridKVSettingsError, HybridKVStrategyError, did_you_mean

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheSpec

    from vllm_hybrid_kv.settings import Settings

PROJECT = "hybrid_kv"
ENTRY_POINT_GROUP = "vllm_hybrid_kv"
BUILT_IN = "built in"
STOCK = "stock"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

HOOK_OF_SETTING = {
    "unify_page_sizes": "hybrid_kv_unify_page_sizes",
    "token_capacity_groups": "hybrid_kv_token_capacity_groups",
    "coordinator": "hybrid_kv_make_coordinator",
    "prefix_match_unit": "hybrid_kv_prefix_match_unit",
}

BUILT_IN_NAMES = {
    "unify_page_sizes": ("lcm", "min_waste", STOCK),
    "token_capacity_groups": ("growing", STOCK),
    "coordinator": ("fixed_point", "hybrid_aware", STOCK),
    "prefix_match_unit": ("auto", STOCK),
}
"""The built-in strategies of each setting, listed here so that tools need not import vLLM."""


def strategy_names(setting: str) -> list[str]:
    """List a setting's strategies, including those of other packages, without importing vLLM."""
    others = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP).names
    return [*BUILT_IN_NAMES[setting], *sorted(others)]


class Specifications:
    """The hooks. An implementation must not modify its arguments.

    `vllm_config` is the engine's configuration, and `kv_cache_config` is vLLM's plan of KV groups
    and blocks. `stock` is vLLM's own function, which the hook replaces.
    """

    @hookspec(firstresult=True)
    def hybrid_kv_unify_page_sizes(
        self,
        vllm_config: VllmConfig | None,
        kv_cache_spec: dict[str, KVCacheSpec],
        stock: Callable[[dict[str, KVCacheSpec]], dict[str, KVCacheSpec]],
    ) -> dict[str, KVCacheSpec] | None:
        """Make the pages of all layers of a model equally large.

        Called during planning if the layers of a model differ in kind and the cache layout stores
        each layer's pages together. In other layouts, pages may differ in size. `vllm_config` is
        None if vLLM plans without a configuration.

        Return a spec for every layer by name. All pages must have the same number of bytes, no
        block may shrink, and every page must hold its contents. To enlarge a page, put more tokens
        into its block (`block_size`). States, and attention other than MLA, can be padded instead
        (`page_size_padded`, bytes). Raise NotImplementedError if equal pages are impossible: vLLM
        then tries to allocate sliding-window layers like full attention.
        """

    @hookspec(firstresult=True)
    def hybrid_kv_token_capacity_groups(
        self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
    ) -> list[KVCacheGroupSpec] | None:
        """Choose the KV groups from which vLLM computes how many tokens fit into the cache.

        Called once per engine, after planning. vLLM logs the result as "KV cache size", in tokens,
        and exports it in its metrics. The choice changes neither the allocation nor the concurrency
        that vLLM logs. Return some of the plan's `kv_cache_groups`, at least one on the device.
        """

    @hookspec(firstresult=True)
    def hybrid_kv_make_coordinator(
        self,
        kv_cache_config: KVCacheConfig,
        factory_args: Mapping[str, Any],
        stock: Callable[..., KVCacheCoordinator],
    ) -> KVCacheCoordinator | None:
        """Make the coordinator, which runs the KV cache managers of all groups.

        Called whenever vLLM makes a coordinator: in the scheduler, and in KV connectors that own
        blocks. A coordinator for several groups should subclass `HybridKVCacheCoordinator`,
        because vLLM checks for that class in some places. `factory_args` has all arguments of
        vLLM's factory. They differ between versions of vLLM, so call `stock(**factory_args)`
        or `MyCoordinator(**factory_args)`.
        """

    @hookspec(firstresult=True)
    def hybrid_kv_prefix_match_unit(
        self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
    ) -> int | None:
        """Choose the match unit: prefixes are hashed and matched in units of this many tokens.

        Called in several processes, wherever vLLM resolves its block sizes, so the result must
        depend on the arguments alone. Not called if the user passes `--prefix-match-unit`.
        Return a number of tokens that divides the block size of every group with a prefix cache.
        """


class Strategies:
    """The strategies of this process by name. For each hook a setting chooses one of them."""

    def __init__(self, built_in: Mapping[str, object]) -> None:
        """Register the built-in strategies by name; `stock` needs no registration."""
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(Specifications)
        self.origins = {STOCK: BUILT_IN}
        """Where each strategy comes from: a package and its version, or `BUILT_IN`."""
        for name, plugin in built_in.items():
            self.add(name, plugin, BUILT_IN)

    def add(self, name: str, plugin: object, origin: str) -> None:
        """Register a strategy under a name; `origin` is the package that it comes from.

        Raises:
            HybridKVStrategyError: The name is taken, or the plugin does not fit the hooks.
        """
        who = f"strategy {name!r} (from {origin})"
        if name in self.origins:
            raise HybridKVStrategyError(
                f"{who}: there already is one of that name, {self.origins[name]}; uninstall one "
                "or rename the entry point"
            )
        if inspect.isclass(plugin):
            raise HybridKVStrategyError(
                f"{who} is the class {plugin.__qualname__}; register an instance or a module"
            )
        try:
            self._manager.register(plugin, name)
            self._manager.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise HybridKVStrategyError(
                f"{who} does not fit the hooks: {reason}; vllm_hybrid_kv/hooks.py has the arguments"
            ) from error
        if not self._manager.get_hookcallers(plugin):
            raise HybridKVStrategyError(
                f"{who} implements no hook; mark one of {', '.join(HOOK_OF_SETTING.values())} "
                "with vllm_hybrid_kv.hookimpl"
            )
        self.origins[name] = origin

    def add_entry_point(self, entry_point: importlib.metadata.EntryPoint) -> None:
        """Register the strategy of another package.

        Raises:
            HybridKVStrategyError: It cannot be imported or registered. The message says why.
        """
        package = entry_point.dist
        origin = f"{package.name} {package.version}" if package else entry_point.value
        try:
            plugin = entry_point.load()
        except Exception as error:
            raise HybridKVStrategyError(
                f"strategy {entry_point.name!r} (from {origin}): {entry_point.value} cannot "
                f"be imported: {type(error).__name__}: {error}"
            ) from error
        self.add(entry_point.name, plugin, origin)

    def available(self, setting: str) -> list[str]:
        """Return the names of the strategies that a setting can choose."""
        implementations = getattr(self._manager.hook, HOOK_OF_SETTING[setting]).get_hookimpls()
        return sorted([STOCK, *(one.plugin_name for one in implementations)])

    def check(self, settings: Settings) -> None:
        """Check that every chosen strategy exists.

        Raises:
            HybridKVSettingsError: A strategy does not exist. The message lists those that do.
        """
        problems = []
        for setting in HOOK_OF_SETTING:
            available = self.available(setting)
            if (name := getattr(settings, setting)) not in available:
                listed = ", ".join(
                    other
                    if self.origins[other] == BUILT_IN
                    else f"{other} (from {self.origins[other]})"
                    for other in available
                )
                problems.append(
                    f"{setting}={name!r} (from {settings.source(setting)}) is not valid: no such "
                    f"strategy; available: {listed}{did_you_mean(name, available)}"
                )
        if problems:
            raise HybridKVSettingsError("; ".join(problems))

    def label(self, setting: str, settings: Settings) -> str:
        """Describe the chosen strategy and its origin, for use in messages."""
        name = getattr(settings, setting)
        return f"{setting} strategy {name!r} (from {self.origins[name]})"

    def call(self, setting: str, settings: Settings, **arguments: Any) -> Any:
        """Call the strategy that a setting chooses, and return its unchecked result.

        If the result is None, vLLM's own rule applies.

        Raises:
            NotImplementedError: The strategy raised it.
            HybridKVStrategyError: A strategy of another package failed.
        """
        hook, name = HOOK_OF_SETTING[setting], getattr(settings, setting)
        if name == STOCK:
            return None
        others = [plugin for other, plugin in self._manager.list_name_plugin() if other != name]
        try:
            return self._manager.subset_hook_caller(hook, others)(**arguments)
        except (NotImplementedError, HybridKVStrategyError):
            raise
        except Exception as error:
            if self.origins[name] == BUILT_IN:
                raise
            raise HybridKVStrategyError(
                f"{self.label(setting, settings)} raised an error in {hook}: "
                f"{type(error).__name__}: {error}. Fix that package, or set {setting}={STOCK}"
            ) from error
