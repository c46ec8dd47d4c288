# SPDX-License-Identifier: Apache-2.0
"""Run `python -m benchmarks.gpu` from start to end, in Triton's interpreter."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.processes import share_out
from benchmarks.gpu.report import JSON, MARKDOWN
from benchmarks.gpu.sections import LARGEST_DISTANCE
from testing import processes

ROOT = Path(__file__).parents[2]


def command(*arguments: object, interpret: bool = True) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", *arguments]
    mode = str(int(interpret))
    return processes.run(words, cwd=ROOT, TRITON_INTERPRET=mode, OMP_NUM_THREADS="1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Run the benchmark with its smallest shapes; return the JSON and the Markdown."""
    folder = tmp_path_factory.mktemp("gpu")
    done = command("--out", folder, "--smallest")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / JSON).read_text()), (folder / MARKDOWN).read_text()


def test_every_section_runs_ours_and_stocks_kernels(run: tuple[dict[str, Any], str]) -> None:
    found = {one["section"]: set(one["ms"]) for one in run[0]["results"]}
    paged = {"ours", "stock k8v4", "unified fp8", "unified bf16"}
    assert found == {
        "decode": paged,
        "verify": paged | {"ours, one token"},
        "chunked": paged,
        "prefill": {"ours", "stock k8v4", "unified bf16"},
        "store": {"ours", "stock k8v4", "copy"},
    }


def test_all_contenders_compute_the_same(run: tuple[dict[str, Any], str]) -> None:
    distances = [d for one in run[0]["results"] for d in one.get("distance", {}).values()]
    assert len(distances) == 3 + 3 + 3 + 2
    assert max(distances) < LARGEST_DISTANCE / 2


def test_the_checks_pass_or_need_a_gpu(run: tuple[dict[str, Any], str]) -> None:
    outcomes = {one["name"]: one["outcome"] for one in run[0]["checks"]}
    assert outcomes.pop("a graph follows the lengths") == "unavailable"
    assert set(outcomes.values()) == {"passed"}


def test_contenders_left_out_are_named_with_the_reason(run: tuple[dict[str, Any], str]) -> None:
    for name in ("FlashAttention bf16", "FlashAttention fp8", "torch's FlashAttention 2 bf16"):
        assert f"- left out: {name}: there is no GPU" in run[1]


def test_an_interpreted_run_reports_no_speeds(run: tuple[dict[str, Any], str]) -> None:
    everything, text = run
    assert "this report contains no speeds" in text
    for unit in ("µs", "GB/s", "TFLOP", "% ", "Goals"):
        assert unit not in text
    assert everything["times_mean_something"] is False
    assert everything["goals"] == []


def test_tuning_in_the_interpreter_tries_sizes_and_makes_no_rows(tmp_path: Path) -> None:
    done = command("--out", tmp_path, "--smallest", "--tune")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_tuning.json").read_text())
    (task,) = found["tasks"]
    assert [set(one) for one in task["tried"]] == [{"candidate", "times_as_fast"}] * 3
    assert found["rows"] == []


def test_processes_share_work_until_the_time_is_up() -> None:
    assert share_out(math.sqrt, [4.0, 9.0, 16.0], seconds=300.0) == [2.0, 3.0, 4.0]
    assert share_out(os.strerror, [1, 2], seconds=0.0) == [None, None]


def test_the_interpreter_rejects_sizes_that_take_hours(tmp_path: Path) -> None:
    done = command("--out", tmp_path, "--quick")
    assert done.returncode == 2
    assert "--smallest" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_explains_how_to_try_it(tmp_path: Path) -> None:
    done = command("--out", tmp_path, interpret=False)
    assert done.returncode == 1
    assert "torch finds no GPU; to try the command without one" in done.stderr
