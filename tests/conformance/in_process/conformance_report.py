# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin that reports the outcomes of vLLM's own tests (`-p conformance_report`).

Like every vLLM process, it loads vLLM's general plugins, so `hybrid_kv` is registered through its
entry point if `VLLM_PLUGINS` allows it. It counts the coordinators that the strategy makes, and
writes the outcome of every test to a file. It changes only how long a test waits for a process.

`PYTHONPATH` names this file's folder, because in that process `tests` is vLLM's package, not ours.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import vllm
import vllm.platforms
import vllm.plugins

EXPECTED_MINOR = "HYBRID_KV_TEST_VLLM_MINOR"
LEFT_OUT = frozenset(json.loads(os.environ["HYBRID_KV_TEST_LEFT_OUT"]))

REASON_LENGTH = 300

PATIENCE = 5.0
"""Time limits of processes are multiplied by this. One test allows 60 s to import vLLM, which takes
longer if other tests run on the same two cores."""

REPORT: dict[str, Any] = {
    "vllm": vllm.__version__,
    "plugin_active": False,
    "available": [],
    "managers": 0,
    "managers_of_ours": 0,
    "outcomes": {},
    "reasons": {},
}
"""What the file will contain; see `tests.conformance.process.Report`."""


def _wait_longer() -> None:
    run = subprocess.run

    def patient(*args: Any, timeout: float | None = None, **kwargs: Any) -> Any:
        return run(*args, timeout=None if timeout is None else PATIENCE * timeout, **kwargs)

    subprocess.run = patient


def _count_managers() -> None:
    """Count all KV cache managers, and those whose coordinator the strategy made."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    from vllm_hybrid_kv.hooks import STOCK, Strategies

    call, initialise = Strategies.call, KVCacheManager.__init__
    last: list[Any] = []

    def recording(self: Any, setting: str, settings: Any, **arguments: Any) -> Any:
        result = call(self, setting, settings, **arguments)
        if setting == "coordinator":
            # With `stock`, vLLM makes the coordinator, which counts as made by the strategy.
            last[:] = [STOCK if settings.coordinator == STOCK else result]
        return result

    def counting(self: Any, *args: Any, **kwargs: Any) -> None:
        last.clear()
        initialise(self, *args, **kwargs)
        REPORT["managers"] += 1
        REPORT["managers_of_ours"] += last in ([STOCK], [self.coordinator])

    Strategies.call = recording  # type: ignore[method-assign]
    KVCacheManager.__init__ = counting


def pytest_configure() -> None:
    if not vllm.__version__.startswith(os.environ[EXPECTED_MINOR] + "."):
        pytest.exit(f"this is vLLM {vllm.__version__} from {vllm.__file__}", returncode=4)
    vllm.plugins.load_general_plugins()
    _count_managers()

    from vllm_hybrid_kv.state import STATE

    if STATE.strategies is not None:
        REPORT["plugin_active"] = True
        REPORT["available"] = STATE.strategies.available("coordinator")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    dropped = [item for item in items if {item.nodeid, item.nodeid.partition("[")[0]} & LEFT_OUT]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in dropped]
    for item in items:
        # With this marker, vLLM does not free GPU memory after a test, which takes half a second.
        item.add_marker("skip_global_cleanup")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _note(report, "error")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _note(report, "failed" if report.when == "call" else "error")
    elif report.skipped:
        _note(report, "skipped")
    elif report.when == "call":
        REPORT["outcomes"].setdefault(report.nodeid, "passed")


def _note(report: pytest.CollectReport | pytest.TestReport, outcome: str) -> None:
    REPORT["outcomes"][report.nodeid] = outcome
    crash = getattr(report.longrepr, "reprcrash", None)
    text = report.longreprtext if crash is None else crash.message
    REPORT["reasons"][report.nodeid] = " ".join(text.split())[:REASON_LENGTH]


def pytest_sessionfinish() -> None:
    Path(os.environ["HYBRID_KV_TEST_REPORT"]).write_text(json.dumps(REPORT) + "\n")


if vllm.platforms.current_platform.is_unspecified():
    # vLLM's CUDA wheel detects no device. Set the platform before another module imports it.
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms.current_platform = CpuPlatform()
_wait_longer()
