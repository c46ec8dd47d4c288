# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.engine`: its verdicts and its report, and one run of it on two engines."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import benchmarks.engine.__main__ as command
from benchmarks.engine import configurations, process, report, subjects
from benchmarks.engine.comparing import Bounds, choose, compare, decisive, far_from_unquantised
from benchmarks.engine.configurations import AUTO, K8V4, REFERENCE, Configuration, Place
from benchmarks.engine.process import Engine, EngineError, Engines
from benchmarks.engine.results import Check, Gap, Results, Speed, Verdict
from benchmarks.engine.worker import reason
from testing import machine
from testing.models import build_model, qwen3_5_config, qwen3_next_config, with_mtp_layer
from testing.requests import Output

BOUNDS = Bounds(rounding=0.1, farthest=0.5)
ON_CPU = Place("cpu", compiled=True, memory_bytes=1 << 34)
ON_GPU = Place("cuda", compiled=True, memory_bytes=1 << 36)
WITHOUT_EXTENSION = replace(ON_GPU, compiled=False)


def output(tokens: list[int], margins: list[float], moved: float = 0.0) -> Output:
    return Output(tokens, [-1.0 + moved] * len(tokens), margins)


# What is compared


def test_tokens_are_compared_up_to_the_first_close_choice() -> None:
    wanted = output([1, 2, 3, 4], [9.0, 9.0, 0.2, 9.0])
    assert decisive(wanted, BOUNDS) == 2
    found = compare([output([1, 2, 7, 8], [9.0] * 4)], [wanted], BOUNDS)
    assert (found.different, found.prompts, found.tokens) == ([], 1, 2)


def test_another_token_in_front_of_the_first_close_choice_is_named() -> None:
    wanted = output([1, 2, 3], [9.0, 5.5, 0.0])
    found = compare([wanted, output([1, 9, 3], [9.0] * 3)], [wanted, wanted], BOUNDS)
    assert found.different == ["prompt 1: token 1 is 9, not 2, which was 5.50 ahead"]


def test_an_output_that_ends_early_is_different() -> None:
    found = compare([output([1], [9.0])], [output([1, 2], [9.0, 9.0])], BOUNDS)
    assert found.different == ["prompt 0: 1 tokens of 2"]


@pytest.mark.parametrize("moved", [0.6, float("nan")])
def test_log_probabilities_farther_apart_than_rounding_are_different(moved: float) -> None:
    wanted = output([1], [9.0])
    found = compare([output([1], [9.0], moved)], [wanted], BOUNDS)
    assert "0.5 allowed" in found.different[0]


def test_one_log_probability_in_twenty_may_be_farther_apart() -> None:
    def run(far: int) -> list[str]:
        wanted = [output([1], [9.0])] * 60
        moved = [output([1], [9.0], 0.3 if i < far else 0.05) for i in range(60)]
        return compare(moved, wanted, BOUNDS).different

    assert run(far=3) == []
    assert run(far=4) == ["4 of 60 log-probabilities more than 0.1 apart"]


def test_long_prompts_and_those_with_most_decisive_tokens_are_chosen() -> None:
    prompts = [[0] * length for length in (5, 50, 500, 6, 400, 7)]
    counts = (4, 3, 1, 3, 2, 0)
    outputs = [output([1] * 4, [9.0] * n + [0.0] * (4 - n)) for n in counts]
    # 500 tokens long, but its second token is a close choice.
    assert choose(outputs, prompts, 3, BOUNDS) == [0, 3, 4]
    # Fewer than six have two, and one has none.
    assert choose(outputs, prompts, 6, BOUNDS) == [0, 1, 2, 3, 4]


def test_errors_beyond_the_format_are_named_by_the_bound_they_break() -> None:
    unquantised = [-float(i % 7) for i in range(200)]
    spread = statistics.pstdev(unquantised)

    def run(error: float) -> tuple[float, list[str]]:
        measured = [value + error for value in unquantised]
        return far_from_unquantised(measured, unquantised, 64, spread)

    mean, broken = run(0.05)
    assert (round(mean, 6), broken) == (0.05, [])
    assert [words.split()[0] for words in run(0.3)[1]] == ["mean"]
    assert len(run(float("nan"))[1]) == 3


# Which engines


def test_graphs_are_tried_where_vllm_is_compiled_for_a_gpu_and_left_out_elsewhere() -> None:
    names = {*configurations.GRAPHS, "ngram, full graphs", "mtp, full graphs"}
    tried, left_out = configurations.to_check("qwen3.5", ON_GPU, None, second=True)
    assert names <= {c.name for c in tried}
    assert left_out == []
    for place, why in ((ON_CPU, "CPUs have no graphs"), (WITHOUT_EXTENSION, "extension is not")):
        tried, left_out = configurations.to_check("qwen3.5", place, None, second=False)
        assert all(c.graphs is None for c in tried)
        assert names <= {row.name for row in left_out if why in row.reason}


def test_every_engine_has_a_control_without_plugin_and_quantisation() -> None:
    tried, _ = configurations.to_check("qwen3.5", ON_GPU, None, second=True)
    for configuration in tried:
        control = configuration.control()
        assert control.environment()["VLLM_PLUGINS"] == ""
        assert configuration.environment()["VLLM_PLUGINS"] == "hybrid_kv"
        expected = {**configuration.arguments(), "kv_cache_dtype": "auto"}
        assert control.arguments() == expected


def test_the_model_runner_that_vllm_does_not_pick_is_tried_too() -> None:
    def other(runner: str | None, second: bool) -> list[str | None]:
        tried, _ = configurations.to_check("llama", ON_GPU, runner, second)
        return [c.runner for c in tried if c.name == "the other model runner"]

    assert other(None, second=True) == ["0"]
    assert other(None, second=False) == ["1"]
    # The second one has failed with an unquantised cache.
    assert other("0", second=False) == []


def test_stock_k8v4_is_timed_on_gpus_and_left_out_with_the_reason_on_cpus() -> None:
    modes, left_out = configurations.to_time("llama", ON_GPU, None)
    assert left_out == []
    for engines in modes.values():
        assert [c.name for c in engines] == ["k8v4", "auto", "fp8", "stock k8v4"]
        assert [c.plugin for c in engines] == [True, False, False, False]
        assert [c.cache_dtype for c in engines] == [K8V4, "auto", "fp8", K8V4]
    modes, left_out = configurations.to_time("llama", ON_CPU, None)
    assert [c.name for c in modes["eager"]] == ["k8v4", "auto", "fp8"]
    assert "nonsense" in {row.name: row.reason for row in left_out}["stock k8v4"]


@pytest.mark.parametrize(("suffix", "compiled"), [(".py", False), (".abi3.so", True)])
def test_python_that_stands_in_for_compiled_operators_is_told_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, compiled: bool
) -> None:
    import vllm

    (tmp_path / f"_C_stable_libtorch{suffix}").touch()
    monkeypatch.setattr(vllm, "__path__", [str(tmp_path)])
    assert machine.has_compiled_extension() is compiled


@pytest.mark.parametrize("model", subjects.MODELS)
def test_the_largest_batch_fits_the_cache_of_a_gpu_of_80_gib(model: str) -> None:
    config = subjects.to_time(model, subjects.FULL)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    assert len(kinds) == config.num_hidden_layers
    per_token = 2 * 2 * config.num_key_value_heads * config.head_dim
    tokens = max(batch * length for batch, length in subjects.FULL.cells)
    needed = tokens * per_token * sum(kind != "linear_attention" for kind in kinds)
    assert needed < subjects.FULL.cache_share * (80 << 30)


@pytest.mark.parametrize("make", [qwen3_next_config, qwen3_5_config])
def test_a_layer_that_predicts_tokens_leaves_the_other_weights_as_they_are(
    tmp_path: Path, make: Any
) -> None:
    plain, more = (
        load_file(build_model(config, tmp_path / name) / "model.safetensors")
        for name, config in (("plain", make(layers=4)), ("more", with_mtp_layer(make(layers=4))))
    )
    assert all(torch.equal(more[name], weight) for name, weight in plain.items())
    added = more.keys() - plain.keys()
    assert all(name.startswith("mtp.") for name in added)
    # It has what each layer of full attention has.
    layer = {n.removeprefix("model.layers.3.") for n in plain if n.startswith("model.layers.3.")}
    assert layer == {n.removeprefix("mtp.layers.0.") for n in added if ".layers." in n}


# What the report says


def test_a_reason_is_the_last_line_that_says_something() -> None:
    assert reason(ValueError("first\n\nlast\n")) == "ValueError: last"
    pydantic = "1 error\n  Value error, no. [type=x, input={}]\n    For further information visit u"
    assert reason(ValueError(pydantic)) == "ValueError: Value error, no."
    assert reason(AssertionError()) == "AssertionError"


def test_unequal_outputs_and_our_failures_fail_the_command_and_nothing_else_does() -> None:
    results = Results()
    for verdict in Verdict:
        results.checks.append(Check("llama", "eager", "alone", verdict))
        results.gaps.append(Gap("llama", "eager", "k8v4", verdict, "why"))
    failing = {row.verdict for row in results.failures}
    assert failing == {Verdict.DIFFERENT, Verdict.FAILED}
    assert len(results.failures) == 4


def test_ratios_are_medians_over_rounds_of_one_rounds_ratio() -> None:
    # The machine slows down to a tenth in the second round.
    speed = Speed("llama", "eager", 4, 64, {"k8v4": [1.0, 10.0, 2.0], "auto": [2.0, 20.0, 3.0]})
    assert speed.times_faster("k8v4", "auto") == 2.0
    assert speed.ms_per_token("auto") == 3.0
    assert speed.tokens_per_s("k8v4") == 2000.0
    assert report.ratios(speed) == {"auto": 2.0}
    assert report.ratios(replace(speed, milliseconds={"auto": [1.0], "fp8": [2.0]})) == {}


def test_the_report_names_what_was_compared_and_gives_every_reason(tmp_path: Path) -> None:
    results = Results(
        checks=[
            Check("llama", "ngram", "alone", Verdict.EQUAL, "", 6, 40, 0.01),
            Check(
                "llama", "eager", "all at once", Verdict.DIFFERENT, "prompt 3: a | b", 6, 30, 0.2
            ),
            Check("gemma3", "mtp", "", Verdict.CANNOT, "with auto: TypeError: no MTP"),
        ],
        speeds=[Speed("llama", "eager", 4, 64, {"k8v4": [1.0], "fp8": [1.5]})],
        gaps=[
            Gap("llama", "eager", "stock k8v4", Verdict.CANNOT, "ValueError: refused", (4, 64)),
            Gap("llama", "ngram", "k8v4", Verdict.FAILED, "RuntimeError: broken"),
        ],
    )
    described = {"device": "a GPU", "driver": "1.2", "vLLM's compiled extension": "missing"}
    report.write(results, described, tmp_path)
    text = (tmp_path / "engine.md").read_text()
    for part in (
        "device a GPU, driver 1.2",
        "2 comparisons of 12 outputs, 70 tokens: 1 DIFFERENT. 1 batches timed. "
        "1 times an engine of ours FAILED.",
        "prompt 3: a \\| b",
        "| gemma3 | mtp | vLLM cannot | with auto: TypeError: no MTP |",
        "| llama | eager | 4, 64 | 1.000 ms, 4000/s | 1.500 ms, 2667/s (1.50) |",
        "| model | mode | batch, tokens | cache | | why |",
        "| llama | eager | 4, 64 | stock k8v4 | vLLM cannot | ValueError: refused |",
        "| llama | ngram | all | k8v4 | FAILED | RuntimeError: broken |",
        "only the ratios mean something",
    ):
        assert part in text
    found = json.loads((tmp_path / "engine.json").read_text())
    assert [row["verdict"] for row in found["failures"]] == ["DIFFERENT", "FAILED"]
    assert found["speeds"][0]["times_faster"] == {"fp8": 1.5}


# The command on real engines


class KeptEngine(Engine):
    """An engine that goes on when the command is done with it."""

    def close(self) -> None:
        if not self.started:
            super().close()

    def end(self) -> None:
        super().close()


class TwoEngines(Engines):
    """Starts one engine with a k8v4 cache and one without, whatever else is asked of them."""

    kept: dict[str, KeptEngine]

    def start(self, configuration: Configuration, mode: str = "") -> Engine:
        dtype = configuration.cache_dtype
        if dtype not in (AUTO.cache_dtype, REFERENCE.cache_dtype):
            raise EngineError("ValueError: no third engine")
        if dtype not in self.kept:
            self.kept[dtype] = super().start(replace(configuration, chunk=96), mode)
        return self.kept[dtype]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, KeptEngine]]:
    kept: dict[str, KeptEngine] = {}
    monkeypatch.setattr(process, "Engine", KeptEngine)
    monkeypatch.setattr(TwoEngines, "kept", kept, raising=False)
    monkeypatch.setattr(command, "Engines", TwoEngines)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield kept
    for engine in kept.values():
        engine.end()


@pytest.mark.engine
def test_the_command_compares_and_times_engines_and_reports_what_they_did(
    tmp_path: Path, kept: dict[str, KeptEngine]
) -> None:
    arguments = command.parse(["--out", str(tmp_path), "--smallest"])
    results = Results()

    def save() -> None:
        report.write(results, {"device": "this one"}, tmp_path)

    command.Command(arguments, ON_CPU, tmp_path, results, save).run("llama")

    checks = {(c.configuration, c.check): c for c in results.checks}
    for engine in ("eager", "prompts in chunks of 96", "ngram"):
        for what in ("all at once", "again, from the prefix cache"):
            check = checks[engine, what]
            assert check.verdict is Verdict.EQUAL, check
            assert (check.prompts, check.tokens > 12) == (subjects.SMALLEST.prompts, True)
    for engine, what in (("eager", "generated tokens"), ("prompts in chunks of 96", "tokens of")):
        check = next(c for c in results.checks if c.configuration == engine and what in c.check)
        assert check.verdict is Verdict.EQUAL, check
        # The format moves log-probabilities: it was in use.
        assert check.apart is not None
        assert check.apart > 0.01
    drafts = checks["ngram", "drafts both accepted and rejected"]
    assert (drafts.verdict, drafts.detail) == (Verdict.NOTHING_SHOWN, "0 drafted, 0 accepted")

    assert [(s.batch, s.length) for s in results.speeds if s.mode == "eager"] == [
        *subjects.SMALLEST.cells
    ]
    for speed in results.speeds:
        assert speed.milliseconds.keys() == {"k8v4", "auto"}
        assert all(len(times) == subjects.SMALLEST.rounds for times in speed.milliseconds.values())
        assert all(time > 0 for times in speed.milliseconds.values() for time in times)
    reasons = {gap.cache: gap.reason for gap in results.gaps if gap.mode == "eager"}
    assert reasons == {"fp8": "ValueError: no third engine"}
    assert not results.failures
    saved = json.loads((tmp_path / "engine.json").read_text())
    assert len(saved["checks"]) == len(results.checks)
    assert len(saved["speeds"]) == len(results.speeds)
    backends = {row["cache_dtype"]: row["backends"] for row in results.engines}
    assert "vllm_hybrid_kv K8V4AttentionBackend" in backends[K8V4]
    assert list(backends["auto"]) == ["CPUAttentionBackend"]

    # And a cache that does not hold the same would show.
    prompts = subjects.prompt_pool(subjects.SMALLEST)
    unquantised, quantised = (kept[name].generate(prompts, 12) for name in ("auto", K8V4))
    assert compare(quantised, unquantised, subjects.bounds_of("llama", "float32")).different
    with pytest.raises(EngineError, match=r"^\w+Error: .*maximum context length"):
        kept["auto"].generate([[5] * 5000], 1)
