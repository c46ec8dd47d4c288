# SPDX-License-Identifier: Apache-2.0
"""What a run sends to an engine, and what it reads from its folder without an engine."""

import json
from pathlib import Path

import pytest

from vllm_hybrid_kv.tools.eval import run as run_module
from vllm_hybrid_kv.tools.eval.folder import Folder
from vllm_hybrid_kv.tools.eval.run import RESERVED, CacheError, Run, _environment
from vllm_hybrid_kv.tools.eval.variants import CacheVariant

AUTO, K8V4 = CacheVariant("auto"), CacheVariant("turboquant_k8v4", {"boundary_layers": 0})
SEQUENCES = ([1, 2, 3], [4, 5])
LINES = (
    {"facts": {"cache_dtype": "auto"}},
    {"number": 0, "scores": {"logprobs": [-1, -2], "divergences": [0, 0], "agreements": [1, 1]}},
    {"number": 1, "scores": {"logprobs": [-1], "divergences": [1], "agreements": [1]}},
)


def fail(send, *_):
    raise SystemExit("the engine does not start")


def report(send, job_file):
    with open(job_file) as file:
        job = json.load(file)
    for number in job["pending"]:
        send(**LINES[1 + number])


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose engines fail at once."""
    monkeypatch.setattr(run_module, "ENGINE", f"{__name__}:fail")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))  # children import this file
    return Run(Folder(tmp_path), "no/model", SEQUENCES, {})


@pytest.fixture
def folder(tmp_path):
    """The reference's folder with all scores."""
    folder = Folder(tmp_path).of("auto")
    (folder / "scores.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    for number in (0, 1):
        (folder / f"0000{number}.safetensors").touch()
    return folder


def test_existing_scores_need_no_engine(run, folder):
    counts = []
    facts, scored = run.measure(AUTO, AUTO, counts.append)
    assert facts == {"cache_dtype": "auto"}
    assert [one.divergences for one in scored] == [[0, 0], [1]]
    assert counts == [2]


@pytest.mark.parametrize(
    ("lost", "pending"), [("facts", []), ("score", [1]), ("position", [0]), ("states", [1])]
)
def test_an_engine_computes_what_the_reference_has_lost(run, folder, lost, pending):
    facts, first, second = map(json.dumps, LINES)
    if lost == "states":
        (folder / "00001.safetensors").unlink()
    lines = {
        "facts": (first, second),
        "score": (facts, first, second[:-2]),
        "position": (facts, first.replace("[-1, -2]", "[-1]"), second),
        "states": (facts, first, second),
    }
    (folder / "scores.jsonl").write_text("\n".join(lines[lost]))
    with pytest.raises(CacheError, match=r"the engine does not start; .*log\.txt"):
        run.measure(AUTO, AUTO, lambda _: None)
    job = json.loads((folder / "job.json").read_text())
    assert job["pending"] == pending
    assert job["is_reference"] is True
    assert job["states"] == [str(folder / f"0000{number}.safetensors") for number in (0, 1)]


def test_scores_are_appended_to_those_of_an_interrupted_run(run, folder, monkeypatch):
    monkeypatch.setattr(run_module, "ENGINE", f"{__name__}:report")
    facts, first, second = map(json.dumps, LINES)
    (folder / "scores.jsonl").write_text("\n".join((facts, first, second[:9])))
    counts = []
    _, scored = run.measure(AUTO, AUTO, counts.append)
    assert [one.logprobs for one in scored] == [[-1, -2], [-1]]
    assert counts == [1, 2]
    assert (folder / "scores.jsonl").read_text().splitlines() == [facts, first, second[:9], second]


def test_another_cache_is_compared_with_the_states_of_the_reference(run, tmp_path):
    with pytest.raises(CacheError):
        run.measure(K8V4, AUTO, lambda _: None)
    job = json.loads((Folder(tmp_path).of(K8V4.name) / "job.json").read_text())
    assert (job["pending"], job["is_reference"]) == ([0, 1], False)
    assert job["settings"] == {"boundary_layers": 0}
    assert {str(Folder(tmp_path).of("auto"))} == {path.rpartition("/")[0] for path in job["states"]}


def test_the_user_cannot_change_arguments_that_scores_depend_on(tmp_path):
    given = {"dtype": "float16", "seed": 5, "max_num_seqs": 9}
    engine = Run(Folder(tmp_path), "a/model", SEQUENCES, given)._engine
    assert (engine["dtype"], engine["seed"], engine["max_model_len"]) == ("float16", 5, 4)
    assert (engine["max_num_seqs"], engine["enable_prefix_caching"]) == (1, False)
    assert {"max_num_seqs", "enable_prefix_caching", "max_model_len"} <= set(RESERVED)


def test_the_settings_of_a_cache_override_the_environment(monkeypatch):
    monkeypatch.setenv("VLLM_HYBRID_KV_BOUNDARY_LAYERS", "2")
    monkeypatch.setenv("VLLM_HYBRID_KV_DEBUG", "1")
    environment = _environment(K8V4)
    assert "VLLM_HYBRID_KV_BOUNDARY_LAYERS" not in environment
    assert environment["VLLM_HYBRID_KV_DEBUG"] == "1"
    assert _environment(AUTO)["VLLM_HYBRID_KV_BOUNDARY_LAYERS"] == "2"
