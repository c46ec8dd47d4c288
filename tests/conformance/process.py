# SPDX-License-Identifier: Apache-2.0
"""Runs vLLM's tests in a child process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
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
        plugin_active: Whether the plugin was active.
        available: The registered coordinator strategies.
        managers: The number of `KVCacheManager`s that the tests made.
        managers_of_ours: The number of these managers whose coordinator the strategy made.
        outcomes: `passed`, `failed`, `error` or `skipped` by node id.
        reasons: Messages of tests that did not pass, by node id.
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
        """Check that the plugin was active if and only if a strategy was chosen.

        Raises:
            ConformanceError: The plugin was active without a strategy or inactive with one, or a
                coordinator of the tests was not the strategy's.
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
    """Run vLLM's tests.

    Args:
        minor: vLLM's minor.
        strategy: The coordinator strategy; None to run without the plugin.
        selection: Files, folders or node ids, relative to the folder of the release.
        left_out: Node ids of tests and files to skip. A node id without brackets skips all
            parametrised cases of the test.

    Raises:
        ConformanceError: pytest failed or took too long, or `Report.check_plugin` raised.
    """
    tests = releases.fetch_tests(minor)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "report.json"
        releases.write_model_configurations(Path(scratch))
        environment = _environment(minor, strategy)
        environment["HYBRID_KV_TEST_LEFT_OUT"] = json.dumps(sorted(left_out))
        environment["HYBRID_KV_TEST_REPORT"] = str(out)
        try:
            done = subprocess.run(
                [
                    *(sys.executable, "-m", "pytest", "-q", "--tb=short"),
                    # Otherwise pytest may use a configuration file from a parent folder.
                    *("-c", str(tests / "pyproject.toml")),
                    *("-p", "conformance_report", "-p", "no:cacheprovider", "-p", "no:warnings"),
                    *("--timeout", str(TEST_TIMEOUT_S), "--continue-on-collection-errors"),
                    *(f"--ignore={tests / file}" for file in left_out if "::" not in file),
                    *(str(tests / selected) for selected in selection),
                ],
                cwd=scratch,
                env=environment,
                capture_output=True,
                text=True,
                timeout=RUN_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ConformanceError(f"vLLM {minor}, {strategy}: {error}") from error
        # Exit status 1 means that tests failed, a higher one that pytest itself failed.
        if done.returncode not in (0, 1) or not out.is_file():
            raise ConformanceError(
                f"vLLM {minor}, {strategy}: pytest ended with {done.returncode}\n"
                f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
            )
        report = Report(minor=minor, strategy=strategy, **json.loads(out.read_text()))
    report.check_plugin()
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
        # vLLM caches model classes here; the installed release must not read that cache.
        environment["VLLM_CACHE_ROOT"] = str(releases.CACHE / f"vllm-{minor}-cache")
    return environment
