# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark counts bytes and operations, orders its samples and judges goals correctly."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from benchmarks.gpu import goals, tune
from benchmarks.gpu.checks import CheckResult, checks, run
from benchmarks.gpu.contenders import Batch
from benchmarks.gpu.measure import alternating, ratio, spread
from benchmarks.gpu.report import JSON, MARKDOWN, Report, write_summary
from benchmarks.gpu.sections import distances, result_of
from benchmarks.gpu.shapes import (
    CHECKS,
    HEADS,
    PARTS,
    SECTIONS,
    Heads,
    Job,
    Shape,
    layers_needed,
    token_bytes,
)
from testing.triton.attention import assert_close
from vllm_hybrid_kv.kernels.triton import tuning
from vllm_hybrid_kv.kernels.triton.tuning import MOST_ROWS, Tiling

SOME = Heads(32, 8, 128)


def test_bytes_and_operations_follow_the_shape_and_the_format() -> None:
    assert [token_bytes(stored, 128) for stored in ("k8v4", "bf16", "fp8")] == [196, 512, 256]
    assert Shape(SOME, (17, 20), (1, 1)).read_bytes("k8v4") == 37 * 8 * 196
    assert Shape.equal(SOME, 1, 10, 10).stored_bytes == 10 * 8 * (512 + 196)
    # Two new tokens over three cached ones: the first sees 4 keys, the second 5.
    assert Shape(SOME, (5, 7), (2, 1)).flops == 4 * 32 * 128 * (4 + 5 + 7)
    mixed = Shape(SOME, (9, 5, 20), (1, 1, 8))
    assert mixed.part(decodes=True) == Shape(SOME, (9, 5), (1, 1))
    assert mixed.part(decodes=False) == Shape(SOME, (20,), (8,))


def test_a_batch_of_requests_of_different_lengths_stores_each_token_once() -> None:
    shape = Shape(Heads(2, 1, 64), (40, 9, 17), (1, 1, 3))
    batch = Batch(shape, torch.device("cpu"))
    key, _, slots = next(batch.stored())
    assert len(set(slots.tolist())) == len(key) == 66
    # The last token of the second request is in its first page.
    assert slots[48] == batch.block_table[1, 0] * 16 + 8
    dense, new = batch.dense()[0], batch.new()[0]
    assert torch.equal(dense, key)
    assert torch.equal(new, key[[39, 48, 63, 64, 65]])


@pytest.mark.parametrize(
    ("cache_bytes", "l2_bytes", "layers"),
    [(10, 50, 10), (30, 50, 4), (100, 50, 1), (1000, 50, 1), (1, 10**6, 256), (10, 0, 1)],
)
def test_layers_in_turn_exceed_twice_the_l2_cache(
    cache_bytes: int, l2_bytes: int, layers: int
) -> None:
    assert layers_needed(cache_bytes, l2_bytes) == layers


def test_the_parts_have_the_batches_that_decide_goals_most_important_first() -> None:
    assert next(iter(PARTS)) == CHECKS
    decode = [job.shape for job in PARTS["decode"].jobs]
    assert {(s.heads, s.batch, s.ragged) for s in decode} == {
        (heads, batch, ragged)
        for heads in HEADS for batch in (8, 16, 32) for ragged in (False, True)
    }  # fmt: skip
    assert [shape.batch for shape in decode[:4]] == [8] * 4
    assert {job.section for job in PARTS["mixed"].jobs[:6]} == {"mixed", "verify", "chunked"}
    assert {job.section for part in PARTS.values() for job in part.jobs} == set(SECTIONS)
    ragged = decode[2].lengths
    assert (ragged[0], ragged[-1]) == (65536, 1024)


def test_a_ratio_is_the_median_of_the_ratios_of_pairs() -> None:
    assert ratio([2.0, 3.0, 40.0], [1.0, 1.0, 10.0])["median"] == 3.0
    # In the second sample both are ten times slower, so the ratio of the medians would be 8.
    found = ratio([2.0, 30.0, 8.0], [1.0, 10.0, 1.0])
    assert (found["median"], found["count"]) == (3.0, 3)


def test_quartiles_are_those_of_the_sample() -> None:
    numbers = {"median": 3.0, "lower": 2.0, "upper": 4.0, "count": 5}
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == numbers
    assert spread([7.0]) == {"median": 7.0, "lower": 7.0, "upper": 7.0, "count": 1}


def test_a_contender_that_fails_is_reported_and_the_others_are_measured() -> None:
    calls: dict[str, Any] = {"works": [int, int], "fails": [lambda: 1 / 0]}
    left_out: dict[str, str] = {}
    times = alternating(calls, torch.device("cpu"), 0.0, left_out)
    assert {name: len(samples) for name, samples in times.items()} == {"works": 1}
    assert left_out == {"fails": "ZeroDivisionError: division by zero"}
    with pytest.raises(ZeroDivisionError):
        alternating({"ours": [lambda: 1 / 0]}, torch.device("cpu"), 0.0, left_out)


def result(section: str, shape: Shape, moved: float = 0.08, **times: float) -> dict[str, Any]:
    """Make a result: ours takes 0.1 ms and moves `moved` GB. `times` are multiples of 0.1 ms."""
    samples = {name.replace("_", " "): [0.1 * of] for name, of in times.items()}
    return result_of(
        Job(section, shape), 1, {"ours": [0.1], **samples}, {"ours": int(1e9 * moved)}, 1000.0,
        {"FlashAttention bf16": "no GPU"}, predicted_ms=0.08 if section == "decode" else "no model",
    )  # fmt: skip


def verdict_of(text: str, *results: dict[str, Any]) -> dict[str, Any]:
    (goal,) = [goal for goal in goals.GOALS if text in goal.text]
    return goals.verdict(goal, results)


def test_the_worst_shape_decides_a_goal() -> None:
    shapes = [Shape.equal(SOME, batch, 32768) for batch in (8, 32, 64)]
    good = [result("decode", *of) for of in zip(shapes, (0.09, 0.086, 0.1), strict=True)]
    found = verdict_of("85 % of copy", *good)
    assert (found["measured"], found["best"]) == (pytest.approx(0.86), pytest.approx(1.0))
    assert (found["met"], found["shapes"]) == (True, 3)
    assert "batch 32" in found["where"]
    assert verdict_of("85 % of copy", *good, result("decode", shapes[0], 0.074))["met"] is False


def test_the_fastest_other_kernel_decides_a_goal() -> None:
    shape = Shape.equal(SOME, 8, 32768)
    one = result("decode", shape, unified_bf16=3.0, FlashAttention_bf16=1.9, unified_fp8=1.3)
    found = verdict_of("2 times the fastest bf16", one)
    assert (found["measured"], found["met"]) == (pytest.approx(1.9), False)
    assert verdict_of("1.25 times", one)["met"] is True


def test_other_shapes_do_not_decide_a_goal() -> None:
    short = result("decode", Shape.equal(SOME, 8, 8192), 0.01)
    alone = result("decode", Shape.equal(SOME, 1, 32768), 0.01, unified_fp8=0.9)
    found = verdict_of("85 % of copy", short, alone)
    assert (found["met"], found["measured"], found["shapes"]) == (None, None, 0)
    assert verdict_of("one long request", short, alone)["met"] is False
    chunk = result("chunked", Shape.equal(SOME, 1, 10240, 2048))  # without FlashAttention
    assert verdict_of("85 % of FlashAttention", chunk)["met"] is None
    small, large = (
        result("store", Shape.equal(SOME, 1, n, n), of) for n, of in ((1, 0.01), (8192, 0.07))
    )
    assert verdict_of("store", small, large)["met"] is True


def test_the_largest_number_decides_a_goal_with_an_upper_bound() -> None:
    # The result has the time of one token relative to that of four tokens: 1 / slowdown.
    found = verdict_of("verification", *(
        result("verify", Shape.equal(SOME, batch, 32768, 4), **{"ours,_one_token": 1 / slowdown})
        for batch, slowdown in ((1, 1.1), (8, 1.4))
    ))  # fmt: skip
    assert (found["measured"], found["best"]) == (pytest.approx(1.4), pytest.approx(1.1))
    assert found["met"] is False


def test_a_wrong_output_a_nan_and_a_wrong_log_sum_exp_are_detected() -> None:
    wanted = torch.ones(3, 2, 64), torch.zeros(3, 2)
    wanted[1][0, 0] = -math.inf
    out, lse = wanted[0].clone(), wanted[1].clone()
    assert assert_close((out, lse), wanted) == "out 0.0e+00, lse 0.0e+00"
    off, nan, sums, empty = out.clone(), out.clone(), lse.clone(), lse.clone()
    off[2, 1] = 1.02
    nan[1, 1, 3] = math.nan
    sums[2, 0] = 0.01
    empty[0, 0] = 0.0
    for got in ((off, lse), (nan, lse), (out, sums), (out, empty)):
        with pytest.raises(AssertionError):
            assert_close(got, wanted)


def test_a_check_that_raises_fails_with_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = run(("a", lambda device: str(1 / 0)))
    assert (found.outcome, found.detail) == ("failed", "ZeroDivisionError: division by zero")
    assert len(checks()) > 100


def test_distances_are_relative_to_the_size_of_ours_and_one_must_be_small() -> None:
    ours = torch.full((4, 2, 64), 2.0)
    found = distances({"ours": ours, "a": ours * 1.1, "b": -ours, "one token": ours[:1]})
    assert found == {"a": pytest.approx(0.1, rel=1e-4), "b": pytest.approx(2.0)}
    with pytest.raises(RuntimeError, match="the output of ours differs from all others"):
        distances({"ours": ours, "a": -ours, "b": ours * math.nan})


def test_a_mixed_batch_is_compared_with_its_decodes_and_prefills_alone() -> None:
    alone = {"ours,_decodes_alone": 0.3, "ours,_prefills_alone": 0.5}
    shape = Shape(SOME, (9, 20), (1, 8))
    assert verdict_of("mixed", result("mixed", shape, **alone))["measured"] == pytest.approx(1.25)
    # Our backend may launch them apart.
    found = verdict_of("mixed", result("mixed", shape, **alone, ours_in_vLLM=0.9))
    assert (found["measured"], found["met"]) == (pytest.approx(1.125), True)
    assert verdict_of("mixed", result("mixed", shape))["met"] is None


def report(*more: CheckResult) -> Report:
    return Report(
        "decode",
        {"interpreted": False, "gpu": "A GPU", "compute_capability": (9, 0)},
        240.0,
        [CheckResult("attention, decode", "passed", "out 1e-3", 1.0), *more],
        {"copy_gb_s": 1000.0},
        [
            result("decode", Shape.equal(SOME, 8, 32768), 0.081, stock_k8v4=7.5, unified_fp8=1.2),
            result("store", Shape.equal(SOME, 1, 8192, 8192), 0.066, stock_k8v4=2.0, copy=0.7),
        ],
    )


def test_a_report_names_the_machine_and_the_goals_that_are_met(tmp_path: Path) -> None:
    report().write(tmp_path)
    text = write_summary(tmp_path)
    assert text == (tmp_path / MARKDOWN).read_text()
    assert "- gpu: A GPU\n- compute_capability: [9, 0]\n" in text
    worst = "(32/8 x 128, batch 8, 32768 tokens)"
    assert f"at least 7 times stock k8v4 | 7.50 {worst} | 7.50 | 1 | yes |" in text
    assert f"the fastest fp8 | 1.20 {worst} | 1.20 | 1 | **no** |" in text
    assert "at least 3 times stock k8v4 | not measured |  |  |  |" in text
    assert "| 32/8 x 128, 8, 32768, 1 | 100.0 (81 %) | 750.0 (7.50) | 120.0 (1.20) |" in text
    assert "| decode | 32/8 x 128, 8, 32768, 1 | 80.0 | 100.0 | 1.25 |" in text
    assert "| store | 32/8 x 128, 1, 8192, 8192 | no prediction: no model | 100.0 |  |" in text
    left_out = "(2 shapes, for example decode 32/8 x 128, 8, 32768, 1)"
    assert f"- left out: FlashAttention bf16: no GPU {left_out}" in text
    assert "different machines" not in text
    other = report()
    replace(other, part="more", machine={**other.machine, "gpu": "Another"}).write(tmp_path)
    assert "different machines" in write_summary(tmp_path)


@pytest.mark.parametrize(
    ("outcome", "failed"), [("failed", True), ("not run", True), ("unavailable", False)]
)
def test_a_check_that_failed_or_was_not_run_fails_the_run_and_is_named(
    outcome: str, failed: bool, tmp_path: Path
) -> None:
    found = report(CheckResult("stored bytes", outcome, "3 bytes differ", 0.1))
    assert found.failed is failed
    assert replace(found, failures=["decode: RuntimeError: no"]).failed
    found.write(tmp_path)
    assert json.loads((tmp_path / JSON.format("decode")).read_text())["failed"] is failed
    assert f"- {outcome}: stored bytes: 3 bytes differ" in write_summary(tmp_path)


def test_every_class_of_rows_and_heads_is_tuned() -> None:
    tasks = tune.tasks()
    found = {(task.rows, triton.next_power_of_2(task.heads.size)) for task in tasks}
    # Heads of 512 dims are not tuned, because all tile sizes but one spill registers.
    assert found == {(rows, size) for rows in MOST_ROWS for size in (64, 128, 256)}
    for task in tasks:
        for shape in task.shapes:
            rows = shape.most_new * shape.heads.query // shape.heads.kv
            assert tuning.row_class(rows) == task.rows
            derived = tuning.derived_tiling(rows, task.heads.size, (9, 0))
            assert derived in tune.sizes(task.rows)


WINNER = Tiling(16, 128, 4, 2, 8, 2)


def test_a_winner_becomes_a_row_that_applies_to_its_capability_heads_and_rows_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = tune.Task(16, Heads(24, 4, 96), ())
    table = eval("{" + tune.row_of((9, 0), task, WINNER) + "}", {"Tiling": Tiling})
    assert table == {((9, 0), 128, 16): WINNER}
    monkeypatch.setattr(tuning, "MEASURED", table)
    assert tuning.tiling_for(12, 96, (9, 0)) == WINNER
    assert tuning.origin((9, 0)) == "measured"
    for rows, head_size, capability in (
        (17, 128, (9, 0)), (8, 128, (9, 0)), (12, 64, (9, 0)), (12, 160, (9, 0)),
        (12, 128, (8, 9)), (12, 128, None),
    ):  # fmt: skip
        assert tuning.tiling_for(rows, head_size, capability) == tuning.derived_tiling(
            rows, head_size, capability
        )
    assert tuning.origin((8, 9)) == tuning.origin(None) == "derived"
