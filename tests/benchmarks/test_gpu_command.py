# SPDX-License-Identifier: Apache-2.0
"""Rehearse `python -m benchmarks.gpu` from start to end, in Triton's interpreter, with faults."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.__main__ import main
from benchmarks.gpu.children import (
    DONE,
    FAILED,
    LOST,
    OUT_OF_TIME,
    Child,
    Outcome,
    share_out,
)
from benchmarks.gpu.predictions import predict_jobs
from benchmarks.gpu.report import JSON, MARKDOWN, REHEARSAL, Report, write_summary
from benchmarks.gpu.run import _measure
from benchmarks.gpu.sections import LARGEST_DISTANCE
from benchmarks.gpu.shapes import PARTS, REHEARSED
from testing import processes
from tests.benchmarks import planted_gpu

ROOT = Path(__file__).parents[2]


def command(
    *arguments: object, module: str = "benchmarks.gpu", **environment: str
) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    return processes.run(words, cwd=ROOT, OMP_NUM_THREADS="1", **environment)


def planted(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return command(
        *("--out", folder, "--rehearse", *arguments),
        module="tests.benchmarks.planted_gpu",
        TRITON_INTERPRET="1",
        VLLM_HYBRID_KV_CPU_ISA="interpreter",
    )


Parts = dict[str, dict[str, Any]]


def parts_of(folder: Path) -> Parts:
    files = {part: folder / JSON.format(part) for part in PARTS}
    return {part: json.loads(file.read_text()) for part, file in files.items() if file.exists()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Parts, str]:
    """Run all parts with a kernel that aborts and one that raises; return JSON and Markdown."""
    folder = tmp_path_factory.mktemp("gpu")
    chosen = [word for part in PARTS for word in ("--part", part)]
    done = planted(folder, *chosen, "--budget", 100_000)
    assert done.returncode == 1, done.stdout + done.stderr
    parts = parts_of(folder)
    # The parts share the time limit.
    assert parts["decode"]["budget"] == pytest.approx(100_000 * 240 / 780)
    return parts, (folder / MARKDOWN).read_text()


def results(parts: Parts) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for part in parts.values():
        for result in part["results"]:
            found.setdefault(result["section"], []).append(result)
    return found


PAGED = {"ours", "stock k8v4", "unified fp8", "unified bf16"}


def test_every_section_runs_ours_and_vllms_kernels(run: tuple[Parts, str]) -> None:
    found = {section: set(of[0]["ms"]) for section, of in results(run[0]).items()}
    alone = {"ours, decodes alone", "ours, prefills alone"}
    assert found == {
        "decode": PAGED - {"unified bf16"},  # a fault is planted, see below
        "mixed": PAGED | alone | {"ours in vLLM"},
        "chunked": PAGED | {"ours in vLLM"},
        "prefill": {"ours", "ours in vLLM", "stock k8v4", "unified bf16"},
        "store": {"ours", "stock k8v4", "copy"},
    }


def test_a_kernel_of_another_project_that_ends_the_process_is_left_out(
    run: tuple[Parts, str],
) -> None:
    (ragged,) = results(run[0])["decode"]
    assert set(ragged["ms"]) == PAGED - {"unified bf16"}
    assert "its process ended with status -6" in ragged["left_out"]["unified bf16"]


def test_our_kernel_that_raises_is_a_failure_and_the_next_shape_is_measured(
    run: tuple[Parts, str],
) -> None:
    (failure,) = run[0]["mixed"]["failures"]
    assert "verify, 2/1 x 64, batch 1" in failure
    assert "(ours): RuntimeError: a planted fault" in failure
    assert f"- failure: {failure}" in run[1]
    assert [one["section"] for one in run[0]["mixed"]["results"]] == ["mixed", "chunked"]
    assert run[0]["mixed"]["failed"]
    assert not run[0]["decode"]["failed"]


def test_all_contenders_compute_the_same(run: tuple[Parts, str]) -> None:
    found = [d for of in results(run[0]).values() for one in of
             for d in one.get("distance", {}).values()]  # fmt: skip
    assert len(found) == 2 + 4 + 4 + 3
    assert max(found) < LARGEST_DISTANCE / 2


def test_the_checks_pass_or_need_a_gpu(run: tuple[Parts, str]) -> None:
    outcomes = {one["name"]: one["outcome"] for one in run[0]["known-answers"]["checks"]}
    assert outcomes.pop("a graph follows the lengths") == "unavailable"
    assert set(outcomes.values()) == {"passed"}
    assert "known answers" in outcomes


def test_the_report_prints_predicted_measured_and_ratio(run: tuple[Parts, str]) -> None:
    assert REHEARSAL in run[1]
    (decode,) = results(run[0])["decode"]
    measured, predicted = decode["kernel_ms"]["median"], decode["predicted_ms"]
    row = f"{1e3 * predicted:.1f} | {1e3 * measured:.1f} | {measured / predicted:.2f} |"
    assert row in run[1]
    reason = "no prediction: the model predicts only decode and verify"
    for shape in ("mixed | 2/1 x 64, 2, 20 to 24, 1 to 8", "store | 2/1 x 64, 1, 8, 8"):
        assert f"| {shape} | {reason} |" in run[1]


def test_verification_is_predicted_where_the_model_knows_the_instructions() -> None:
    jobs = [job for job in PARTS["mixed"].jobs if job.section == "verify"]
    found = predict_jobs("NVIDIA H200", [*PARTS["decode"].jobs[:1], *jobs[:2]])
    one, small, large = found.values()
    assert one < small < 1.2 * one
    assert large == "the performance model does not know WARPGROUP.ARRIVE"
    assert predict_jobs("NVIDIA T4", jobs[:1]) == {
        str(jobs[0]): "the model does not know NVIDIA T4"
    }


def test_contenders_left_out_are_named_with_the_reason(run: tuple[Parts, str]) -> None:
    for name in ("FlashAttention bf16", "FlashAttention fp8", "torch's FlashAttention 2 bf16"):
        assert f"- left out: {name}: there is no GPU" in run[1]


def test_what_does_not_fit_the_time_limit_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.gpu.run.interpreted", lambda: True)
    monkeypatch.setattr("benchmarks.gpu.sections.copy_bandwidth", math.sqrt)
    monkeypatch.setattr("benchmarks.gpu.sections.measure", planted_gpu.hang)
    predictions: Future[Outcome] = Future()
    predictions.set_result(Outcome(LOST, "no model"))
    report = Report("mixed", {"interpreted": True}, 3.0)
    with Child() as child:
        _measure(report, REHEARSED["mixed"], tmp_path, child, predictions)
    mixed, text = parts_of(tmp_path)["mixed"], write_summary(tmp_path)
    assert mixed["results"] == mixed["failures"] == []
    assert [line[:22] for line in mixed["skipped"]] == ["not run: out of time: "] * 3
    assert mixed["seconds"] >= 3
    assert all(f"- {line}" in text for line in mixed["skipped"])


def test_a_report_is_made_from_the_files_of_several_runs(
    run: tuple[Parts, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part, found in run[0].items():
        (tmp_path / JSON.format(part)).write_text(json.dumps(found))
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--out", str(tmp_path), "--report"])
    assert main() == 0
    assert (tmp_path / MARKDOWN).read_text() == run[1]


def test_tuning_in_the_interpreter_tries_sizes_and_makes_no_rows(tmp_path: Path) -> None:
    done = command("--out", tmp_path, "--rehearse", "--tune")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_tuning.json").read_text())
    (task,) = found["tasks"]
    assert [set(one) for one in task["tried"]] == [{"candidate", "times_as_fast"}] * 3
    assert found["rows"] == []


def test_processes_share_work_and_survive_one_that_ends() -> None:
    found = share_out(math.sqrt, [4.0, -1.0, 16.0], seconds=300.0, processes=2)
    assert [(one.status, one.value) for one in found] == [
        (DONE, 2.0),
        (FAILED, "ValueError: math domain error"),
        (DONE, 4.0),
    ]
    found = share_out(os._exit, [3, 4], seconds=300.0, processes=1)
    assert [one.status for one in found] == [LOST, LOST]
    assert found[1].value == "its process ended with status 4"
    late = share_out(os.strerror, [1, 2], seconds=0.0)
    assert [one.status for one in late] == [OUT_OF_TIME, OUT_OF_TIME]


def test_a_call_that_hangs_is_lost_and_one_that_exceeds_the_time_is_not() -> None:
    with Child() as child:
        assert child.call(time.sleep, 3600, seconds=60.0, hang=2.0).status == LOST
        assert child.call(time.sleep, 3600, seconds=1.0).status == OUT_OF_TIME
        assert child.call(math.sqrt, 4.0, seconds=60.0).value == 2.0


def test_a_process_whose_cuda_context_is_broken_is_replaced() -> None:
    with Child() as child:
        found = child.call(planted_gpu.break_context, seconds=60.0)
        assert (found.status, found.value) == (LOST, "RuntimeError: illegal memory access")
        assert child.call(torch.cuda.is_initialized, seconds=60.0).value is False


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_explains_how_to_try_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--out", str(tmp_path)])
    assert main() == 2
    reason = "torch finds no GPU; to try the command without one, pass --rehearse"
    assert reason in capsys.readouterr().err
