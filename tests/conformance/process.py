# SPDX-License-Identifier: Apache-2.0
"""Run vLLM's tests in a child process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from testing import processes
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
        plugin_active: Whether the plugin was active.
        available: The registered coordinator strategies.
        managers: How many `KVCacheManager`s the tests made.
        managers_of_ours: How many of these managers have a coordinator that the strategy made.
        outcomes: `passed`, `failed`, `error` or `skipped` for each node id.
        reasons: The message of each node id that did not pass.
    """

    minor: str
    strategy: str | None
    vllm: str
    plugin_active: bool
    available: list[str]
    managers: int
    managers_of_ours: int
    outcomes: dict[str, str]
    reasons: dict[str, str]

    @property
    def name(self) -> str:
        return f"vLLM {self.minor} {f'with {self.strategy}' if self.strategy else 'alone'}"

    def having(self, *outcomes: str) -> frozenset[str]:
        """Return the tests with one of these outcomes."""
        return frozenset(test for test, outcome in self.outcomes.items() if outcome in outcomes)

    def check_plugin(self) -> None:
        """Check that the strategy made all coordinators; without one, that the plugin was inactive.

        Raises:
            ConformanceError: The check failed.
        """
        if self.plugin_active != (self.strategy is not None):
            state = "active" if self.plugin_active else "not active"
            raise ConformanceError(f"{self.name}: the plugin was {state}")
        if self.plugin_active and not self.managers_of_ours == self.managers > 0:
            raise ConformanceError(
                f"{self.name}: the tests made {self.managers} KV cache managers, "
                f"{self.managers_of_ours} with a coordinator that the strategy made"
            )


def run(
    minor: str,
    strategy: str | None,
    selection: Sequence[str] = (releases.SUITE,),
    left_out: Collection[str] = (),
) -> Report:
    """Run vLLM's tests of a minor with a strategy, and check that the strategy was in use.

    Args:
        minor: vLLM's minor.
        strategy: The coordinator strategy; None to run without the plugin.
        selection: Files, folders or node ids, relative to the folder of the release.
        left_out: Files and node ids to skip. A node id without brackets skips all parametrised
            cases of the test.

    Raises:
        ConformanceError: pytest failed or took too long, or `Report.check_plugin` raised.
    """
    tests = releases.fetch_tests(minor)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "report.json"
        releases.write_model_configurations(Path(scratch))
        command = [
            *(sys.executable, "-m", "pytest", "-q", "--tb=short"),
            # Without `-c`, pytest may use a configuration file from a parent folder.
            *("-c", tests / "pyproject.toml"),
            *("-p", "conformance_report", "-p", "no:cacheprovider", "-p", "no:warnings"),
            *("--timeout", TEST_TIMEOUT_S, "--continue-on-collection-errors"),
            *(f"--ignore={tests / file}" for file in left_out if "::" not in file),
            *(tests / selected for selected in selection),
        ]
        path = IN_PROCESS, releases.fetch_test_tools(), releases.unpacked_wheel(minor)
        environment = {
            **releases.environment_of(minor, *path),
            "HYBRID_KV_TEST_LEFT_OUT": json.dumps(sorted(left_out)),
            "HYBRID_KV_TEST_REPORT": str(out),
            # If VLLM_PLUGINS names the plugin, the plugin raises an error on an unsupported vLLM.
            # If VLLM_PLUGINS is empty, vLLM loads no plugin.
            "VLLM_PLUGINS": "" if strategy is None else "hybrid_kv",
        }
        if strategy is not None:
            environment["VLLM_HYBRID_KV_COORDINATOR"] = strategy
        try:
            done = processes.run(
                command,
                cwd=Path(scratch),
                timeout_s=RUN_TIMEOUT_S,
                without=releases.OUTER_VARIABLES,
                **environment,
            )
        except subprocess.TimeoutExpired as error:
            raise ConformanceError(f"vLLM {minor}, {strategy}: {error}") from error
        # Exit status 1 means that tests failed. Above 1, pytest itself failed.
        if done.returncode not in (0, 1) or not out.is_file():
            raise ConformanceError(
                f"vLLM {minor}, {strategy}: pytest ended with {done.returncode}\n"
                f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
            )
        report = Report(minor=minor, strategy=strategy, **json.loads(out.read_text()))
    report.check_plugin()
    return report
