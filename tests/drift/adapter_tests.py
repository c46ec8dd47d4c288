# SPDX-License-Identifier: Apache-2.0
"""The adapters' tests against a release, with an adapter of the package or a proposed one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from tests.adapter_suites import SUITES, Suite
from tests.conformance.releases import CACHE, REPOSITORY
from tests.drift.release import Release

IN_PROCESS = Path(__file__).resolve().parent / "in_process"
TIMEOUT_S = 1200


@dataclass(frozen=True)
class Outcome:
    """How the tests ended.

    Attributes:
        passed: How many passed.
        skipped: How many were skipped.
        failed: Which did not, and the first line of why.
    """

    passed: int
    skipped: int
    failed: dict[str, str]

    @property
    def fits(self) -> bool:
        """Whether there were tests and all passed."""
        return self.passed > 0 and not self.failed


def run(
    release: Release, proposed: str | None, suites: Sequence[Suite] = SUITES, jobs: int = 2
) -> Outcome:
    """Run the tests.

    Args:
        release: What to put in the place of the installed vLLM.
        proposed: The source of an adapter for its minor; None for the package's.
        suites: The tests.
        jobs: Processes at a time.
    """
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(jobs) as pool:
        environment = _environment(release, proposed, Path(scratch))
        lent = proposed is not None

        def run_one(numbered: tuple[int, Suite]) -> Outcome:
            number, suite = numbered
            own = {**environment, "VLLM_TARGET_DEVICE": "cpu"} if suite.engines else environment
            return _run(suite, Path(scratch) / f"{number}.xml", own, lent)

        outcomes = list(pool.map(run_one, enumerate(suites)))
    return Outcome(
        sum(outcome.passed for outcome in outcomes),
        sum(outcome.skipped for outcome in outcomes),
        {test: why for outcome in outcomes for test, why in outcome.failed.items()},
    )


def _environment(release: Release, proposed: str | None, scratch: Path) -> dict[str, str]:
    ours = ("VLLM_HYBRID_KV_", "HYBRID_KV_TEST_", "PYTEST_", "PYTHONPATH", "VLLM_PLUGINS")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    minor = "{}.{}".format(*release.minor)
    path = [scratch, IN_PROCESS, *([] if release.installed else [release.folder])]
    environment |= {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "HYBRID_KV_TEST_VLLM_MINOR": minor,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if not release.installed:
        environment["VLLM_CACHE_ROOT"] = str(CACHE / "vllm-drift-cache")
    if proposed is not None:
        module = f"v{minor.replace('.', '_')}"
        (scratch / f"{module}.py").write_text(proposed)
        environment["HYBRID_KV_DRIFT_ADAPTER"] = f"{minor}={module}"
        # Processes of engines do not load pytest's plugin.
        (scratch / "sitecustomize.py").write_text("import lend_adapter; lend_adapter.lend()\n")
    return environment


def _run(suite: Suite, out: Path, environment: dict[str, str], lent: bool) -> Outcome:
    folder = REPOSITORY / "tests" / suite.folder
    # Else what names begin with depends on what the folder and this repository have in common.
    root = REPOSITORY if folder.is_relative_to(REPOSITORY) else folder
    try:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
                *("--rootdir", str(root)),
                *(("-p", "lend_adapter") if lent else ()),
                *("--junitxml", str(out), *suite.arguments()),
            ],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        said = f"{done.stdout}\n{done.stderr}"
    except subprocess.TimeoutExpired:
        said = f"no end after {TIMEOUT_S} s"
    if not out.is_file():
        return Outcome(0, 0, {f"tests/{suite.folder}": said.strip()[-2000:]})
    passed, skipped, failed = read_junit(out)
    if not passed and not failed:
        failed = {f"tests/{suite.folder}": "no test was run"}
    return Outcome(passed, skipped, failed)


def read_junit(file: Path) -> tuple[int, int, dict[str, str]]:
    """Return how many tests passed and were skipped, and which did not pass, each with why.

    Args:
        file: As pytest writes it.
    """
    passed = skipped = 0
    failed = {}
    for case in ElementTree.parse(file).getroot().iter("testcase"):
        parts = (case.get("classname", ""), case.get("name", ""))
        problem = next((part for part in case if part.tag in ("failure", "error")), None)
        if problem is not None:
            lines = (problem.get("message") or problem.text or "").strip().splitlines()
            failed["::".join(filter(None, parts))] = lines[0] if lines else problem.tag
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return passed, skipped, failed
