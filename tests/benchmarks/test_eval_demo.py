# SPDX-License-Identifier: Apache-2.0
"""`make eval-demo`: its data, its model, and its report."""

import re
from pathlib import Path

import numpy
import pytest

from benchmarks import eval_demo
from testing import recall_sequences as recall


def report() -> str:
    return (Path(eval_demo.__file__).parent / "results" / "eval_demo.md").read_text()


def test_the_data_are_those_of_the_committed_results():
    description, windows = eval_demo.trained_data(eval_demo.parse([]).windows)
    positions = sum(len(window) - 1 for window in windows)
    assert f"{positions:,} predictions in {len(windows)} windows" in report()
    assert description in report()
    assert windows == eval_demo.trained_data(len(windows) // 2)[1]
    assert all(0 <= token < recall.VOCAB_SIZE for window in windows for token in window)


def test_the_model_was_not_trained_on_the_text():
    _, windows = eval_demo.trained_data(3)
    seen = recall.corpus().astype(numpy.uint16).tobytes()
    for window in windows[:3]:
        assert window[0] == recall.BOS
        assert numpy.array(window[1:], numpy.uint16).tobytes() not in seen


def test_the_committed_results_contain_every_cache_and_the_docs_their_numbers():
    text = report()
    assert str(eval_demo.TRAINED.relative_to(eval_demo.ROOT)) in text
    rows = re.findall(r"│ (\S+) +│ (\d) of 5 .*\n(?:│ (\S+) +│ +│)?", text)
    caches = [f"{name}[{option}]" if option else name for name, _, option in rows]
    assert caches == ["auto", *eval_demo.CACHES]
    assert [quantised for _, quantised, _ in rows] == ["0", "5", "5", "3", "1"]
    page = (eval_demo.ROOT / "docs" / "accuracy.md").read_text()
    divergences = re.findall(r"of 5 .*?(\d\.\d{5} ± \d\.\d{5})", text)
    assert len(divergences) == len(caches)
    assert all(divergence in page for divergence in divergences[1:])


@pytest.fixture
def run(tmp_path):
    return lambda model, windows: eval_demo.main(
        [
            *("--model", str(model), "--out", str(tmp_path), "--windows", str(windows)),
            *("--work", str(tmp_path / "work")),
        ]
    )


def test_a_failed_run_writes_no_report(run, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_demo, "CACHES", ("fp8,[",))
    (tmp_path / "model").mkdir()
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "model", 1)
    assert ended.value.code == 2
    assert not (tmp_path / "eval_demo.md").exists()
