# SPDX-License-Identifier: Apache-2.0
"""The entry point: checks the version, applies the patches, logs what is active.

vLLM imports this module and calls `register` in every process, before it knows the engine's
configuration. vLLM and the patches are imported only when `register` runs.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import multiprocessing
import os
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from vllm_hybrid_kv import INSTALL_VLLM
from vllm_hybrid_kv.errors import (
    HybridKVAgreementError,
    HybridKVError,
    HybridKVFingerprintError,
    HybridKVVersionError,
)
from vllm_hybrid_kv.state import STATE
from vllm_hybrid_kv.version import __version__

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_hybrid_kv.hooks import Strategies
    from vllm_hybrid_kv.patches.context import Context
    from vllm_hybrid_kv.settings import Settings

NAME = "hybrid_kv"

# A child of the logger `vllm`, whose handlers vLLM configures.
logger = logging.getLogger(f"vllm.{NAME}")

PARENT_VARIABLE = "HYBRID_KV_STARTED_BY"
"""The environment variable that passes the plugin's state in a process on to its children."""


def register() -> None:
    """Activate the plugin in this process. Further calls check that it is still active.

    On an unsupported vLLM the plugin warns once and changes nothing, unless the user named it in
    `VLLM_PLUGINS`.

    Raises:
        HybridKVError: Start-up must stop. In a `vllm` command it becomes a SystemExit.
        ImportError: vLLM is not installed.
    """
    if STATE.active_patches is not None:
        STATE.active_patches.verify()
    elif STATE.why_inactive is None:
        try:
            STATE.why_inactive = _activate()
        except HybridKVError as error:
            _stop(error)


def vllm_version() -> tuple[str, str]:
    """Return the installed version of vLLM, such as `0.33.1`, and its minor, such as `0.33`.

    Raises:
        HybridKVVersionError: The plugin does not support this vLLM.
        ImportError: vLLM is not installed.
    """
    try:
        from vllm.version import __version__ as version
        from vllm.version import __version_tuple__ as version_tuple
    except ModuleNotFoundError as error:
        raise ImportError(f"{NAME}: {INSTALL_VLLM}") from error
    from vllm_hybrid_kv.patches.targets import MINORS, SUPPORTED

    minor = ".".join(map(str, version_tuple[:2]))
    if minor not in MINORS:
        raise HybridKVVersionError(
            f"{NAME} {__version__} supports vLLM {SUPPORTED}, this is vLLM {version}; install a "
            "supported vLLM, or a vllm-hybrid-kv for this one"
        )
    return str(version), minor


def built_in_strategies() -> Strategies:
    """Return a registry that holds this package's strategies and no others."""
    from vllm_hybrid_kv.coordinator.strategies import AutoMatchUnit, FixedPoint, HybridAware
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


def compare_with_parent(state: str) -> None:
    """Check that this process has the same plugin state as the process that started it.

    A worker without the plugin would run vLLM's own backend on pages that the other processes
    planned for ours. A process without a parent (such as a Ray worker) is not compared with any
    process, but its children are compared with it.

    Raises:
        HybridKVAgreementError: The states differ.
    """
    parent_state = os.environ.get(PARENT_VARIABLE)
    if multiprocessing.parent_process() is None or not parent_state:
        os.environ[PARENT_VARIABLE] = state
    elif state != parent_state:
        raise HybridKVAgreementError(
            f"the process {multiprocessing.current_process().name} has {state}, but the process "
            f"that started it has {parent_state}. All processes of an engine need the same plugin. "
            "Install it in all of them, and run `vllm-hybrid-kv doctor` to see what another plugin "
            "patches"
        )


def _activate() -> HybridKVError | None:
    """Apply the patches, or return why this vLLM is left unchanged."""
    from vllm_hybrid_kv.patches import patches_for
    from vllm_hybrid_kv.patches.mechanism import ActivePatches

    unsupported: HybridKVError | None = None
    try:
        version, minor = vllm_version()
        context = _context(version, minor)
        # Settings in the environment can be checked before a configuration exists.
        context.check(None)
        patches = ActivePatches(patches_for(context))
    except (HybridKVVersionError, HybridKVFingerprintError) as error:
        if NAME in os.environ.get("VLLM_PLUGINS", "").split(","):
            raise
        unsupported = error
    if unsupported is not None:
        compare_with_parent(f"{NAME} {__version__} inactive ({unsupported})")
        logger.warning(
            "%s. The plugin is inactive and vLLM is unchanged. Run `vllm-hybrid-kv doctor` for "
            "details, or set VLLM_PLUGINS=%s to stop start-up instead.",
            unsupported,
            NAME,
        )
        return unsupported
    try:
        compare_with_parent(f"{NAME} {__version__} active on vLLM {version}")
    except HybridKVError:
        patches.undo()
        raise
    STATE.active_patches, STATE.strategies = patches, context.strategies
    return None


def _context(version: str, minor: str) -> Context:
    import vllm.platforms

    from vllm_hybrid_kv import metrics
    from vllm_hybrid_kv.hooks import ENTRY_POINT_GROUP, HOOK_OF_SETTING
    from vllm_hybrid_kv.patches import startup
    from vllm_hybrid_kv.patches.context import Context
    from vllm_hybrid_kv.patches.targets import OFFLOADING, RELIED_ON, targets_of
    from vllm_hybrid_kv.transfer.connectors import check_connectors

    strategies = built_in_strategies()
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        strategies.add_entry_point(entry_point)
    platform = vllm.platforms.current_platform

    def check_transfer(vllm_config: VllmConfig, _: Settings) -> None:
        if context.on_cpu or context.on_gpu:
            check_connectors(vllm_config, on_cpu=context.on_cpu)

    # Log the line once per process. A forked child logs it again.
    log_once = functools.cache(lambda _, line: logger.info("%s", line))

    def log_active(vllm_config: VllmConfig, settings: Settings) -> None:
        chosen = ", ".join(f"{name}={getattr(settings, name)}" for name in HOOK_OF_SETTING)
        log_once(
            os.getpid(),
            f"{NAME} {__version__} active on vLLM {version} "
            f"({platform.device_type or 'unspecified device'}): {chosen}, "
            f"kernels={_kernels(context, platform, vllm_config, settings)}",
        )

    context = Context(
        targets=targets_of(minor),
        relied_on=list(targets_of(minor, RELIED_ON).values()),
        offloading=list(targets_of(minor, OFFLOADING).values()),
        strategies=strategies,
        on_cpu=bool(platform.is_cpu()),
        on_gpu=bool(platform.is_cuda_alike()),
        stop=_stop,
        on_engine_config=[check_transfer, metrics.publish, startup.forget, log_active],
    )
    return context


def _kernels(context: Context, platform: Any, vllm_config: VllmConfig, settings: Settings) -> str:
    from vllm_hybrid_kv.constants import CACHE_DTYPE

    dtype = vllm_config.cache_config.cache_dtype
    if dtype != CACHE_DTYPE:
        return f"none for cache dtype {dtype}"
    if context.on_cpu:
        return f"cpu:{settings.kernel_isa()}"
    if not context.on_gpu:
        return "vLLM's own, because this device is neither a CPU nor a GPU"
    from vllm_hybrid_kv.kernels.triton import tuning

    # Ask the platform, because torch would initialise CUDA in a process that may fork later.
    capability = platform.get_device_capability() if platform.is_cuda() else None
    return (
        f"triton, tile sizes {tuning.origin(capability and (capability.major, capability.minor))}"
    )


def _stop(error: HybridKVError) -> NoReturn:
    """Raise the error; in the process of a `vllm` command, exit with its message alone."""
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    command_line = "vllm.entrypoints.cli.main" in sys.modules or (
        main is not None and main.name.startswith("vllm.")
    )
    if command_line and multiprocessing.parent_process() is None:
        raise SystemExit(f"{NAME}: {error}") from None
    raise error
