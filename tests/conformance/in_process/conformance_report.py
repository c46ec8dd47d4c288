# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin that runs in the process of vLLM's own tests (`-p conformance_report`).

It loads vLLM's general plugins as every process of vLLM does, so the plugin is registered through
its entry point if `VLLM_PLUGINS` allows it. It counts who makes the coordinators and writes the
outcome of every test to a file. It changes only how long a test waits for a process.

Only this folder is on `PYTHONPATH`, because `tests` is vLLM's package in that process.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

EXPECTED_MINOR = "HYBRID_KV_TEST_VLLM_MINOR"

REASON_LENGTH = 300

PATIENCE = 5.0
"""The factor on the time limits of processes. A test allows 60 s for an import of vLLM, which takes
longer on two cores that run other tests as well."""


def _prepare() -> None:
    """Check vLLM's version, and give the unpacked wheel a platform."""
    import vllm
    import vllm.platforms

    if not vllm.__version__.startswith(os.environ[EXPECTED_MINOR] + "."):
        pytest.exit(f"this is vLLM {vllm.__version__} from {vllm.__file__}", returncode=4)
    if vllm.platforms.current_platform.is_unspecified():
        # A CUDA wheel detects no device here. Set it before another module imports the name.
        from vllm.platforms.cpu import CpuPlatform

        vllm.platforms.current_platform = CpuPlatform()


def _wait_longer() -> None:
    """Multiply the time limit of every `subprocess.run`."""
    run = subprocess.run

    def patient(*args: Any, timeout: float | None = None, **kwargs: Any) -> Any:
        return run(*args, timeout=None if timeout is None else PATIENCE * timeout, **kwargs)

    subprocess.run = patient


class Coordinators:
    """Counts who made the coordinators of the managers that the tests use."""

    def __init__(self) -> None:
        self.by_strategy: Counter[str] = Counter()
        self.managers = 0
        self.managers_of_ours = 0
        self.available: list[str] = []
        self._made: weakref.WeakSet[Any] = weakref.WeakSet()

    def watch_strategies(self) -> None:
        """Record every coordinator that a strategy returns. Call it before the plugin is loaded."""
        from vllm_hybrid_kv.hooks import Strategies

        call, check = Strategies.call, Strategies.check

        def checking(strategies: Any, settings: Any) -> None:
            self.available = strategies.available("coordinator")
            check(strategies, settings)

        def recording(strategies: Any, setting: str, settings: Any, **arguments: Any) -> Any:
            result = call(strategies, setting, settings, **arguments)
            if setting == "coordinator" and result is not None:
                self._made.add(result)
                kind = type(result)
                self.by_strategy[f"{kind.__module__}.{kind.__qualname__}"] += 1
            return result

        Strategies.call = recording  # type: ignore[method-assign]
        Strategies.check = checking  # type: ignore[method-assign]

    def watch_managers(self) -> None:
        """Count the managers, and those whose coordinator a strategy made."""
        from vllm.v1.core.kv_cache_manager import KVCacheManager

        initialise = KVCacheManager.__init__

        def counting(manager: Any, *args: Any, **kwargs: Any) -> None:
            initialise(manager, *args, **kwargs)
            self.managers += 1
            self.managers_of_ours += manager.coordinator in self._made

        KVCacheManager.__init__ = counting


class Report:
    """Collects the outcome of every test."""

    def __init__(self, path: Path, left_out: frozenset[str]) -> None:
        self._path = path
        self._left_out = left_out
        self._outcomes: dict[str, str] = {}
        self._seconds: Counter[str] = Counter()
        self._reasons: dict[str, str] = {}
        self._coordinators = Coordinators()
        self._plugin_active = False

    def pytest_configure(self, config: pytest.Config) -> None:
        self._coordinators.watch_strategies()
        plugins = importlib.import_module("vllm.plugins")
        plugins.load_general_plugins()
        self._coordinators.watch_managers()

        from vllm_hybrid_kv.state import STATE

        self._plugin_active = STATE.active_patches is not None

    def pytest_ignore_collect(self, collection_path: Path, config: pytest.Config) -> bool | None:
        # A file that cannot be imported is reported under its own name.
        path = collection_path.relative_to(config.rootpath).as_posix()
        return True if path in self._left_out else None

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        dropped = [item for item in items if self._is_left_out(item.nodeid)]
        if dropped:
            config.hook.pytest_deselected(items=dropped)
            items[:] = [item for item in items if item not in dropped]
        for item in items:
            # vLLM's own marker of tests without GPU memory saves half a second each.
            item.add_marker("skip_global_cleanup")

    def _is_left_out(self, test: str) -> bool:
        return test in self._left_out or test.partition("[")[0] in self._left_out

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._note(report, "error")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid] += report.duration
        if report.failed:
            self._note(report, "failed" if report.when == "call" else "error")
        elif report.skipped:
            self._note(report, "skipped")
        elif report.when == "call":
            self._outcomes.setdefault(report.nodeid, "passed")

    def _note(self, report: pytest.CollectReport | pytest.TestReport, outcome: str) -> None:
        self._outcomes[report.nodeid] = outcome
        crash = getattr(report.longrepr, "reprcrash", None)
        text = report.longreprtext if crash is None else crash.message
        self._reasons[report.nodeid] = " ".join(text.split())[:REASON_LENGTH]

    def pytest_sessionfinish(self) -> None:
        import vllm

        counts = self._coordinators
        report = {
            "vllm": vllm.__version__,
            "plugin_active": self._plugin_active,
            "available": counts.available,
            "managers": counts.managers,
            "managers_of_ours": counts.managers_of_ours,
            "coordinators": dict(counts.by_strategy.most_common()),
            "outcomes": self._outcomes,
            "reasons": self._reasons,
            "seconds": {test: round(value, 3) for test, value in self._seconds.items()},
        }
        self._path.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance")
    group.addoption("--conformance-out", type=Path, required=True, help="where the report goes")
    group.addoption("--conformance-leave-out", type=Path, help="JSON list of node ids not to run")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--conformance-leave-out")
    left_out = frozenset(json.loads(path.read_text())) if path is not None else frozenset()
    report = Report(config.getoption("--conformance-out"), left_out)
    config.pluginmanager.register(report, "conformance_outcomes")


_prepare()
_wait_longer()
