# SPDX-License-Identifier: Apache-2.0
"""`vllm-hybrid-kv eval` reports wrong input in one line, before an engine starts."""

import json
import math

import numpy
import pytest
from typer.testing import CliRunner

from vllm_hybrid_kv.tools.eval.scores import summarise
from vllm_hybrid_kv.tools.main import app


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """A function that runs an evaluation in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "model").mkdir()
    (tmp_path / "tokens.jsonl").write_text('{"prompt_token_ids": [1, 2, 3]}\n')
    (tmp_path / "data.txt").write_text("some text")

    def call(*arguments):
        command = ["eval", "model", "--data", "tokens.jsonl", *arguments]
        return CliRunner().invoke(app, command)

    return call


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "missing.jsonl"), "--data: missing.jsonl: "),
        (("--data", "data.txt"), "the tokenizer of model cannot be loaded"),
        (("--kv-cache-dtype", "auto"), "has nothing to compare with auto"),
        (("--kv-cache-dtype", "fp8[colour=red]"), "unknown setting 'colour'"),
        (("--kv-cache-dtype", "k[boundary_layers=-1]"), "boundary_layers='-1'"),
        (("--engine-args", "dtype=float32"), "--engine-args: 'dtype=float32' is not a JSON object"),
        (("--engine-args", "[1]"), "--engine-args: '[1]' is not a JSON object"),
        (("--engine-args", '{"max-num-seqs": 4, "model": "b"}'), "remove max_num_seqs, model"),
        (("--work", "data.txt/run"), "choose a writable folder with --work"),
        (("--plot", "missing/out.png"), "--plot: missing/out.png: No such file or directory"),
    ],
)
def test_wrong_input_is_reported_in_one_line(evaluate, arguments, message):
    done = evaluate(*arguments)
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("vllm-hybrid-kv eval: ")
    assert message in line


def test_scores_depend_on_the_files_of_a_model_and_on_variables(tmp_path, monkeypatch):
    from vllm_hybrid_kv.tools.eval.command import _identity

    def identity():
        return _identity(str(tmp_path), [[1, 2]], {}, "auto", "0")

    (tmp_path / "config.json").write_text("{}")
    plain = identity()
    assert identity() == plain
    assert json.loads(json.dumps(plain)) == plain
    (tmp_path / "config.json").write_text("{ }")
    changed = identity()
    monkeypatch.setenv("VLLM_HYBRID_KV_BOUNDARY_LAYERS", "0")
    for other, key in ((changed, "model"), (identity(), "environment")):
        assert other[key] != plain[key]


def test_infinity_and_nan_are_null_in_json(evaluate, tmp_path, monkeypatch):
    from vllm_hybrid_kv.tools.eval.run import Run

    layers = {"quantised_layers": 1, "unquantised_layers": 0}
    facts = {"reason": None, "dtype": "x", "device": "x", "cache_dtype": "fp8", **layers}
    windows = [numpy.array([[-1.0, -2.0], [0.5, math.inf], [1.0, 1.0]])]
    caches = [{"name": name, **facts, **summarise(windows)} for name in ("auto", "fp8")]
    monkeypatch.setattr(Run, "measure", lambda *_: (caches, {"fp8": windows}))
    done = evaluate("--kv-cache-dtype", "fp8", "--json", "out.json", "--plot", "out.png")
    assert done.exit_code == 0, done.output
    assert "note: the model's configuration makes auto fp8" in done.stdout
    fp8 = json.loads((tmp_path / "out.json").read_text())["caches"][1]
    assert (fp8["divergence_mean"], fp8["divergence_error"]) == (None, None)
    assert fp8["by_position"][0]["divergence_mean"] is None
    assert fp8["positions"] == 2
    assert (tmp_path / "out.png").stat().st_size > 0


def test_help_is_complete_at_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert "…" not in CliRunner().invoke(app, ["eval", "--help"], terminal_width=80).output
