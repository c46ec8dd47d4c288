# SPDX-License-Identifier: Apache-2.0
"""The entry point: checks the version, applies the patches, says what is active.

vLLM imports this module and calls `register` in every process, before it knows the engine's
configuration. Whatever is needed beyond the standard library is imported when it is called.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from vllm_hybrid_kv import INSTALL_VLLM
from vllm_hybrid_kv.errors import (
    HybridKVError,
    HybridKVFingerprintError,
    HybridKVVersionError,
)
from vllm_hybrid_kv.version import __version__

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_hybrid_kv.hooks import Strategies
    from vllm_hybrid_kv.patches.base import Applied
    from vllm_hybrid_kv.settings import Settings

NAME = "hybrid_kv"

_applied: Applied | None = None
_strategies: Strategies | None = None
_left_alone: HybridKVError | None = None
_announced: set[tuple[int, str]] = set()


def register() -> None:
    """Make the plugin active in this process. Calling it again does no harm.

    On a vLLM that the plugin does not know it warns once and changes nothing, unless the user
    named it in `VLLM_PLUGINS`.

    Raises:
        HybridKVError: A setting is not valid, another plugin is in the way, the process that
            started this one has another plugin, or the plugin was named in `VLLM_PLUGINS` and
            does not know this vLLM. vLLM lets it through, so that start-up stops. In the process
            of a `vllm` command it is a SystemExit with the message.
        ImportError: vLLM is not installed.
    """
    global _applied, _left_alone
    if _applied is not None:
        _applied.verify()
        return
    if _left_alone is not None:
        return
    from vllm_hybrid_kv.agreement import agree

    try:
        unknown: HybridKVError | None = None
        try:
            in_force = _activate()
        except (HybridKVVersionError, HybridKVFingerprintError) as error:
            if NAME in os.environ.get("VLLM_PLUGINS", "").split(","):
                raise
            unknown = error
        if unknown is not None:
            agree(f"{NAME} {__version__} inactive ({unknown})")
            _left_alone = unknown
            _logger().warning(
                "%s. The plugin is inactive and vLLM is unchanged; `vllm-hybrid-kv doctor` says "
                "more. Set VLLM_PLUGINS=%s to stop start-up instead.",
                unknown,
                NAME,
            )
            return
        try:
            agree(f"{NAME} {__version__} active on vLLM {vllm_version()[0]}")
        except HybridKVError:
            in_force.undo()
            raise
        _applied = in_force
    except HybridKVError as error:
        _stop(error)


def applied() -> Applied | None:
    """Return the active patches of this process, or None if the plugin is inactive."""
    return _applied


def left_alone() -> HybridKVError | None:
    """Return why `register` left vLLM as it is in this process, or None where it did not."""
    return _left_alone


def registered_strategies() -> Strategies | None:
    """Return the strategies of this process, or None where the plugin is inactive."""
    return _strategies


def vllm_version() -> tuple[str, tuple[int, int]]:
    """Return the version of vLLM in this process and its minor, one that the plugin knows.

    Raises:
        HybridKVVersionError: The plugin does not know it.
        ImportError: vLLM is not installed.
    """
    try:
        from vllm.version import __version__ as version
        from vllm.version import __version_tuple__ as version_tuple
    except ModuleNotFoundError as error:
        raise ImportError(f"{NAME}: {INSTALL_VLLM}") from error
    from vllm_hybrid_kv.patches import ADAPTERS, SUPPORTED

    minor = tuple(version_tuple[:2])
    if minor not in ADAPTERS:
        raise HybridKVVersionError(
            f"{NAME} {__version__} supports vLLM {SUPPORTED}, this is vLLM {version}; "
            "install one of them, or a vllm-hybrid-kv for this one"
        )
    return str(version), (int(minor[0]), int(minor[1]))


def built_in_strategies() -> Strategies:
    """Return the strategies of this package, without those of others."""
    from vllm_hybrid_kv.coordinator.match_unit import AutoMatchUnit
    from vllm_hybrid_kv.coordinator.strategies import FixedPoint, HybridAware
    from vllm_hybrid_kv.hooks import Strategies
    from vllm_hybrid_kv.planning.capacity import GrowingGroups
    from vllm_hybrid_kv.planning.lcm import LeastCommonMultiple
    from vllm_hybrid_kv.planning.min_waste import MinWaste

    return Strategies(
        {
            "lcm": LeastCommonMultiple(),
            "min_waste": MinWaste(),
            "growing": GrowingGroups(),
            "fixed_point": FixedPoint(),
            "hybrid_aware": HybridAware(),
            "auto": AutoMatchUnit(),
        }
    )


def _activate() -> Applied:
    global _strategies
    version, minor = vllm_version()

    import vllm.platforms

    from vllm_hybrid_kv.constants import CACHE_DTYPE
    from vllm_hybrid_kv.metrics import directory
    from vllm_hybrid_kv.patches import base, patches_for, startup
    from vllm_hybrid_kv.patches.context import Context
    from vllm_hybrid_kv.transfer import fingerprint
    from vllm_hybrid_kv.transfer.connectors import check_connectors

    strategies = built_in_strategies()
    strategies.discover()
    platform = vllm.platforms.current_platform

    def announce(vllm_config: VllmConfig, settings: Settings) -> None:
        device = platform.device_type or "unspecified device"
        dtype = vllm_config.cache_config.cache_dtype
        if dtype != CACHE_DTYPE:
            kernels = f"none for cache dtype {dtype}"
        elif context.on_cpu:
            kernels = f"cpu:{settings.kernel_isa()}"
        elif context.on_gpu:
            kernels = f"triton, tile sizes {_tile_sizes(platform)}"
        else:
            kernels = "vLLM's own, there are none for this device"
        line = (
            f"{NAME} {__version__} active on vLLM {version} ({device}): "
            f"{strategies.describe(settings)}, kernels={kernels}"
        )
        if (os.getpid(), line) not in _announced:
            _announced.add((os.getpid(), line))
            _logger().info("%s", line)

    def check_transfer(vllm_config: VllmConfig) -> None:
        if context.on_cpu or context.on_gpu:
            check_connectors(vllm_config, on_cpu=context.on_cpu)

    context = Context(
        strategies=strategies,
        on_cpu=bool(platform.is_cpu()),
        on_gpu=bool(platform.is_cuda_alike()),
        announce=announce,
        stop=_stop,
        followers=[fingerprint.follow, check_transfer, directory.follow, startup.forget],
    )
    # The environment's part of the settings is known before any configuration is.
    context.check(None)
    try:
        in_force = base.apply(patches_for(minor, context))
    except HybridKVFingerprintError as error:
        raise HybridKVFingerprintError(
            f"{NAME} {__version__} does not know this vLLM {version}: {error}. It may be "
            "patched, by hand or by another plugin"
        ) from None
    _strategies = strategies
    return in_force


def _tile_sizes(platform: Any) -> str:
    """Say whether the sizes of the GPU kernels' programs were measured on such a GPU.

    Asked of the platform, for torch would start CUDA in a process that may yet fork.
    """
    from vllm_hybrid_kv.kernels.triton import tuning

    capability = platform.get_device_capability() if platform.is_cuda() else None
    return tuning.origin(capability and (capability.major, capability.minor))


def _logger() -> Any:
    from vllm.logger import init_logger

    # Below `vllm`, whose handlers vLLM configures.
    return init_logger(f"vllm.{NAME}")


def _stop(error: HybridKVError) -> NoReturn:
    """End start-up: in a process of vLLM's command line with the message alone, else raise."""
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    command_line = "vllm.entrypoints.cli.main" in sys.modules or (
        main is not None and main.name.startswith("vllm.")
    )
    if command_line and not _is_child():
        raise SystemExit(f"{NAME}: {error}") from None
    raise error


def _is_child() -> bool:
    import multiprocessing

    return multiprocessing.parent_process() is not None
