# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.engine`: its verdicts, its report, and one run on two engines."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

import benchmarks.engine.__main__ as command
from benchmarks.engine import configurations, engines, report, workload
from benchmarks.engine.checks import choose
from benchmarks.engine.configurations import AUTO, K8V4, REFERENCE, Configuration, Place
from benchmarks.engine.engines import Engines
from benchmarks.engine.report import Check, Gap, Results, Speed, Verdict
from testing import machine
from testing.engine_host import EngineError, EngineHost
from testing.engine_requests import Output
from testing.engine_worker import reason
from testing.models import build_model, qwen3_5_config, qwen3_next_config, with_mtp_layer
from testing.output_comparison import Bounds, compare, decisive, far_from_unquantised

BOUNDS = Bounds(rounding=0.1, farthest=0.5)
ON_CPU = Place("cpu", compiled=True, memory_bytes=1 << 34)
ON_GPU = Place("cuda", compiled=True, memory_bytes=1 << 36)
WITHOUT_EXTENSION = replace(ON_GPU, compiled=False)


def output(tokens: list[int], margins: list[float], moved: float = 0.0) -> Output:
    return Output(tokens, [-1.0 + moved] * len(tokens), margins)


# Comparisons


def test_tokens_are_compared_up_to_the_first_close_choice() -> None:
    wanted = output([1, 2, 3, 4], [9.0, 9.0, 0.2, 9.0])
    assert decisive(wanted, BOUNDS) == 2
    other = output([1, 2, 7, 8], [9.0] * 4)
    found = compare([other], [wanted], BOUNDS)
    assert (found.different, found.prompts, found.tokens) == ([], 1, 2)
    assert compare([other], [wanted], BOUNDS, whole=True).different


@pytest.mark.parametrize(
    ("got", "words"),
    [
        (output([1, 9, 3], [9.0] * 3), "prompt 0: token 1 is 9, not 2, which was 5.50 ahead"),
        (output([1], [9.0]), "prompt 0: 1 tokens of 2"),
        (output([1, 2, 3], [9.0] * 3, 0.6), "log-probabilities up to 0.600 apart, 0.5 allowed"),
        (output([1, 2, 3], [9.0] * 3, float("nan")), "log-probabilities up to nan apart"),
    ],
)
def test_differences_that_rounding_does_not_explain_are_described(got: Output, words: str) -> None:
    wanted = output([1, 2, 3], [9.0, 5.5, 0.0])
    assert words in compare([got], [wanted], BOUNDS).different[0]


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
    # The second token after the longest prompt is a close choice.
    assert choose(outputs, prompts, 3, BOUNDS) == [0, 3, 4]
    # Fewer than six have two decisive tokens, and one has none.
    assert choose(outputs, prompts, 6, BOUNDS) == [0, 1, 2, 3, 4]


def test_errors_beyond_the_format_are_described_by_the_bound_they_exceed() -> None:
    unquantised = [-float(i % 7) for i in range(200)]
    spread = statistics.pstdev(unquantised)

    def run(error: float) -> tuple[float, list[str]]:
        measured = [value + error for value in unquantised]
        return far_from_unquantised(measured, unquantised, 64, spread)

    mean, exceeded = run(0.05)
    assert (round(mean, 6), exceeded) == (0.05, [])
    assert [words.split()[0] for words in run(0.3)[1]] == ["mean"]
    assert len(run(float("nan"))[1]) == 3


# Configurations


def test_graphs_are_run_only_with_vllms_extension_for_a_gpu() -> None:
    names = {*configurations.GRAPHS, "ngram, full graphs", "mtp, full graphs"}
    tried, skipped = configurations.to_check("qwen3.5", ON_GPU, None, second=True)
    assert names <= {c.name for c in tried}
    assert skipped == []
    for place, why in ((ON_CPU, "CPUs have no graphs"), (WITHOUT_EXTENSION, "no compiled vLLM")):
        tried, skipped = configurations.to_check("qwen3.5", place, None, second=False)
        assert all(c.graphs is None for c in tried)
        assert names <= {row.name for row in skipped if why in row.reason}


def test_every_engine_has_a_control_without_plugin_and_quantisation() -> None:
    tried, _ = configurations.to_check("qwen3.5", ON_GPU, None, second=True)
    for configuration in tried:
        control = configuration.control()
        assert control.environment()["VLLM_PLUGINS"] == ""
        assert configuration.environment()["VLLM_PLUGINS"] == "hybrid_kv"
        expected = {**configuration.arguments(), "kv_cache_dtype": "auto"}
        assert control.arguments() == expected


@pytest.mark.parametrize(
    ("runner", "second", "other"), [(None, True, ["0"]), (None, False, ["1"]), ("0", False, [])]
)
def test_the_other_model_runner_is_run_unless_it_failed_unquantised(
    runner: str | None, second: bool, other: list[str]
) -> None:
    tried, _ = configurations.to_check("llama", ON_GPU, runner, second)
    assert [c.runner for c in tried if c.name == "the other model runner"] == other


def test_stock_k8v4_is_timed_on_gpus_and_skipped_on_cpus() -> None:
    modes, skipped = configurations.to_time("llama", ON_GPU, None)
    assert skipped == []
    for caches in modes.values():
        assert [(c.name, c.plugin, c.cache_dtype) for c in caches] == [
            ("k8v4", True, K8V4),
            ("auto", False, "auto"),
            ("fp8", False, "fp8"),
            ("stock k8v4", False, K8V4),
        ]
    modes, skipped = configurations.to_time("llama", ON_CPU, None)
    assert [c.name for c in modes["eager"]] == ["k8v4", "auto", "fp8"]
    assert "nonsense" in {row.name: row.reason for row in skipped}["stock k8v4"]


@pytest.mark.parametrize(("suffix", "compiled"), [(".py", False), (".abi3.so", True)])
def test_a_python_substitute_is_not_a_compiled_extension(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, compiled: bool
) -> None:
    import vllm

    (tmp_path / f"_C_stable_libtorch{suffix}").touch()
    monkeypatch.setattr(vllm, "__path__", [str(tmp_path)])
    assert machine.has_compiled_extension() is compiled


@pytest.mark.parametrize("model", workload.MODELS)
def test_the_largest_batch_fits_the_cache_of_a_gpu_of_80_gib(model: str) -> None:
    config = workload.config_to_time(model, workload.FULL)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    assert len(kinds) == config.num_hidden_layers
    per_token = 2 * 2 * config.num_key_value_heads * config.head_dim
    tokens = max(batch * length for batch, length in workload.FULL.cells)
    needed = tokens * per_token * sum(kind != "linear_attention" for kind in kinds)
    assert needed < workload.FULL.cache_share * (80 << 30)


@pytest.mark.parametrize("make", [qwen3_next_config, qwen3_5_config])
def test_a_multi_token_prediction_layer_does_not_change_the_other_weights(
    tmp_path: Path, make: Any
) -> None:
    plain, more = (
        load_file(build_model(config, tmp_path / name) / "model.safetensors")
        for name, config in (("plain", make(layers=4)), ("more", with_mtp_layer(make(layers=4))))
    )
    assert all(torch.equal(more[name], weight) for name, weight in plain.items())
    added = more.keys() - plain.keys()
    assert all(name.startswith("mtp.") for name in added)
    # It has the weights of a layer of full attention.
    layer = {n.removeprefix("model.layers.3.") for n in plain if n.startswith("model.layers.3.")}
    assert layer == {n.removeprefix("mtp.layers.0.") for n in added if ".layers." in n}


# The report


def test_a_reason_is_the_last_informative_line() -> None:
    assert reason(ValueError("first\n\nlast\n")) == "ValueError: last"
    pydantic = "1 error\n  Value error, no. [type=x, input={}]\n    For further information visit u"
    assert reason(ValueError(pydantic)) == "ValueError: Value error, no."
    assert reason(AssertionError()) == "AssertionError"


def test_only_unequal_outputs_and_our_failures_fail_the_command() -> None:
    results = Results()
    for verdict in Verdict:
        results.checks.append(Check("llama", "eager", "alone", verdict))
        results.gaps.append(Gap("llama", "eager", "k8v4", verdict, "why"))
    failing = {row.verdict for row in results.failures}
    assert failing == {Verdict.DIFFERENT, Verdict.FAILED}
    assert len(results.failures) == 4


def test_ratios_are_medians_of_the_ratios_of_each_round() -> None:
    # The machine slows down to a tenth in the second round.
    speed = Speed("llama", "eager", 4, 64, {"k8v4": [1.0, 10.0, 2.0], "auto": [2.0, 20.0, 3.0]})
    assert speed.times_faster() == {"auto": 2.0}
    assert speed.ms_per_token("auto") == 3.0
    assert speed.tokens_per_s("k8v4") == 2000.0
    assert replace(speed, milliseconds={"auto": [1.0], "fp8": [2.0]}).times_faster() == {}


def test_the_report_contains_every_comparison_time_and_reason(tmp_path: Path) -> None:
    results = Results(
        checks=[
            Check("llama", "ngram", "alone", Verdict.EQUAL, "", 6, 40, 0.01),
            Check(
                "llama", "eager", "all at once", Verdict.DIFFERENT, "prompt 3: a | b", 6, 30, 0.2
            ),
            Check("gemma3", "mtp", "", Verdict.UNSUPPORTED, "with auto: TypeError: no MTP"),
        ],
        speeds=[Speed("llama", "eager", 4, 64, {"k8v4": [1.0], "fp8": [1.5]})],
        gaps=[
            Gap("llama", "eager", "stock k8v4", Verdict.UNSUPPORTED, "ValueError: no", (4, 64)),
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
        "| gemma3 | mtp | unsupported by vLLM | with auto: TypeError: no MTP |",
        "| llama | eager | 4, 64 | 1.000 ms, 4000/s | 1.500 ms, 2667/s (1.50) |",
        "| model | mode | batch, tokens | cache |  | reason |",
        "| llama | eager | 4, 64 | stock k8v4 | unsupported by vLLM | ValueError: no |",
        "| llama | ngram | all | k8v4 | FAILED | RuntimeError: broken |",
        "only the ratios are meaningful",
    ):
        assert part in text
    found = json.loads((tmp_path / "engine.json").read_text())
    assert [row["verdict"] for row in found["failures"]] == ["DIFFERENT", "FAILED"]
    assert found["speeds"][0]["times_faster"] == {"fp8": 1.5}


# The command with real engines


class KeptHost(EngineHost):
    """A host that the command cannot close once its engine runs."""

    def close(self) -> None:
        if not self.started:
            super().close()

    def end(self) -> None:
        super().close()


class TwoEngines(Engines):
    """Starts one engine with a k8v4 cache and one without, and refuses other caches."""

    kept: ClassVar[dict[str, EngineHost]] = {}

    def start(self, configuration: Configuration, mode: str = "") -> EngineHost:
        dtype = configuration.cache_dtype
        if dtype not in (AUTO.cache_dtype, REFERENCE.cache_dtype):
            raise EngineError("ValueError: no third engine")
        if dtype not in self.kept:
            self.kept[dtype] = super().start(replace(configuration, chunk=96), mode)
        return self.kept[dtype]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, KeptHost]]:
    kept: dict[str, KeptHost] = {}
    monkeypatch.setattr(engines, "EngineHost", KeptHost)
    monkeypatch.setattr(TwoEngines, "kept", kept)
    monkeypatch.setattr(command, "Engines", TwoEngines)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield kept
    for host in kept.values():
        host.end()


@pytest.mark.engine
def test_the_command_compares_and_times_two_engines(
    tmp_path: Path, kept: dict[str, KeptHost]
) -> None:
    options = command.parse(["--out", str(tmp_path), "--smallest"])
    results = Results()
    lines: list[str] = []
    command.run_model("llama", options, ON_CPU, tmp_path, results, lines.append)
    assert len(lines) == len(results.checks) + len(results.gaps) + len(results.speeds)

    checks = {(c.configuration, c.check): c for c in results.checks}
    for engine in ("eager", "prompts in chunks of 96", "ngram"):
        for what in ("all at once", "again, from the prefix cache"):
            check = checks[engine, what]
            assert check.verdict is Verdict.EQUAL, check
            assert (check.prompts, check.tokens > 12) == (workload.SMALLEST.prompts, True)
    for engine, what in (("eager", "generated tokens"), ("prompts in chunks of 96", "tokens of")):
        check = next(c for c in results.checks if c.configuration == engine and what in c.check)
        assert check.verdict is Verdict.EQUAL, check
        # The format moves log-probabilities, so the cache was quantised.
        assert check.apart is not None
        assert check.apart > 0.01
    drafts = checks["ngram", "drafts both accepted and rejected"]
    assert (drafts.verdict, drafts.detail) == (Verdict.INCONCLUSIVE, "0 drafted, 0 accepted")

    assert [(s.batch, s.length) for s in results.speeds if s.mode == "eager"] == [
        *workload.SMALLEST.cells
    ]
    for speed in results.speeds:
        assert speed.milliseconds.keys() == {"k8v4", "auto"}
        assert all(len(times) == workload.SMALLEST.rounds for times in speed.milliseconds.values())
        assert all(time > 0 for times in speed.milliseconds.values() for time in times)
    reasons = {gap.cache: gap.reason for gap in results.gaps if gap.mode == "eager"}
    assert reasons == {"fp8": "ValueError: no third engine"}
    assert not results.failures
    backends = {row["cache_dtype"]: row["backends"] for row in results.engines}
    assert "vllm_hybrid_kv K8V4AttentionBackend" in backends[K8V4]
    assert list(backends["auto"]) == ["CPUAttentionBackend"]

    # A cache with other contents is detected.
    prompts = workload.prompt_pool(workload.SMALLEST)
    unquantised, quantised = (kept[name].generate(prompts, 12) for name in ("auto", K8V4))
    assert compare(quantised, unquantised, workload.bounds_of("llama", "float32")).different
    with pytest.raises(EngineError) as caught:
        kept["auto"].generate([[5] * 5000], 1)
    assert "maximum context length" in caught.value.reason
