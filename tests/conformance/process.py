# SPDX-License-Identifier: Apache-2.0
"""Runs vLLM's tests in a child process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.conformance import releases
from tests.conformance.releases import ConformanceError

IN_PROCESS = Path(__file__).resolve().parent / "in_process"

TEST_TIMEOUT_S = 300
RUN_TIMEOUT_S = 3600


@dataclass(frozen=True)
class Report:
    """The result of one run.

    Attributes:
        minor: vLLM's minor.
        strategy: The coordinator strategy; None without the plugin.
        vllm: vLLM's version.
        outcomes: `passed`, `failed`, `error` or `skipped` by node id.
        reasons: Messages of tests that did not pass, by node id.
        seconds: Durations of the tests.
        managers: The number of `KVCacheManager`s that the tests made.
        managers_of_ours: The number of these managers whose coordinator the strategy made.
        coordinators: How many coordinators the strategy made, by class.
        available: The registered coordinator strategies.
    """

    minor: str
    strategy: str | None
    vllm: str
    outcomes: dict[str, str]
    reasons: dict[str, str]
    seconds: dict[str, float]
    managers: int
    managers_of_ours: int
    coordinators: dict[str, int]
    available: list[str]

    @property
    def name(self) -> str:
        return _name(self.minor, self.strategy)

    def count(self, outcome: str) -> int:
        """Return the number of tests with an outcome."""
        return Counter(self.outcomes.values())[outcome]

    def having(self, *outcomes: str) -> frozenset[str]:
        """Return the tests with one of these outcomes."""
        return frozenset(test for test, outcome in self.outcomes.items() if outcome in outcomes)


def run(
    minor: str,
    strategy: str | None,
    selection: Sequence[str] = (releases.SUITE,),
    leave_out: Collection[str] = (),
) -> Report:
    """Run vLLM's tests.

    Args:
        minor: vLLM's minor.
        strategy: The coordinator strategy; None to run without the plugin.
        selection: Files, folders or node ids, from the folder of the release.
        leave_out: Node ids of tests and files to skip. A node id without brackets skips all
            parametrised cases of the test.

    Raises:
        ConformanceError: pytest failed or took too long, or `check_plugin` raised.
    """
    tests = releases.fetch_tests(minor)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "models"
        folder.mkdir()
        releases.write_model_configurations(folder)
        left_out, out = Path(scratch) / "leave_out.json", Path(scratch) / "report.json"
        left_out.write_text(json.dumps(sorted(leave_out)))
        try:
            done = subprocess.run(
                [
                    *(sys.executable, "-m", "pytest", "-q", "--tb=short"),
                    # Otherwise pytest may use a configuration file from a parent folder.
                    *("-c", str(tests / "pyproject.toml")),
                    *("-p", "conformance_report", "-p", "no:cacheprovider", "-p", "no:warnings"),
                    *("--conformance-out", str(out), "--conformance-leave-out", str(left_out)),
                    *("--timeout", str(TEST_TIMEOUT_S), "--continue-on-collection-errors"),
                    *(str(tests / selected) for selected in selection),
                ],
                cwd=folder,
                env=_environment(minor, strategy),
                capture_output=True,
                text=True,
                timeout=RUN_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ConformanceError(f"{_name(minor, strategy)}: {error}") from error
        # Exit status 1 means that tests failed, a higher one that pytest itself failed.
        if done.returncode not in (0, 1) or not out.is_file():
            raise ConformanceError(
                f"{_name(minor, strategy)}: pytest ended with {done.returncode}\n"
                f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
            )
        found = json.loads(out.read_text())
    active = found.pop("plugin_active")
    report = Report(minor=minor, strategy=strategy, **found)
    check_plugin(report, active)
    return report


def _environment(minor: str, strategy: str | None) -> dict[str, str]:
    ours = ("VLLM_HYBRID_KV_", "HYBRID_KV_TEST_", "PYTEST_", "PYTHONPATH", "VLLM_PLUGINS")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    wheel = releases.unpacked_wheel(minor)
    path = [IN_PROCESS, releases.fetch_test_tools(), *([wheel] if wheel else [])]
    environment |= {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "HYBRID_KV_TEST_VLLM_MINOR": minor,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # If the variable names the plugin, an unsupported vLLM is an error. If it is empty, vLLM
        # loads no plugin.
        "VLLM_PLUGINS": "" if strategy is None else "hybrid_kv",
    }
    if strategy is not None:
        environment["VLLM_HYBRID_KV_COORDINATOR"] = strategy
    if wheel is not None:
        # The installed release must not read what this one caches about model classes.
        environment["VLLM_CACHE_ROOT"] = str(releases.CACHE / f"vllm-{minor}-cache")
    return environment


def check_plugin(report: Report, active: bool) -> None:
    """Check that the plugin was active if and only if a strategy was chosen.

    Args:
        report: The run.
        active: Whether the plugin was active in the run.

    Raises:
        ConformanceError: The plugin was active without a strategy or inactive with one, or a
            coordinator of the tests was not the strategy's.
    """
    if active != (report.strategy is not None):
        raise ConformanceError(
            f"{report.name}: the plugin was {'active' if active else 'not active'}"
        )
    if active and not report.managers_of_ours == report.managers > 0:
        raise ConformanceError(
            f"{report.name}: the tests made {report.managers} KV cache managers, "
            f"{report.managers_of_ours} with a coordinator that the strategy made"
        )


def _name(minor: str, strategy: str | None) -> str:
    return f"vLLM {minor} {'without the plugin' if strategy is None else f'with {strategy}'}"
