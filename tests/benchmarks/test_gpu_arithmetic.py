# SPDX-License-Identifier: Apache-2.0
"""The numbers, the order and the verdicts of the GPU benchmark."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import goals, tune
from benchmarks.gpu.checks import (
    Check,
    CheckResult,
    checks,
    run,
    stored_bytes_equal_the_reference,
)
from benchmarks.gpu.contenders import Batch
from benchmarks.gpu.contenders.ours import Ours
from benchmarks.gpu.contenders.vllm_kernels import UnifiedBf16
from benchmarks.gpu.environment import Budget
from benchmarks.gpu.measure import alternating, ratio, spread
from benchmarks.gpu.report import JSON, MARKDOWN, PICTURE, Report, points
from benchmarks.gpu.sections import (
    AllDiffer,
    Limits,
    achieved,
    build,
    distances,
    medians_and_ratios,
)
from benchmarks.gpu.shapes import (
    FULL,
    QUICK,
    SECTIONS,
    Heads,
    Shape,
    jobs,
    layers_needed,
    token_bytes,
)
from testing.triton.attention import assert_close
from vllm_hybrid_kv.kernels.triton import tuning
from vllm_hybrid_kv.kernels.triton.tuning import Rows, Tiling

HEADS = Heads(32, 8, 128)
LIMITS = Limits(copy_gb_s=1000.0, matmul_tflop_s=500.0)


def test_token_bytes_follow_the_format() -> None:
    assert [token_bytes(stored, 128) for stored in ("k8v4", "bf16", "fp8")] == [196, 512, 256]


def test_attention_reads_whole_tokens_and_caches_hold_whole_pages() -> None:
    shape = Shape(HEADS, batch=2, length=17)
    assert shape.read_bytes("k8v4") == 2 * 17 * 8 * 196
    assert shape.cache_bytes("k8v4") == 2 * 32 * 8 * 196


def test_flops_count_each_visible_pair_once() -> None:
    # Two new tokens over three cached ones: the first sees 4 keys, the second 5.
    assert Shape(HEADS, 1, 5, 2).flops == 4 * 32 * 128 * (4 + 5)
    assert Shape(HEADS, 3, 7).flops == 3 * 4 * 32 * 128 * 7


def test_storing_reads_bf16_and_writes_k8v4() -> None:
    assert Shape(HEADS, 1, 10, 10).stored_bytes == 10 * 8 * (512 + 196)


@pytest.mark.parametrize(
    ("cache_bytes", "l2_bytes", "layers"),
    [(10, 50, 10), (30, 50, 4), (100, 50, 1), (1000, 50, 1), (1, 10**6, 256), (10, 0, 1)],
)
def test_layers_in_turn_exceed_twice_the_l2_cache(
    cache_bytes: int, l2_bytes: int, layers: int
) -> None:
    assert layers_needed(cache_bytes, l2_bytes) == layers


def test_decode_measures_every_combination_once() -> None:
    decode = [job.shape for job in jobs(FULL) if job.section == "decode"]
    assert len(decode) == len(set(decode)) == 4 * 4 * 4
    assert {shape.batch for shape in decode if shape} == {1, 8, 32, 128}
    assert {shape.length for shape in decode if shape} == {1024, 8192, 32768, 131072}
    names = {str(shape.heads) for shape in decode if shape}
    assert names == {"32/8 x 128", "16/2 x 256", "24/4 x 256", "64/8 x 128"}


@pytest.mark.parametrize("preset", [FULL, QUICK])
def test_bandwidth_comes_first_and_shapes_that_decide_a_goal_next(preset: Any) -> None:
    found = jobs(preset)
    assert found[0].section == "bandwidth"
    decode = [job.shape for job in found if job.section == "decode"]
    lengths = [shape.length for shape in decode if shape]
    at_goal = lengths.count(32768)
    assert set(lengths[:at_goal]) == {32768}
    last_decode = max(place for place, job in enumerate(found) if job.section == "decode")
    first_seen = [min(i for i, job in enumerate(found) if job.section == s) for s in SECTIONS]
    assert max(first_seen) < last_decode


def test_a_single_section_includes_the_bandwidth() -> None:
    assert {job.section for job in jobs(FULL, "store")} == {"bandwidth", "store"}
    assert [job.section for job in jobs(FULL, "bandwidth")] == ["bandwidth"]


def test_a_spent_budget_has_nothing_left() -> None:
    assert Budget(0.0).left == 0.0
    assert 0 < Budget(1000.0).left <= 1000.0


def test_a_ratio_is_the_median_of_the_ratios_of_pairs() -> None:
    assert ratio([2.0, 3.0, 40.0], [1.0, 1.0, 10.0]).median == 3.0
    # The ratio of the medians would be 8: in the second sample the clock was a tenth.
    found = ratio([2.0, 30.0, 8.0], [1.0, 10.0, 1.0])
    assert (found.median, found.count) == (3.0, 3)


def test_quartiles_are_those_of_the_sample() -> None:
    found = spread([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (found.lower, found.median, found.upper) == (2.0, 3.0, 4.0)
    assert spread([7.0]) == replace(found, median=7.0, lower=7.0, upper=7.0, count=1)


def test_a_contender_that_fails_is_reported_and_the_others_are_measured() -> None:
    calls: dict[str, Any] = {"works": [int, int], "fails": [lambda: 1 / 0]}
    times, errors = alternating(calls, torch.device("cpu"), seconds=0.0)
    assert {name: len(samples) for name, samples in times.items()} == {"works": 1}
    assert isinstance(errors["fails"], ZeroDivisionError)


def test_times_become_bandwidth_and_its_share() -> None:
    found = achieved(10**6, 0.002, LIMITS, flops=10**9)
    assert found == {"gb_s": 500.0, "share_of_copy": 0.5, "tflop_s": 500.0}
    assert "tflop_s" not in achieved(10**6, 0.002, LIMITS)


def test_ratios_above_one_are_slower_than_ours() -> None:
    medians, ratios = medians_and_ratios({"ours": [1.0, 2.0], "stock k8v4": [7.0, 14.0]})
    assert medians["ours"]["median"] == 1.5
    assert ratios["stock k8v4"]["median"] == 7.0
    assert "ours" not in ratios


def result(section: str, shape: Shape, share: float = 0.8, **ratios: float) -> dict[str, Any]:
    times = {name.replace("_", " "): {"median": of, "lower": of, "upper": of, "count": 5}
             for name, of in ratios.items()}  # fmt: skip
    ms = {name: {**of, "median": of["median"] * 0.1} for name, of in times.items()}
    return {
        "section": section,
        "shape": shape.as_dict(),
        "layers": 1,
        "left_out": {"FlashInfer bf16": "flashinfer: no module"},
        "notes": {},
        "distance": {},
        "ms": {"ours": {"median": 0.1, "lower": 0.1, "upper": 0.1, "count": 5}} | ms,
        "times_ours": times,
        "achieved": {"ours": {"gb_s": 800.0, "share_of_copy": share, "tflop_s": 4.0}},
    }


def verdict_of(text: str, results: list[dict[str, Any]]) -> goals.Verdict:
    (goal,) = [goal for goal in goals.GOALS if text in goal.text]
    return goals.verdict(goal, results)


def test_the_worst_shape_decides_a_goal() -> None:
    shapes = [Shape(HEADS, batch, 32768) for batch in (8, 32, 128)]
    good = [
        result("decode", shape, share)
        for shape, share in zip(shapes, (0.8, 0.76, 0.9), strict=True)
    ]
    found = verdict_of("75 %", good)
    assert (found.measured, found.best, found.met, found.shapes) == (0.76, 0.9, True, 3)
    assert "batch 32" in found.where
    assert verdict_of("75 %", [*good, result("decode", shapes[0], 0.74)]).met is False


def test_the_fastest_other_kernel_decides_a_goal() -> None:
    shape = Shape(HEADS, 8, 32768)
    one = result("decode", shape, unified_bf16=3.0, FlashAttention_bf16=1.9, unified_fp8=1.3)
    assert verdict_of("2 times the fastest bf16", [one]).measured == 1.9
    assert verdict_of("2 times the fastest bf16", [one]).met is False
    assert verdict_of("1.25 times", [one]).met is True


def test_other_shapes_do_not_decide_a_goal() -> None:
    short = result("decode", Shape(HEADS, 8, 8192), 0.1)
    alone = result("decode", Shape(HEADS, 1, 32768), 0.1, unified_fp8=0.9)
    found = verdict_of("75 %", [short, alone])
    assert (found.met, found.measured, found.shapes) == (None, None, 0)
    assert verdict_of("batch 1", [short, alone]).met is False


def test_the_largest_number_decides_a_goal_with_an_upper_bound() -> None:
    shapes = [Shape(HEADS, batch, 32768, 4) for batch in (1, 8)]
    # `times_ours` is the time of the one token, divided by ours.
    found = verdict_of("verification", [
        result("verify", shapes[0], **{"ours, one_token": 1 / 1.1}),
        result("verify", shapes[1], **{"ours, one_token": 1 / 1.4}),
    ])  # fmt: skip
    assert found.measured == pytest.approx(1.4)
    assert found.best == pytest.approx(1.1)
    assert found.met is False


def test_a_goal_against_a_missing_kernel_is_not_measured() -> None:
    assert (
        verdict_of("60 % of FlashAttention", [result("chunked", Shape(HEADS, 1, 10240, 2048))]).met
        is None
    )


def test_small_stores_do_not_decide_the_goal_of_the_store() -> None:
    small, large = (
        result("store", Shape(HEADS, 1, n, n), share) for n, share in ((1, 0.1), (8192, 0.7))
    )
    assert verdict_of("store", [small, large]).met is True


def test_contenders_whose_caches_do_not_fit_are_left_out() -> None:
    # Without a GPU 1 GiB counts as free: 2^23 tokens take 0.8 GiB as k8v4 and 2 as bf16.
    batch = Batch(Shape(Heads(1, 1, 64), 1, 1 << 23), torch.device("cpu"))
    built, left_out = build([UnifiedBf16], batch, layers=1)
    assert not built
    assert left_out["unified bf16"] == "its caches take 2.0 GiB, 0.9 GiB are free"
    _, left_out = build([Ours], batch, layers=2)
    assert left_out["ours"].startswith("its caches take 1.6 GiB")


def test_a_wrong_output_a_nan_and_a_wrong_log_sum_exp_are_detected() -> None:
    wanted = torch.ones(3, 2, 64), torch.zeros(3, 2)
    wanted[1][0, 0] = -math.inf
    out, lse = wanted[0].clone(), wanted[1].clone()
    assert assert_close((out, lse), wanted, 0.01) == "out 0.0e+00, lse 0.0e+00"
    off, nan, sums, empty = out.clone(), out.clone(), lse.clone(), lse.clone()
    off[2, 1] = 1.02
    nan[1, 1, 3] = math.nan
    sums[2, 0] = 0.01
    empty[0, 0] = 0.0
    for got in ((off, lse), (nan, lse), (out, sums), (out, empty)):
        with pytest.raises(AssertionError):
            assert_close(got, wanted, 0.01)


def test_a_check_that_raises_fails_with_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    arguments = {"head_size": 63, "dtype": torch.float16, "native": False, "rows": "of all sizes"}
    found = run(Check("a", stored_bytes_equal_the_reference, arguments))
    assert found.outcome == "failed"
    assert found.detail.startswith("ValueError: k8v4 stores head sizes from 64 to 256")


def test_a_distance_is_relative_to_the_size_of_ours() -> None:
    ours = torch.full((4, 2, 64), 2.0)
    found = distances({"ours": ours, "a": ours * 1.1, "b": -ours, "one token": ours[:1]})
    assert found == {"a": pytest.approx(0.1, rel=1e-4), "b": pytest.approx(2.0)}


def test_ours_fails_if_it_differs_from_all_others() -> None:
    ours = torch.ones(4, 2, 64)
    with pytest.raises(AllDiffer):
        distances({"ours": ours, "a": -ours, "b": ours * math.nan})


def test_the_picture_shows_operations_a_byte() -> None:
    found = points([result("decode", Shape(HEADS, 8, 32768)), result("store", Shape(HEADS, 1, 1))])
    assert found == {("ours", "decode"): [(5.0, 4.0)]}


MACHINE = {
    "interpreted": False, "torch": "2.11", "triton": "3.6", "vllm": "0.33.0 (vllm)", "gpu": "A GPU",
    "compute_capability": (9, 0), "multiprocessors": 132, "tiling": "derived",
    "flash_attention": "nothing", "nvidia_smi": None,
}  # fmt: skip


def report() -> Report:
    return Report(
        MACHINE,
        [CheckResult("attention, decode", "passed", "out 1e-3", 1.0)],
        LIMITS,
        [
            result("decode", Shape(HEADS, 8, 32768), 0.81, stock_k8v4=7.5, unified_fp8=1.2),
            result("store", Shape(HEADS, 1, 8192, 8192), 0.66, stock_k8v4=2.0, copy=0.7),
        ],
    )


def test_a_report_names_the_machine_and_the_goals_that_are_met(tmp_path: Path) -> None:
    report().write(tmp_path)
    text = (tmp_path / MARKDOWN).read_text()
    assert "A GPU, compute capability 9.0, 132 multiprocessors; driver unknown" in text
    worst = "(32/8 x 128, batch 8, 32768 tokens)"
    assert f"at least 7 times stock k8v4 | 7.50 {worst} | 7.50 | 1 | yes |" in text
    assert f"the fastest fp8 | 1.20 {worst} | 1.20 | 1 | **no** |" in text
    assert "at least 3 times stock k8v4 | not measured |  |  |  |" in text
    assert "| 32/8 x 128 | 8, 32768, 1 | 100.0 (81 %) | 750.0 (7.50) | 120.0 (1.20) |" in text
    left_out = "(2 shapes, for example decode 32/8 x 128, 8 x 32768)"
    assert f"FlashInfer bf16: flashinfer: no module {left_out}" in text
    everything = json.loads((tmp_path / JSON).read_text())
    assert everything["times_mean_something"] is True
    assert len(everything["goals"]) == len(goals.GOALS)
    pictured = (tmp_path / PICTURE).exists()
    assert (everything["picture"] == PICTURE) == pictured
    assert pictured or "No picture: matplotlib" in text


@pytest.mark.parametrize(
    ("outcome", "failed"), [("failed", True), ("not run", True), ("unavailable", False)]
)
def test_a_check_that_failed_or_was_not_run_fails_the_run_and_is_named(
    outcome: str, failed: bool
) -> None:
    found = report()
    found.checks.append(CheckResult("stored bytes", outcome, "3 bytes differ", 0.1))
    assert found.failed is failed
    assert f"- {outcome}: stored bytes: 3 bytes differ" in found.markdown([], PICTURE)


def test_a_failure_of_our_kernels_fails_the_run() -> None:
    found = report()
    assert found.failed is False
    found.failures.append("decode: RuntimeError: no")
    assert found.failed is True


def test_every_check_has_a_unique_name() -> None:
    names = [check.name for check in checks()]
    assert len(names) == len(set(names))
    assert len(names) > 100


def test_every_class_of_rows_and_heads_is_tuned() -> None:
    tasks = tune.tasks(FULL)
    found = {(task.rows, tuning.head_class(task.head_size)) for task in tasks}
    # Heads of 512 dims have only one tile size that does not spill.
    assert found == {(rows, head) for rows in Rows for head in tuning.HEAD_CLASSES if head < 512}
    for task in tasks:
        for shape in task.shapes:
            assert tuning.row_class(shape.queries * shape.heads.group) is task.rows
        derived = tuning.derived_tiling(
            task.shapes[0].queries * task.shapes[0].heads.group, task.head_size
        )
        assert derived in tune.sizes(task.rows)


def test_the_distance_of_two_sizes_counts_halvings_and_doublings() -> None:
    known = Tiling(16, 64, 2, 3)
    assert tune.steps_away(known, known) == 0
    assert tune.steps_away(known, Tiling(32, 32, 2, 3)) == 2
    assert tune.steps_away(known, replace(known, min_split_tiles=16)) == 2


def test_a_winner_becomes_a_row_of_the_table() -> None:
    task = tune.Task(Rows.UP_TO_16, (Shape(Heads(24, 4, 192), 8, 32768),))
    winner = Tiling(16, 128, 4, 2, 8, 2)
    table = eval("{" + tune.row_of((9, 0), task, winner) + "}", {"Tiling": Tiling, "Rows": Rows})
    assert table == {((9, 0), 256, Rows.UP_TO_16): winner}


def test_a_measured_row_applies_to_its_capability_heads_and_rows_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    winner = Tiling(16, 128, 4, 2, 8, 2)
    monkeypatch.setattr(tuning, "MEASURED", {((9, 0), 128, Rows.UP_TO_16): winner})
    assert tuning.tiling_for(8, 96, (9, 0)) == winner
    assert tuning.origin((9, 0)) == "measured"
    for rows, head_size, capability in ((17, 128, (9, 0)), (8, 64, (9, 0)), (8, 160, (9, 0)),
                                        (8, 128, (8, 9)), (8, 128, None)):  # fmt: skip
        assert tuning.tiling_for(rows, head_size, capability) == tuning.derived_tiling(
            rows, head_size
        )
    assert tuning.origin((8, 9)) == tuning.origin(None) == "derived"
