# SPDX-License-Identifier: Apache-2.0
"""Runs the checks in a child process, and makes the verdict, the devices and the JSON."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_hybrid_kv.patches.targets import SUPPORTED
from vllm_hybrid_kv.tools.child import Child
from vllm_hybrid_kv.tools.doctor.checks import FOLDER
from vllm_hybrid_kv.tools.doctor.runner import EXIT_STATUS, NAME, Finding, capitalise, problem
from vllm_hybrid_kv.tools.machine import cpu_model
from vllm_hybrid_kv.version import __version__

SCHEMA = 2
"""Changes if a key of `Report.to_json` is removed or changes its meaning.

2: `patches` replaces `seams`, with `active` instead of `in_force`; 0.3 removes the old keys.
"""

FIRST = ("vllm", "version", "process")
"""These come before findings of the same severity, because they may cause others."""


@dataclass(frozen=True)
class Report:
    """What the checks found.

    Attributes:
        findings: The worst first.
        facts: `runner.Probe.facts` of the child process.
    """

    findings: Sequence[Finding]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def exit_status(self) -> int:
        """0 if all is well, 1 with warnings, 2 if the plugin cannot be active."""
        return max((EXIT_STATUS[finding.severity] for finding in self.findings), default=0)

    @property
    def active(self) -> bool:
        """Whether the plugin is active in a process of vLLM, with every patch verified."""
        edits = [edit for patch in self.facts.get("patches", ()) for edit in patch["edits"]]
        return bool(
            self.facts.get("active")
            and not self.facts["foreign"]
            and "patches" in self.facts
            and all(edit["active"] for edit in edits)
        )

    @property
    def verdict(self) -> str:
        """The result in one line."""
        who = f"{NAME} {__version__}"
        if self.exit_status == 2:
            return f"{who} cannot be active here: {self._count('problem')}."
        device = self.facts.get("platform", {}).get("device") or "no device"
        on = f"on vLLM {self.facts.get('vllm', {}).get('version')} ({device})"
        if not self.active:
            return f"{who} would work {on} but is not loaded: {self._count('warning')}."
        result = self._count("warning") if self.exit_status else "all is well"
        return f"{who} is active {on}: {result}."

    def _count(self, severity: str) -> str:
        count = sum(finding.severity == severity for finding in self.findings)
        return f"{count} {severity}{'' if count == 1 else 's'}"

    def to_json(self) -> dict[str, Any]:
        """Return everything; docs/doctor.schema.json describes it."""
        facts = self.facts
        torch, vllm = facts.get("torch", {}), facts.get("vllm", {})
        values = {row["name"]: row["value"] for row in facts.get("settings", ())}
        strategies = [
            {**row, "picked": values.get(row["setting"]) == row["name"]}
            for row in facts.get("strategies", ())
        ]
        names: dict[str, list[str]] = {}
        for row in strategies:
            names.setdefault(row["setting"], []).append(row["name"])
        loaded = {row["name"]: row for row in facts.get("plugins", ())}
        untried = {"state": None, "error": None}
        patches = facts.get("patches", [])
        return {
            "schema": SCHEMA,
            "exit_status": self.exit_status,
            "active": self.active,
            "verdict": self.verdict,
            "findings": [vars(finding) for finding in self.findings],
            "versions": {
                "vllm_hybrid_kv": __version__,
                "vllm": vllm.get("version"),
                "vllm_supported": SUPPORTED,
                "vllm_fits": "version" in facts if vllm else None,
                "torch": torch.get("version"),
                "cuda": torch.get("cuda"),
                "hip": torch.get("hip"),
                "numba": facts.get("cpu", {}).get("numba"),
                "python": platform.python_version(),
            },
            "folders": {"vllm_hybrid_kv": FOLDER, "vllm": vllm.get("folder")},
            "vllm_plugins": facts.get("vllm_plugins"),
            "devices": devices(facts),
            "settings": [
                {**row, "choices": names.get(row["name"], row["choices"])}
                for row in facts.get("settings", ())
            ],
            "strategies": strategies,
            "patches": patches,
            "seams": [
                {**patch, "edits": [_in_force(edit) for edit in patch["edits"]]}
                for patch in patches
            ],
            "plugins": [
                {**point, **loaded.get(point["name"], untried)}
                for point in facts.get("entry_points", ())
            ],
        }


def diagnose(additional_config: str = "", timeout: float = 180.0) -> Report:
    """Check this environment.

    Args:
        additional_config: JSON for vLLM's `--additional-config`; empty for none.
        timeout: Seconds after which the child process is killed.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-hybrid-kv-doctor-") as folder:
        run, log = "vllm_hybrid_kv.tools.doctor.runner:run", Path(folder) / "log"
        with Child(run, additional_config, log=log, timeout=timeout) as child:
            messages = list(child.messages())
        return read(messages, child.problem, child.last_output())


def read(messages: Iterable[dict[str, Any]], ending: str | None, output: Sequence[str]) -> Report:
    """Return the report of a child process that may have ended early.

    Args:
        messages: The messages of `runner.run_checks`.
        ending: How the process ended, if it failed.
        output: The last lines that it printed.
    """
    facts: dict[str, Any] = {}
    findings: list[Finding] = []
    activity: str | None = "starting Python"
    for message in messages:
        activity = None if "end" in message else message.get("begin", activity)
        facts.update(message.get("facts", {}))
        findings += (Finding(**finding) for finding in message.get("findings", ()))
    if activity is not None:
        text = f"{capitalise(activity)} {ending or 'ended with exit status 0'}"
        text += f"; its last output is: {output[-1]}" if output else ""
        remedy = (
            "Allow more time with --timeout"
            if ending and ending.startswith("took ")
            else "Reinstall the package that is named, in a build for this machine"
        )
        findings.append(problem("process", text, remedy))
    findings.sort(key=lambda one: (-EXIT_STATUS[one.severity], one.check not in FIRST))
    return Report(findings, facts)


def _in_force(edit: dict[str, Any]) -> dict[str, Any]:
    """Return an edit with the key of schema 1."""
    return {("in_force" if key == "active" else key): value for key, value in edit.items()}


def devices(facts: dict[str, Any]) -> list[dict[str, str | None]]:
    """Return the CPU and the GPUs that torch can use.

    Returns:
        `kind` (`cpu` or `gpu`), `name`, the k8v4 `kernels` (None without any), and `why`.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    count = len(affinity(0)) if affinity else os.cpu_count()
    kernels, why = _cpu(facts)
    name = f"{cpu_model()}, {count} core{'' if count == 1 else 's'}"
    rows = [{"kind": "cpu", "name": name, "kernels": kernels, "why": why}]
    for gpu in facts.get("gpus", ()):
        kernels, why = _gpu(gpu, facts)
        name = f"{gpu['name']}, {gpu['memory'] / (1 << 30):.0f} GiB"
        rows.append({"kind": "gpu", "name": name, "kernels": kernels, "why": why})
    return rows


def _cpu(facts: dict[str, Any]) -> tuple[str | None, str]:
    cpu, platform = facts.get("cpu"), facts.get("platform")
    if cpu is None:
        return None, "unknown without torch, which reads the CPU's instructions"
    if platform is not None and not platform["cpu"]:
        return None, f"vLLM runs on {platform['device'] or 'no known device'}"
    paths, lacking = cpu["paths"], cpu["lacking"]
    isa = facts.get("isa") or paths[-1]
    sources = {row["name"]: row["source"] for row in facts.get("settings", ())}
    chosen_by = f"chosen by {sources.get('cpu_isa', 'default')}"
    if isa == "interpreter":
        return "triton, interpreted", chosen_by
    if isa != paths[-1]:
        why = f"{chosen_by}; {paths[-1]} would be faster"
    else:
        why = "the fastest on this CPU"
        if faster := [path for path in lacking if path not in paths]:
            missing = ", ".join(lacking[faster[0]])
            reason = f"needs {missing}" if missing else "is refused by the operating system"
            why += f"; {faster[0]} {reason}"
    if isa != "portable":
        why += "; for bfloat16 and head sizes that are multiples of 32, portable otherwise"
    return f"cpu:{isa}", why


def _gpu(gpu: dict[str, Any], facts: dict[str, Any]) -> tuple[str | None, str]:
    platform, capability = facts.get("platform"), gpu["capability"]
    if platform is None:
        return None, "unknown, because vLLM's device is unknown"
    if not platform["gpu"]:
        return None, f"vLLM runs on {platform['device'] or 'no known device'}"
    if capability is None:
        return "triton", f"tile sizes derived, not measured on {gpu['architecture']}"
    row = facts.get("tile_sizes", {}).get(capability)
    if row is None:
        return None, f"tile sizes are unknown for compute capability {capability}"
    if not row["served"]:
        return None, f"compute capability {capability}; the kernels need 7.5"
    if row["origin"] == "measured":
        return "triton", f"tile sizes measured on compute capability {capability}"
    return "triton", f"tile sizes derived, not measured on compute capability {capability}"
