# SPDX-License-Identifier: Apache-2.0
"""`vllm-hybrid-kv eval` says what is wrong with its input in one line, before an engine starts."""

import json

import pytest
from typer.testing import CliRunner

from vllm_hybrid_kv.tools.eval.folder import Folder
from vllm_hybrid_kv.tools.main import app


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """A function that asks for an evaluation in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "model").mkdir()
    (tmp_path / "tokens.jsonl").write_text('{"prompt_token_ids": [1, 2, 3]}\n')
    (tmp_path / "data.txt").write_text("some text")

    def call(*arguments, data="tokens.jsonl"):
        return CliRunner().invoke(app, ["eval", "model", "--data", data, *arguments])

    return call


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "missing.jsonl"), "--data: missing.jsonl: "),
        (("--data", "data.txt"), "model has no tokenizer that can be loaded"),
        (("--kv-cache-dtype", "fp8,["), "--kv-cache-dtype: '[' is no dtype of a cache"),
        (("--kv-cache-dtype", "auto"), "has nothing to compare with auto"),
        (("--kv-cache-dtype", "fp8[colour=red]"), "unknown setting 'colour'"),
        (("--kv-cache-dtype", "k[boundary_layers=-1]"), "boundary_layers=-1"),
        (("--engine-args", "dtype=float32"), "--engine-args is not JSON"),
        (("--engine-args", "[1]"), "--engine-args is no object"),
        (("--engine-args", '{"max-num-seqs": 4, "model": "b"}'), "sets max_num_seqs, model"),
        (("--work", "data.txt/run"), "give a folder that can be written with --work"),
    ],
)
def test_wrong_input_ends_with_one_line(ask, arguments, message):
    done = ask(*arguments)
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("vllm-hybrid-kv eval: ")
    assert message in line


def test_a_folder_of_another_run_is_refused(ask, tmp_path):
    with Folder(tmp_path / "run").opened({"data": "other"}):
        pass
    done = ask("--work", "run")
    assert done.exit_code == 2
    assert "has another evaluation: data, model" in done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == {"data": "other"}


def test_a_variable_of_ours_makes_another_run(ask, tmp_path, monkeypatch):
    from vllm_hybrid_kv.tools.eval.command import _identity

    plain = _identity("model", [[1, 2]], {}, "auto", "0")
    monkeypatch.setenv("VLLM_HYBRID_KV_BOUNDARY_LAYERS", "0")
    assert _identity("model", [[1, 2]], {}, "auto", "0") != plain


def test_a_plot_without_matplotlib_is_refused_at_once(ask, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = ask("--plot", "out.png")
    assert done.exit_code == 2
    assert "--plot needs matplotlib" in done.stderr
