# SPDX-License-Identifier: Apache-2.0
"""Check the verdicts and the report of `python -m benchmarks.engine`, and run it on two engines."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import benchmarks.engine.__main__ as command
from benchmarks.engine import configurations, report, workload
from benchmarks.engine.checks import choose
from benchmarks.engine.configurations import K8V4, Configuration, Place
from benchmarks.engine.engines import Engines
from benchmarks.engine.report import Results, Row, Speed, Verdict
from testing.engine_host import EngineError, EngineHost, Output
from testing.output_comparison import Bounds, compare, decisive, far_from_unquantised

BOUNDS = Bounds(rounding=0.1, farthest=0.5)
ON_CPU = Place("cpu", compiled=True, memory_bytes=1 << 34)
ON_GPU = Place("cuda", compiled=True, memory_bytes=1 << 36)


def output(tokens: list[int], margins: list[float], moved: float = 0.0) -> Output:
    return Output(tokens, [-1.0 + moved] * len(tokens), margins)


# Comparisons


@pytest.mark.parametrize(
    ("got", "words"),
    [
        (output([1, 2, 7], [9.0] * 3), ""),
        (output([1, 9, 3], [9.0] * 3), "prompt 0: token 1 is 9, not 2, which was 5.50 ahead"),
        (output([1], [9.0]), "prompt 0: 1 tokens of 2"),
        (output([1, 2, 3], [9.0] * 3, 0.6), "log-probabilities up to 0.600 apart, 0.5 allowed"),
        (output([1, 2, 3], [9.0] * 3, float("nan")), "log-probabilities up to nan apart"),
    ],
)
def test_outputs_are_compared_up_to_the_first_close_choice(got: Output, words: str) -> None:
    wanted = output([1, 2, 3], [9.0, 5.5, 0.0])
    assert decisive(wanted, BOUNDS) == 2
    different = compare([got], [wanted], BOUNDS).different
    assert words in different[0] if words else not different
    assert compare([got], [wanted], BOUNDS, whole=True).different or got.tokens == wanted.tokens


@pytest.mark.parametrize(("far", "found"), [(3, ""), (4, "4 of 60 log-probabilities more than")])
def test_one_log_probability_in_twenty_may_be_farther_apart(far: int, found: str) -> None:
    wanted = [output([1], [9.0])] * 60
    moved = [output([1], [9.0], 0.3 if i < far else 0.05) for i in range(60)]
    assert ";".join(compare(moved, wanted, BOUNDS).different).startswith(found)
    assert bool(compare(moved, wanted, BOUNDS).different) == bool(found)


def test_long_prompts_and_those_with_most_decisive_tokens_are_chosen() -> None:
    prompts = [[0] * length for length in (5, 50, 500, 6, 400, 7)]
    counts = (4, 3, 1, 2, 2, 0)
    outputs = [output([1] * 4, [9.0] * n + [0.0] * (4 - n)) for n in counts]
    assert [len(p) for p in choose(outputs, prompts, 4, BOUNDS)] == [5, 50, 400, 500]
    assert [len(p) for p in choose(outputs, prompts, 6, BOUNDS)] == [5, 6, 50, 400, 500]


@pytest.mark.parametrize(
    ("error", "bounds"), [(0.05, []), (0.3, ["mean"]), (float("nan"), ["mean", "99", "largest"])]
)
def test_errors_beyond_the_format_are_described_by_the_bound_they_exceed(
    error: float, bounds: list[str]
) -> None:
    unquantised = [-float(i % 7) for i in range(200)]
    measured = [value + error for value in unquantised]
    spread = statistics.pstdev(unquantised)
    mean, exceeded = far_from_unquantised(measured, unquantised, 64, spread)
    assert mean == pytest.approx(error, nan_ok=True)
    assert [words.split()[0] for words in exceeded] == bounds


# Configurations


def test_graphs_are_run_only_with_vllms_extension_for_a_gpu() -> None:
    names = {*configurations.GRAPHS, "ngram, full graphs", "mtp, full graphs"}
    tried, skipped = configurations.to_check("qwen3.5", ON_GPU, second=True)
    assert names <= {c.name for c in tried}
    assert skipped == {}
    for place in (ON_CPU, replace(ON_GPU, compiled=False)):
        tried, skipped = configurations.to_check("qwen3.5", place, second=False)
        assert all(c.graphs is None for c in tried)
        assert {skipped[name] for name in names} == {place.why_no_graphs}


@pytest.mark.parametrize(("second", "other"), [(True, "0"), (False, "1")])
def test_the_other_model_runner_is_checked_too(second: bool, other: str) -> None:
    tried, _ = configurations.to_check("llama", ON_GPU, second)
    assert [c.runner for c in tried if c.name == "the other model runner"] == [other]


@pytest.mark.parametrize("place", [ON_CPU, ON_GPU])
def test_stock_k8v4_is_timed_on_gpus_only(place: Place) -> None:
    modes, skipped = configurations.to_time("llama", place)
    expected = [("k8v4", True, K8V4), ("auto", False, "auto"), ("fp8", False, "fp8")]
    if place is ON_GPU:
        expected.append(("stock k8v4", False, K8V4))
    for caches in modes.values():
        assert [(c.name, c.plugin, c.cache_dtype) for c in caches] == expected
    assert ("stock k8v4" in skipped) == (place is ON_CPU)


# The report


def test_only_unequal_outputs_and_our_failures_fail_the_command() -> None:
    results = Results([Row("llama", "eager", "alone", verdict) for verdict in Verdict])
    assert [row.verdict for row in results.failures] == [Verdict.DIFFERENT, Verdict.FAILED]


def test_ratios_are_medians_of_the_ratios_of_each_round() -> None:
    # In the second round all times are ten times longer, as on a busy machine.
    speed = Speed("llama", "eager", 4, 64, {"k8v4": [1.0, 10.0, 2.0], "auto": [2.0, 20.0, 3.0]})
    assert speed.times_faster() == {"auto": 2.0}
    assert speed.cells() == {"k8v4": "2.000 ms, 2000/s", "auto": "3.000 ms, 1333/s (2.00)"}
    assert replace(speed, milliseconds={"auto": [1.0], "fp8": [2.0]}).times_faster() == {}


def test_the_report_contains_every_comparison_time_and_reason(tmp_path: Path) -> None:
    results = Results(
        [
            Row("llama", "ngram", "alone", Verdict.EQUAL, "", 6, 40, 0.01),
            Row("llama", "eager", "all", Verdict.DIFFERENT, "prompt 3: a | b", 6, 30, 0.2),
            Row("gemma3", "mtp", "", Verdict.UNSUPPORTED, "with auto: TypeError: no MTP"),
            Row("llama", "ngram, k8v4", "speed", Verdict.FAILED, "RuntimeError: broken"),
        ],
        speeds=[Speed("llama", "eager", 4, 64, {"k8v4": [1.0], "fp8": [1.5]})],
    )
    described = {"device": "a GPU", "driver": "1.2", "vLLM's compiled extension": "missing"}
    report.write(results, described, tmp_path)
    text = (tmp_path / "engine.md").read_text()
    for part in (
        "device a GPU, driver 1.2",
        "2 comparisons of 12 outputs, 70 tokens: 1 DIFFERENT. 1 batches timed. "
        "1 times an engine of ours FAILED.",
        "| llama | eager | all | 6 | 30 | 0.200 | DIFFERENT | prompt 3: a \\| b |",
        "| gemma3 | mtp |  | unsupported by vLLM | with auto: TypeError: no MTP |",
        "| llama | eager | 4, 64 | 1.000 ms, 4000/s | 1.500 ms, 2667/s (1.50) |",
        "| llama | ngram, k8v4 | speed | FAILED | RuntimeError: broken |",
        "only the ratios are meaningful",
    ):
        assert part in text
    found = json.loads((tmp_path / "engine.json").read_text())
    assert [row["tokens"] for row in found["rows"]] == [40, 30, 0, 0]
    assert found["speeds"][0]["times_faster"] == {"fp8": 1.5}


# The command with real engines


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, EngineHost]]:
    """Start one engine per cache dtype. Only the end of the test closes these engines."""
    kept: dict[str, EngineHost] = {}
    start, close = Engines.start, EngineHost.close

    def start_once(self: Engines, configuration: Configuration, mode: str = "") -> EngineHost:
        dtype = configuration.cache_dtype
        if dtype not in ("auto", K8V4):
            raise EngineError("ValueError: no third engine")
        if dtype not in kept:
            kept[dtype] = start(self, replace(configuration, chunk=96), mode)
        return kept[dtype]

    monkeypatch.setattr(Engines, "start", start_once)
    monkeypatch.setattr(EngineHost, "close", lambda host: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield kept
    for host in kept.values():
        close(host)


@pytest.mark.engine
def test_the_command_compares_and_times_two_engines(
    tmp_path: Path, kept: dict[str, EngineHost]
) -> None:
    options = command.parse(["--out", str(tmp_path), "--smallest"])
    results, lines = Results(), []
    command.run_model("llama", options, ON_CPU, tmp_path, results, lines.append)
    assert len(lines) == len(results.rows) + len(results.speeds)
    assert not results.failures

    rows = {(row.engine, row.what.partition(",")[0]): row for row in results.rows}
    for engine in ("eager", "prompts in chunks of 96", "ngram"):
        for what in ("all at once", "again"):
            row = rows[engine, what]
            assert row.verdict is Verdict.EQUAL, row
            assert (row.outputs, row.tokens > 12) == (workload.SMALLEST.prompts, True)
    for key in (("eager", "generated tokens"), ("prompts in chunks of 96", "tokens of prompts")):
        assert rows[key].verdict is Verdict.EQUAL, rows[key]
        # Rounding to k8v4 moves log-probabilities, so this shows that the cache was quantised.
        assert rows[key].apart > 0.01
    drafts = rows["ngram", "drafts both accepted and rejected"]
    assert (drafts.verdict, drafts.detail) == (Verdict.INCONCLUSIVE, "0 drafted, 0 accepted")
    assert rows["eager, fp8", "speed"].detail == "ValueError: no third engine"

    cells = [(speed.batch, speed.length) for speed in results.speeds if speed.mode == "eager"]
    assert cells == [*workload.SMALLEST.cells]
    for speed in results.speeds:
        assert speed.milliseconds.keys() == {"k8v4", "auto"}
        assert all(len(times) == workload.SMALLEST.rounds for times in speed.milliseconds.values())
        assert all(time > 0 for times in speed.milliseconds.values() for time in times)
    backends = {row["cache_dtype"]: row["backends"] for row in results.engines}
    assert "vllm_hybrid_kv.K8V4AttentionBackend" in backends[K8V4]
    assert list(backends["auto"]) == ["vllm.CPUAttentionBackend"]

    # The comparison must tell outputs of a quantised cache from those of an unquantised one.
    prompts = workload.prompt_pool(workload.SMALLEST)
    unquantised, quantised = (kept[name].generate(prompts, 12) for name in ("auto", K8V4))
    assert compare(quantised, unquantised, workload.bounds_of("llama", "float32")).different
    with pytest.raises(EngineError) as caught:
        kept["auto"].generate([[5] * 5000], 1)
    assert "maximum context length" in caught.value.reason
