# SPDX-License-Identifier: Apache-2.0
"""Rehearse `python -m benchmarks.gpu` from start to end, in Triton's interpreter, with faults."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.children import DONE, FAILED, LOST, OUT_OF_TIME, Child, share_out
from benchmarks.gpu.report import JSON, MARKDOWN, REHEARSAL
from benchmarks.gpu.sections import LARGEST_DISTANCE
from benchmarks.gpu.shapes import PARTS
from testing import processes

ROOT = Path(__file__).parents[2]


def command(
    *arguments: object, module: str = "benchmarks.gpu", **environment: str
) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    return processes.run(words, cwd=ROOT, OMP_NUM_THREADS="1", **environment)


def planted(fault: str, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return command(
        *("--out", folder, "--rehearse", *arguments),
        module="tests.benchmarks.planted_gpu",
        PLANTED_FAULT=fault,
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
    done = planted("abort and raise", folder, *chosen, "--budget", 100_000)
    assert done.returncode == 1, done.stdout + done.stderr
    return parts_of(folder), (folder / MARKDOWN).read_text()


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
        "decode": PAGED,
        "mixed": PAGED | alone | {"ours in vLLM"},
        "chunked": PAGED | {"ours in vLLM"},
        "prefill": {"ours", "ours in vLLM", "stock k8v4", "unified bf16"},
        "store": {"ours", "stock k8v4", "copy"},
    }


def test_a_kernel_of_another_project_that_ends_the_process_is_left_out(
    run: tuple[Parts, str],
) -> None:
    ragged = results(run[0])["decode"][1]
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
    assert len(found) == 3 + 2 + 4 + 4 + 3
    assert max(found) < LARGEST_DISTANCE / 2


def test_the_checks_pass_or_need_a_gpu(run: tuple[Parts, str]) -> None:
    outcomes = {one["name"]: one["outcome"] for one in run[0]["known-answers"]["checks"]}
    assert outcomes.pop("a graph follows the lengths") == "unavailable"
    assert set(outcomes.values()) == {"passed"}
    assert "known answers" in outcomes


def test_the_report_prints_predicted_measured_and_ratio(run: tuple[Parts, str]) -> None:
    assert REHEARSAL in run[1]
    for one in results(run[0])["decode"]:
        measured, predicted = one["kernel_ms"]["median"], one["predicted_ms"]
        row = f"{1e3 * predicted:.1f} | {1e3 * measured:.1f} | {measured / predicted:.2f} |"
        assert row in run[1]
    assert "| prefill | 2/1 x 64, 1, 24, 24 | not predicted |" in run[1]


def test_contenders_left_out_are_named_with_the_reason(run: tuple[Parts, str]) -> None:
    for name in ("FlashAttention bf16", "FlashAttention fp8", "torch's FlashAttention 2 bf16"):
        assert f"- left out: {name}: there is no GPU" in run[1]


def test_what_does_not_fit_the_time_limit_is_recorded(tmp_path: Path) -> None:
    done = planted("hang", tmp_path, "--part", "mixed", "--budget", 8)
    assert done.returncode == 0, done.stdout + done.stderr
    mixed = parts_of(tmp_path)["mixed"]
    assert mixed["results"] == []
    assert [line[:22] for line in mixed["skipped"]] == ["not run: out of time: "] * 3
    assert 8 <= mixed["seconds"] < 60
    text = (tmp_path / MARKDOWN).read_text()
    assert all(f"- {line}" in text for line in mixed["skipped"])


def test_a_report_is_made_from_the_files_of_several_runs(
    run: tuple[Parts, str], tmp_path: Path
) -> None:
    for part, found in run[0].items():
        (tmp_path / JSON.format(part)).write_text(json.dumps(found))
    done = command("--out", tmp_path, "--report")
    assert done.returncode == 0, done.stderr
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_explains_how_to_try_it(tmp_path: Path) -> None:
    done = command("--out", tmp_path)
    assert done.returncode == 2
    assert "torch finds no GPU; to try the command without one, pass --rehearse" in done.stderr
