# SPDX-License-Identifier: Apache-2.0
"""How an evaluation parses cache names, locks its folder, gives engines jobs, and continues."""

import json
from pathlib import Path

import pytest

from vllm_hybrid_kv.tools.eval import run as run_module
from vllm_hybrid_kv.tools.eval.run import RESERVED, Run, opened, parse
from vllm_hybrid_kv.tools.output import ToolError

NAME = "turboquant_k8v4[boundary_layers=0]"
AUTO, K8V4 = parse(NAME, "auto")
SEQUENCES = ([1, 2, 3], [4, 5])
SCORES = ([[-1, -2], [0, 0.5], [1, 0]], [[-1], [1], [1]])
FACTS = {"device": "cuda", "cache_dtype": "auto"}
IDENTITY = {"model": ["a", {"b": [1, 2]}], "data": "abc", "engine_args": {}}


def test_the_reference_comes_first_and_every_cache_once():
    text = f"fp8, auto,fp8,turboquant_k8v4,{NAME}"
    names = [variant.name for variant in parse(text, "auto")]
    assert names == ["auto", "fp8", "turboquant_k8v4", NAME]
    assert [variant.name for variant in parse("auto", "bfloat16")] == ["bfloat16", "auto"]


def test_settings_follow_in_brackets():
    _, fp8, some = parse("fp8,k8v4[unify_page_sizes=lcm, boundary_layers = 0]", "auto")
    assert (fp8.kv_cache_dtype, fp8.settings) == ("fp8", {})
    assert some.kv_cache_dtype == "k8v4"
    assert some.settings == {"boundary_layers": "0", "unify_page_sizes": "lcm"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a cache dtype"),
        ("fp8,,auto", "'' is not a cache dtype"),
        (NAME[:-1], "is not a cache dtype; separate dtypes with commas"),
        ("k8v4[boundary_layers]", "'k8v4[boundary_layers]' is not a cache dtype"),
        ("auto", "'auto' has nothing to compare with auto"),
    ],
)
def test_invalid_lists_of_caches_are_rejected(text, message):
    with pytest.raises(ToolError) as error:
        parse(text, "auto")
    assert message in str(error.value)


def refusal(folder, identity=IDENTITY):
    with pytest.raises(ToolError) as error, opened(folder, identity):
        pass
    assert "--work" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"data": "abd"}, "another data;"),
        ({"model": ["a", {"b": [1, 3]}]}, "another model;"),
        ({"engine_args": {"dtype": "float32"}, "vllm": "1"}, "another engine_args, vllm;"),
    ],
)
def test_a_folder_belongs_to_one_run(tmp_path, change, differs):
    for _ in range(2):
        with opened(tmp_path / "run", IDENTITY):
            pass
    assert differs in refusal(tmp_path / "run", {**IDENTITY, **change})
    (tmp_path / "run" / "run.json").write_text("5")
    assert "belongs to an evaluation with another model, data" in refusal(tmp_path / "run")


def test_a_folder_is_locked_while_it_is_open(tmp_path):
    # `flock` locks an open file, not a process. So opening the folder again here conflicts too.
    with opened(tmp_path, IDENTITY):
        assert "another evaluation uses this folder" in refusal(tmp_path)
    with opened(tmp_path, IDENTITY):
        pass


def engine(send, job_file):
    """Stand in for an engine: write a job's facts and scores, or fail if `fails` exists."""
    job = json.loads(Path(job_file).read_text())
    if (Path(job_file).parent / "fails").exists():
        raise SystemExit("the engine does not start")
    Path(job["facts"]).write_text(json.dumps(FACTS))
    for number in job["pending"]:
        Path(job["scores"][number]).write_text(json.dumps(SCORES[number]))
        send(scored=number)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run that starts the function `engine` above instead of real engines."""
    monkeypatch.setattr(run_module, "ENGINE", f"{__name__}:engine")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))  # children import this file
    return Run(tmp_path, "a/model", SEQUENCES, {"dtype": "float16", "seed": 5, "max_num_seqs": 9})


def job_of(folder):
    return json.loads((folder / "job.json").read_text())


def test_caches_are_measured_once_and_compared_with_the_reference(run, tmp_path):
    (auto, k8v4), scores = run.measure([AUTO, K8V4])
    assert (auto["name"], k8v4["name"]) == ("auto", NAME)
    assert (k8v4["reason"], k8v4["device"], k8v4["positions"]) == (None, "cuda", 3)
    assert k8v4["divergence_mean"] == 0.5
    assert [window.tolist() for window in scores[NAME]] == list(SCORES)
    jobs = [job_of(tmp_path / name) for name in ("auto", NAME)]
    assert [job["is_reference"] for job in jobs] == [True, False]
    assert jobs[0]["states"] == jobs[1]["states"]
    assert jobs[0]["states"][1] == str(tmp_path / "auto" / "00001.safetensors")
    assert jobs[1]["engine"]["additional_config"] == {"hybrid_kv": {"boundary_layers": "0"}}
    # From here on every engine start fails, so the second run must use the stored results.
    (tmp_path / "auto" / "fails").touch()
    (again, _), _ = run.measure([AUTO, K8V4])
    assert again == auto


@pytest.mark.parametrize(
    ("lost", "pending"), [("facts.json", []), ("00000.json", [0]), ("00001.json", [1])]
)
def test_an_engine_computes_what_an_interrupted_run_lacks(run, tmp_path, lost, pending):
    ((before,), _) = run.measure([AUTO])
    (tmp_path / "auto" / lost).unlink()
    ((after,), _) = run.measure([AUTO])
    assert job_of(tmp_path / "auto")["pending"] == pending
    assert after == before


def test_a_cache_that_fails_has_a_reason_and_the_reference_must_not_fail(run, tmp_path):
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "fails").touch()
    (_, failed), _ = run.measure([AUTO, K8V4])
    assert failed["name"] == NAME
    assert failed["reason"].startswith("the engine does not start; the engine's output is in ")
    with pytest.raises(ToolError, match=r"boundary_layers=0\]: the engine does not start"):
        run.measure([K8V4])


def test_the_user_cannot_change_arguments_that_scores_depend_on(run, tmp_path):
    run.measure([AUTO])
    given = job_of(tmp_path / "auto")["engine"]
    assert (given["dtype"], given["seed"], given["max_model_len"]) == ("float16", 5, 4)
    assert (given["max_num_seqs"], given["enable_prefix_caching"]) == (1, False)
    assert {"max_num_seqs", "enable_prefix_caching", "max_model_len"} <= set(RESERVED)


def test_the_settings_of_a_cache_override_the_environment(run, monkeypatch):
    environments = []

    class Stop(Exception):
        pass

    def child(*_, environment, **__):
        environments.append(environment)
        raise Stop

    monkeypatch.setattr(run_module, "Child", child)
    monkeypatch.setenv("VLLM_HYBRID_KV_BOUNDARY_LAYERS", "2")
    monkeypatch.setenv("VLLM_HYBRID_KV_DEBUG", "1")
    for variant in (AUTO, K8V4):
        with pytest.raises(Stop):
            run.measure([variant])
    values = [one.get("VLLM_HYBRID_KV_BOUNDARY_LAYERS") for one in environments]
    assert values == ["2", None]
    assert environments[1]["VLLM_HYBRID_KV_DEBUG"] == "1"
