# SPDX-License-Identifier: Apache-2.0
"""What a run gives an engine's process, and what it takes from a folder without one."""

import json

import numpy
import pytest

from vllm_hybrid_kv.tools.eval.errors import SubjectError
from vllm_hybrid_kv.tools.eval.folder import FACTS, Folder, Scored, write_scores
from vllm_hybrid_kv.tools.eval.run import RESERVED, Run, _environment
from vllm_hybrid_kv.tools.eval.subjects import Subject

AUTO, K8V4 = Subject("auto"), Subject("turboquant_k8v4", {"boundary_layers": 0})
SEQUENCES = ([1, 2, 3], [4, 5])
FACT = {"cache_dtype": "auto"}


def fill(path, keep):
    """Put the scores of all sequences there, as an engine would."""
    for number, tokens in enumerate(SEQUENCES):
        ones = numpy.ones(len(tokens) - 1)
        write_scores(path / f"{number:05}.npz", Scored(-ones, ones * number, ones > 0))
        if keep:
            (path / f"{number:05}.safetensors").touch()
    (path / FACTS).write_text(json.dumps(FACT))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose engines end at once."""
    monkeypatch.setattr("vllm_hybrid_kv.tools.eval.run._CODE", "raise SystemExit(3)")
    return Run(Folder(tmp_path), "no/model", SEQUENCES, {})


def test_what_is_scored_needs_no_engine(run, tmp_path):
    fill(Folder(tmp_path).of("auto"), keep=True)
    told = []
    measured = run.measure(AUTO, AUTO, told.append)
    assert measured.facts == FACT
    assert [one.divergences.tolist() for one in measured.scored] == [[0, 0], [1]]
    assert told == [2]


@pytest.mark.parametrize("lost", ["00001.npz", "00001.safetensors", FACTS])
def test_what_the_reference_has_lost_an_engine_is_started_for(run, tmp_path, lost):
    folder = Folder(tmp_path).of("auto")
    fill(folder, keep=True)
    (folder / lost).unlink()
    with pytest.raises(SubjectError, match="its engine ended with exit status 3"):
        run.measure(AUTO, AUTO, lambda _: None)
    job = json.loads((folder / "job.json").read_text())
    assert job["pending"] == ([] if lost == FACTS else [1])
    assert job["keep"] is True
    assert job["states"] == [str(folder / f"0000{number}.safetensors") for number in (0, 1)]


def test_another_cache_is_compared_with_the_references_states(run, tmp_path):
    with pytest.raises(SubjectError):
        run.measure(K8V4, AUTO, lambda _: None)
    job = json.loads((Folder(tmp_path).of(K8V4.name) / "job.json").read_text())
    assert (job["pending"], job["keep"]) == ([0, 1], False)
    assert job["settings"] == {"boundary_layers": 0}
    assert {str(Folder(tmp_path).of("auto"))} == {path.rpartition("/")[0] for path in job["states"]}


def test_arguments_are_the_users_but_for_those_that_scores_hang_on(tmp_path):
    given = {"dtype": "float16", "seed": 5, "max_num_seqs": 9}
    run = Run(Folder(tmp_path), "a/model", SEQUENCES, given)
    engine = run._engine
    assert (engine["dtype"], engine["seed"], engine["max_model_len"]) == ("float16", 5, 4)
    assert (engine["max_num_seqs"], engine["enable_prefix_caching"]) == (1, False)
    assert {"max_num_seqs", "enable_prefix_caching", "max_model_len"} <= set(RESERVED)


def test_a_caches_own_settings_win_over_the_environment(monkeypatch):
    monkeypatch.setenv("VLLM_HYBRID_KV_BOUNDARY_LAYERS", "2")
    monkeypatch.setenv("VLLM_HYBRID_KV_DEBUG", "1")
    environment = _environment(K8V4)
    assert "VLLM_HYBRID_KV_BOUNDARY_LAYERS" not in environment
    assert environment["VLLM_HYBRID_KV_DEBUG"] == "1"
    assert _environment(AUTO)["VLLM_HYBRID_KV_BOUNDARY_LAYERS"] == "2"


def test_an_engine_that_is_killed_is_said(run, tmp_path, monkeypatch):
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr("vllm_hybrid_kv.tools.eval.run._CODE", kill)
    with pytest.raises(SubjectError, match=r"its engine ended with SIGKILL .*log\.txt"):
        run.measure(AUTO, AUTO, lambda _: None)
