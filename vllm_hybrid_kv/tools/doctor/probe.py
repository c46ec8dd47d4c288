# SPDX-License-Identifier: Apache-2.0
"""Runs in a process of its own: imports vLLM as a server does, and reports what is so then.

A stage that raises does not keep those that need nothing of it from running. What a stage needs
is imported in it, for any import may fail.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import traceback
from collections.abc import Callable
from typing import Any, TextIO, get_args

from vllm_hybrid_kv.tools.doctor.installation import PLUGINS_GROUP, STRATEGIES_GROUP


def main(report: str, additional_config: str) -> None:
    """Run all stages and end the process.

    Args:
        report: The file to report to, a line of JSON for each stage's begin and end.
        additional_config: JSON, as vLLM's `--additional-config`; empty for none.
    """
    with open(report, "a", encoding="utf-8") as file:
        probe = Probe(file, json.loads(additional_config) if additional_config else None)
        probe.run()
    # Not through the ends of what was imported, which may hang or crash, and would tell nothing.
    os._exit(0)


class Probe:
    """The stages and what they hand on."""

    def __init__(self, report: TextIO, additional_config: object) -> None:
        self._report = report
        self._additional_config = additional_config
        self._failed: set[str] = set()
        self._places: Any = None
        self._settings: Any = None
        self._strategies: Any = None
        self._platform: Any = None
        self._minor: Any = None

    def run(self) -> None:
        """Run the stages whose needs are met."""
        stages: tuple[tuple[Callable[[], Any], tuple[str, ...]], ...] = (
            (self.settings, ()),
            (self.torch, ()),
            (self.cpu, ("torch",)),
            (self.vllm, ()),
            (self.version, ("vllm",)),
            (self.platform, ("version",)),
            (self.plugins, ("platform",)),
            (self.strategies, ("platform",)),
            (self.grouping, ("plugins",)),
            (self.chosen, ("settings", "strategies")),
            (self.patches, ("plugins", "strategies")),
            (self.gpus, ("torch",)),
            (self.tile_sizes, ("gpus",)),
            (self.torchvision, ()),
        )
        for stage, needs in stages:
            if self._failed.isdisjoint(needs):
                self._run(stage)
            else:
                self._failed.add(stage.__name__)
        self._write({"end": True})

    def _run(self, stage: Callable[[], Any]) -> None:
        name = stage.__name__
        self._write({"begin": name})
        try:
            found = stage()
        except BaseException as error:  # SystemExit among them: this process only reports
            self._failed.add(name)
            self._write({"stage": name, "error": describe(error)})
        else:
            self._write({"stage": name, "found": found})

    def _write(self, entry: dict[str, Any]) -> None:
        self._report.write(json.dumps(entry, default=str) + "\n")
        self._report.flush()

    def settings(self) -> list[dict[str, Any]]:
        """Return the settings and where each came from."""
        from vllm_hybrid_kv.settings import Settings, resolve

        self._settings = resolve(self._additional_config)
        rows = []
        for name, field in Settings.model_fields.items():
            listed = get_args(field.annotation)
            choices = [str(choice) for choice in listed if isinstance(choice, str)]
            value = getattr(self._settings, name)
            if isinstance(value, bool):
                choices = ["false", "true"]
            rows.append(
                {
                    "name": name,
                    "value": value,
                    "source": self._settings.source(name),
                    "choices": choices,
                }
            )
        return rows

    def torch(self) -> dict[str, Any]:
        """Return what torch is."""
        import torch

        return {
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }

    def cpu(self) -> dict[str, Any]:
        """Return the paths of the CPU kernels that this CPU can run, and what it lacks."""
        from vllm_hybrid_kv.kernels.cpu import isa

        numba = importlib.util.find_spec("numba")
        return {
            "paths": list(isa.available()),
            "lacking": {path: list(isa.lacking(path)) for path in isa.ALL},
            "numba": importlib.metadata.version("numba") if numba else None,
        }

    def vllm(self) -> dict[str, Any]:
        """Import vLLM and return what it is."""
        import vllm
        from vllm.version import __version__, __version_tuple__

        return {
            "version": __version__,
            "minor": list(__version_tuple__[:2]),
            "folder": os.path.dirname(vllm.__file__ or ""),
        }

    def version(self) -> str:
        """Return vLLM's version, or raise where the plugin does not know it."""
        from vllm_hybrid_kv import plugin

        version, self._minor = plugin.vllm_version()
        return version

    def platform(self) -> dict[str, Any]:
        """Return the device that vLLM runs on."""
        import vllm.platforms

        self._platform = vllm.platforms.current_platform
        return {
            "device": self._platform.device_type or "",
            "cpu": bool(self._platform.is_cpu()),
            "gpu": bool(self._platform.is_cuda_alike()),
        }

    def plugins(self) -> dict[str, Any]:
        """Load vLLM's plugins as it does, and return what came of each."""
        import vllm.plugins
        from vllm import envs

        from vllm_hybrid_kv.patches import ADAPTERS
        from vllm_hybrid_kv.tools.doctor.rebindings import Places

        places = Places(importlib.import_module(ADAPTERS[self._minor]).KNOWN)
        allowed = envs.VLLM_PLUGINS
        functions = vllm.plugins.load_plugins_by_group(PLUGINS_GROUP)
        vllm.plugins.plugins_loaded = True
        rows = []
        for point in importlib.metadata.entry_points(group=PLUGINS_GROUP):
            row: dict[str, Any] = {"name": point.name, "state": "loaded", "error": None}
            if allowed is not None and point.name not in allowed:
                row["state"] = "not named in VLLM_PLUGINS"
            elif (function := functions.get(point.name)) is None:
                row["state"], row["error"] = "cannot be imported", _import_error(point)
            else:
                try:
                    function()
                except BaseException as error:
                    row["state"], row["error"] = "raises", describe(error)
            rows.append(row)
        from vllm_hybrid_kv.state import STATE

        reason = STATE.why_inactive
        return {
            "plugins": rows,
            "active": STATE.active_patches is not None,
            "left_alone": None if reason is None else describe(reason),
            "foreign": [vars(foreign) for foreign in places.foreign()],
        }

    def grouping(self) -> str | None:
        """Return what the platform groups the layers of a KV cache with; None for vLLM's own."""
        from vllm_hybrid_kv.planning.warnings import own_grouping

        return own_grouping(None)

    def strategies(self) -> dict[str, Any]:
        """Return the strategies of each setting and who brings them."""
        from vllm_hybrid_kv.errors import HybridKVStrategyError
        from vllm_hybrid_kv.hooks import HOOK_OF_SETTING
        from vllm_hybrid_kv.plugin import built_in_strategies

        strategies = self._strategies = built_in_strategies()
        errors = []
        for point in importlib.metadata.entry_points(group=STRATEGIES_GROUP):
            try:
                strategies.add_entry_point(point)
            except HybridKVStrategyError as error:
                errors.append(str(error))
        return {
            "hooks": {
                setting: {
                    "hook": hook,
                    "strategies": [
                        {"name": name, "origin": strategies.origin(name)}
                        for name in strategies.available(setting)
                    ],
                }
                for setting, hook in HOOK_OF_SETTING.items()
            },
            "errors": errors,
        }

    def chosen(self) -> dict[str, Any]:
        """Check that what the settings choose is there, and return the CPU kernels' path."""
        self._context().check(self._additional_config)
        on_cpu = self._platform.is_cpu()
        return {"isa": self._settings.kernel_isa() if on_cpu else None}

    def patches(self) -> list[dict[str, Any]]:
        """Return every patch with its edits, and whether each is in force or could be applied."""
        from vllm_hybrid_kv.patches import patches_for
        from vllm_hybrid_kv.state import STATE

        applied = STATE.active_patches
        if applied is not None:
            found = [(row.patch, row.edit, row.failures) for row in applied.table()]
        else:
            found = [
                (patch, str(edit), edit.problems())
                for patch in patches_for(self._minor, self._context())
                for edit in patch.edits
            ]
        rows: dict[str, dict[str, Any]] = {}
        for patch, edit, reasons in found:
            row = rows.setdefault(
                patch.name, {"name": patch.name, **vars(patch.notice), "edits": []}
            )
            row["edits"].append(
                {"name": edit, "in_force": applied is not None and not reasons, "why": reasons}
            )
        return list(rows.values())

    def gpus(self) -> list[dict[str, Any]]:
        """Return the GPUs that torch sees."""
        import torch

        found = []
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found.append(
                {
                    "name": properties.name,
                    "memory": properties.total_memory,
                    "capability": None
                    if torch.version.hip
                    else [properties.major, properties.minor],
                    "architecture": getattr(properties, "gcnArchName", None),
                }
            )
        return found

    def tile_sizes(self) -> dict[str, Any]:
        """Return, by compute capability, whether it is served and where its tile sizes are from."""
        import torch

        if not torch.cuda.device_count():
            return {}
        from vllm.platforms.interface import DeviceCapability

        from vllm_hybrid_kv.attention.backend import K8V4AttentionBackend
        from vllm_hybrid_kv.kernels.triton import tuning

        found = {}
        for index in range(torch.cuda.device_count()):
            capability = tuning.capability_of(torch.device("cuda", index))
            if capability is not None:
                served = K8V4AttentionBackend.supports_compute_capability(
                    DeviceCapability(*capability)
                )
                found[".".join(map(str, capability))] = {
                    "served": served,
                    "origin": tuning.origin(capability),
                }
        return found

    def torchvision(self) -> str | None:
        """Import torchvision where it is installed; transformers does, and vLLM imports that."""
        if importlib.util.find_spec("torchvision") is None:
            return None
        return str(importlib.import_module("torchvision").__version__)

    def _context(self) -> Any:
        from vllm_hybrid_kv.patches.context import Context

        def stop(error: Exception) -> Any:
            raise error

        return Context(
            strategies=self._strategies,
            on_cpu=bool(self._platform.is_cpu()),
            on_gpu=bool(self._platform.is_cuda_alike()),
            stop=stop,
        )


def _import_error(point: importlib.metadata.EntryPoint) -> dict[str, str]:
    """Return why an entry point cannot be loaded, which vLLM only logs."""
    try:
        point.load()
    except BaseException as error:
        return describe(error)
    return {"kind": "", "message": "", "missing": "", "where": ""}


def describe(error: BaseException) -> dict[str, str]:
    """Return an exception for the report; see `child.Error`."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        # Not those of the import system, which tell nothing.
        if not frame.filename.startswith("<frozen ")
    ]
    return {
        "kind": type(error).__name__,
        "message": " ".join(str(error).split()),
        "missing": (error.name or "") if isinstance(error, ModuleNotFoundError) else "",
        "where": f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "",
    }
