# SPDX-License-Identifier: Apache-2.0
"""`vllm-hybrid-kv eval` reports wrong input in one line, before an engine starts."""

import json

import pytest
from typer.testing import CliRunner

from vllm_hybrid_kv.tools.eval.folder import Folder
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
        (("--kv-cache-dtype", "fp8,["), "--kv-cache-dtype: '[' is not a cache dtype"),
        (("--kv-cache-dtype", "auto"), "has nothing to compare with auto"),
        (("--kv-cache-dtype", "fp8[colour=red]"), "unknown setting 'colour'"),
        (("--kv-cache-dtype", "k[boundary_layers=-1]"), "boundary_layers=-1"),
        (("--engine-args", "dtype=float32"), "--engine-args is not JSON"),
        (("--engine-args", "[1]"), "--engine-args is not a JSON object"),
        (("--engine-args", '{"max-num-seqs": 4, "model": "b"}'), "remove max_num_seqs, model"),
        (("--work", "data.txt/run"), "choose a writable folder with --work"),
        (("--plot", "missing/out.png"), "--plot: missing/out.png: No such file"),
    ],
)
def test_wrong_input_is_reported_in_one_line(evaluate, arguments, message):
    done = evaluate(*arguments)
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("vllm-hybrid-kv eval: ")
    assert message in line


def test_the_folder_of_another_run_is_rejected(evaluate, tmp_path):
    with Folder(tmp_path / "run").opened({"data": "other"}):
        pass
    done = evaluate("--work", "run")
    assert done.exit_code == 2
    assert "belongs to an evaluation with another data, model" in done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == {"data": "other"}


def test_a_variable_of_the_plugin_makes_another_run(monkeypatch):
    from vllm_hybrid_kv.tools.eval.command import _identity

    plain = _identity("model", [[1, 2]], {}, "auto", "0")
    monkeypatch.setenv("VLLM_HYBRID_KV_BOUNDARY_LAYERS", "0")
    assert _identity("model", [[1, 2]], {}, "auto", "0") != plain
