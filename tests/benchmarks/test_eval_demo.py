# SPDX-License-Identifier: Apache-2.0
"""`make eval-demo`: what it asks for, of which model, and what its report says."""

import json
from pathlib import Path

import numpy
import pytest

from benchmarks import eval_demo
from tests.recall import sequences as recall

RESULTS = Path(eval_demo.__file__).parent / "results"


def test_the_data_is_that_of_the_committed_results():
    what, windows = eval_demo.trained_data(eval_demo.parse([]).windows)
    found = json.loads((RESULTS / "eval_demo.json").read_text())
    assert found["sequences"] == len(windows) == 20
    assert found["positions"] == sum(len(window) - 1 for window in windows)
    assert what in (RESULTS / "eval_demo.md").read_text()
    assert windows == eval_demo.trained_data(len(windows) // 2)[1]
    assert all(0 <= token < recall.VOCAB_SIZE for window in windows for token in window)


def test_the_text_is_none_that_the_model_was_trained_on():
    _, windows = eval_demo.trained_data(3)
    seen = recall.corpus().astype(numpy.uint16).tobytes()
    for window in windows[:3]:
        assert window[0] == recall.BOS
        assert numpy.array(window[1:], numpy.uint16).tobytes() not in seen


def test_every_cache_of_the_results_was_asked_for():
    found = json.loads((RESULTS / "eval_demo.json").read_text())
    assert [cache["name"] for cache in found["caches"]] == ["auto", *eval_demo.CACHES]
    assert found["model"] == str(eval_demo.TRAINED.relative_to(eval_demo.ROOT))
    assert [cache["quantised_layers"] for cache in found["caches"]] == [0, 5, 5, 3, 1]


def test_documents_have_the_numbers_of_the_results():
    found = json.loads((RESULTS / "eval_demo.json").read_text())
    page = (eval_demo.ROOT / "docs" / "eval.md").read_text()
    report = (RESULTS / "eval_demo.md").read_text()
    for cache in found["caches"][1:]:
        said = f"{cache['divergence_mean']:.5f} ± {cache['divergence_error']:.5f}"
        assert said in page
        assert said in report
        assert f"| {cache['divergence_mean']:.5f} | " in page


def test_without_a_trained_model_the_report_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eval_demo, "evaluate", lambda *_: "a table")
    out = tmp_path / "out"
    eval_demo.main(
        [
            *("--model", str(tmp_path / "none"), "--out", str(out), "--windows", "2"),
            *("--work", str(tmp_path / "work")),
        ]
    )
    report = (out / "eval_demo.md").read_text()
    assert "**The model has random weights**" in report
    assert "2 windows of 1,024 random tokens" in report
    assert "a table" in report
    assert "a table" in capsys.readouterr().out
    assert (tmp_path / "work" / "model" / "config.json").exists()


def test_a_run_that_fails_writes_no_report(tmp_path, monkeypatch):
    monkeypatch.setattr(eval_demo, "CACHES", ("fp8,[",))
    (tmp_path / "model").mkdir()
    with pytest.raises(SystemExit) as ended:
        eval_demo.main(
            [
                *("--model", str(tmp_path / "model"), "--out", str(tmp_path), "--windows", "1"),
                *("--work", str(tmp_path / "work")),
            ]
        )
    assert ended.value.code == 2
    assert not (tmp_path / "eval_demo.md").exists()
