# SPDX-License-Identifier: Apache-2.0
"""The whole of what the doctor found, as the screen and `--json` show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vllm_hybrid_kv.patches import SUPPORTED
from vllm_hybrid_kv.tools.doctor import child, installation
from vllm_hybrid_kv.tools.doctor.checks import NAME, check
from vllm_hybrid_kv.tools.doctor.child import Answer
from vllm_hybrid_kv.tools.doctor.devices import Device, devices
from vllm_hybrid_kv.tools.doctor.findings import Finding, Severity, exit_status
from vllm_hybrid_kv.tools.doctor.installation import Installation

SCHEMA = 1
"""Counts changes of `as_json` that take a key away or give it another meaning."""


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        installation: What metadata and the environment say.
        answer: What vLLM's process reported.
        findings: What a user should know, the worst first.
        devices: Devices and their kernels.
    """

    installation: Installation
    answer: Answer
    findings: list[Finding]
    devices: list[Device]

    @property
    def exit_status(self) -> int:
        """See `findings.exit_status`."""
        return exit_status(self.findings)

    @property
    def active(self) -> bool:
        """Whether the plugin is in force in a process of vLLM's, every patch verified."""
        plugins = self.answer.found.get("plugins") or {"active": False, "foreign": []}
        return (
            plugins["active"]
            and not plugins["foreign"]
            and "patches" in self.answer.found
            and all(edit["in_force"] for patch in self.patches for edit in patch["edits"])
        )

    @property
    def vllm_version(self) -> str | None:
        """The version of vLLM that is imported."""
        found = self.answer.found.get("vllm")
        return found["version"] if found else None

    @property
    def patches(self) -> list[dict[str, Any]]:
        """The patches with their edits, as `probe.Probe.patches` returns them."""
        found: list[dict[str, Any]] = self.answer.found.get("patches", [])
        return found

    @property
    def settings(self) -> list[dict[str, Any]]:
        """The settings, as `probe.Probe.settings` returns them, with the strategies to choose."""
        names: dict[str, list[str]] = {}
        for strategy in self.strategies:
            names.setdefault(strategy["setting"], []).append(strategy["name"])
        return [
            {**row, "choices": names.get(row["name"], row["choices"])}
            for row in self.answer.found.get("settings", [])
        ]

    @property
    def strategies(self) -> list[dict[str, Any]]:
        """Every strategy of every hook, who brings it, and whether the settings pick it."""
        picked = {row["name"]: row["value"] for row in self.answer.found.get("settings", [])}
        hooks: Mapping[str, Any] = self.answer.found.get("strategies", {}).get("hooks", {})
        return [
            {
                "setting": setting,
                "hook": hook["hook"],
                **strategy,
                "picked": picked.get(setting) == strategy["name"],
            }
            for setting, hook in hooks.items()
            for strategy in hook["strategies"]
        ]

    @property
    def plugins(self) -> list[dict[str, Any]]:
        """Every plugin of vLLM's, who brings it, and what came of it; None where not tried."""
        tried = {
            row["name"]: row for row in self.answer.found.get("plugins", {}).get("plugins", ())
        }
        return [
            {
                **asdict(point),
                "state": tried.get(point.name, {}).get("state"),
                "error": tried.get(point.name, {}).get("error"),
            }
            for point in self.installation.plugins
        ]

    @property
    def verdict(self) -> str:
        """One line that says it all."""
        who = f"{NAME} {self.installation.plugin_version}"
        if (status := self.exit_status) == 2:
            return f"{who} cannot be active here: {self._count(Severity.PROBLEM)}."
        device = self.answer.found.get("platform", {}).get("device") or "no device"
        on = f"on vLLM {self.vllm_version} ({device})"
        if not self.active:
            return f"{who} would work {on} and is not loaded: {self._count(Severity.WARNING)}."
        said = "all is well" if status == 0 else self._count(Severity.WARNING)
        return f"{who} is active {on}: {said}."

    def _count(self, severity: Severity) -> str:
        count = sum(finding.severity is severity for finding in self.findings)
        return f"{count} {severity.value}{'' if count == 1 else 's'}"

    def as_json(self) -> dict[str, Any]:
        """Return everything; docs/doctor.md describes the keys."""
        found = self.answer.found
        torch, vllm = found.get("torch") or {}, found.get("vllm") or {}
        return {
            "schema": SCHEMA,
            "exit_status": self.exit_status,
            "active": self.active,
            "verdict": self.verdict,
            "findings": [
                {**asdict(finding), "severity": finding.severity.value} for finding in self.findings
            ],
            "versions": {
                "vllm_hybrid_kv": self.installation.plugin_version,
                "vllm": self.vllm_version,
                "vllm_supported": SUPPORTED,
                "vllm_fits": "version" in found if vllm else None,
                "torch": torch.get("version"),
                "cuda": torch.get("cuda"),
                "hip": torch.get("hip"),
                "numba": (found.get("cpu") or {}).get("numba"),
                "python": self.installation.python,
            },
            "folders": {
                "vllm_hybrid_kv": self.installation.plugin_folder,
                "vllm": vllm.get("folder"),
            },
            "vllm_plugins": (
                None
                if self.installation.vllm_plugins is None
                else list(self.installation.vllm_plugins)
            ),
            "devices": [asdict(device) for device in self.devices],
            "settings": self.settings,
            "strategies": self.strategies,
            "patches": self.patches,
            "plugins": self.plugins,
        }


def diagnose(additional_config: str = "", timeout: float = 180.0) -> Diagnosis:
    """Look at this environment.

    Args:
        additional_config: JSON, as it would be given to vLLM's `--additional-config`.
        timeout: Seconds that vLLM's process may take.
    """
    installed = installation.look()
    answer = child.ask(additional_config, timeout)
    return Diagnosis(installed, answer, check(installed, answer), devices(installed, answer))
