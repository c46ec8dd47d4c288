# SPDX-License-Identifier: Apache-2.0
"""Evaluations by real engines: the reference is what transformers computes, and runs go on."""

import json
import math
import os
import signal
import subprocess
import time

import numpy
import pytest

from tests.tools.eval.conftest import LENGTHS
from vllm_hybrid_kv.tools.doctor.installation import cpu_model
from vllm_hybrid_kv.tools.eval.folder import Folder, read_scores

pytestmark = pytest.mark.engine

ALL_LAYERS = "turboquant_k8v4[boundary_layers=0]"
POSITIONS = sum(LENGTHS) - len(LENGTHS)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluation") / "work"


@pytest.fixture(scope="module")
def outcome(run, work):
    done = run(ALL_LAYERS, work, "--json", "out.json", "--plot", "out.png")
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def numbers(outcome, work):
    return json.loads((work.parent / "out.json").read_text())


def scores_of(work, cache, number):
    return read_scores(Folder(work).of(cache) / f"{number:05}.npz", LENGTHS[number] - 1)


@pytest.fixture(scope="module")
def by_transformers(model, sequences):
    """The log-probabilities of the tokens that come, in float64 of float32 logits."""
    import torch
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = []
    for tokens in sequences:
        with torch.inference_mode():
            logits = whole(torch.tensor([tokens])).logits[0, :-1]
        logprobs = logits.double().log_softmax(-1)
        found.append(logprobs.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy())
    return found


def test_the_references_log_probabilities_are_those_of_transformers(outcome, work, by_transformers):
    for number, expected in enumerate(by_transformers):
        found = scores_of(work, "auto", number)
        numpy.testing.assert_allclose(found.logprobs, expected, rtol=2e-4, atol=2e-4)
        assert (found.divergences == 0).all()


def test_the_perplexity_is_that_of_transformers(numbers, by_transformers):
    expected = math.exp(-numpy.concatenate(by_transformers).mean())
    assert numbers["caches"][0]["perplexity"] == pytest.approx(expected, rel=1e-4)


def test_a_quantised_cache_diverges_a_little_everywhere(numbers, work):
    # Beside another position's states the divergence is that of strangers: 10 nats and more.
    auto, k8v4 = numbers["caches"]
    assert (auto["name"], k8v4["name"]) == ("auto", ALL_LAYERS)
    assert (auto["quantised_layers"], auto["unquantised_layers"]) == (0, 8)
    assert (k8v4["quantised_layers"], k8v4["unquantised_layers"]) == (8, 0)
    assert 1e-4 < k8v4["divergence_mean"] < 0.5
    assert 0.6 < k8v4["agreement"] < 1
    assert numbers["positions"] == k8v4["positions"] == POSITIONS
    for number in range(len(LENGTHS)):
        divergences = scores_of(work, ALL_LAYERS, number).divergences
        # The first token sees itself alone, quantised as well.
        assert (divergences > 0).all()
        assert divergences.max() < 5


def test_one_table_holds_the_caches_and_one_the_positions(outcome, numbers):
    lines = outcome.stdout.splitlines()
    said = " ".join(outcome.stdout.split())
    assert f" in float32 on {cpu_model()}, vLLM " in said
    assert f"{POSITIONS:,} predictions in 3 windows of up to 150 tokens" in said
    (row,) = (line for line in lines if "8 of 8" in line)
    k8v4 = numbers["caches"][1]
    assert f"{100 * k8v4['agreement']:.2f} %" in row
    assert f"{k8v4['divergence_mean']:.5f} ± " in row
    assert "too few" in row
    for context in ("1-15", "16-31", "32-63", "64-127", "128-149"):
        assert any(line.startswith(f"│ {context:>7} ") for line in lines)


def test_the_same_is_drawn(outcome, work):
    from matplotlib import image

    drawn = image.imread(work.parent / "out.png")
    assert drawn.shape[:2] == (750, 1950)
    colours = {tuple(pixel) for pixel in (drawn[..., :3] * 255).astype(int).reshape(-1, 3)}
    assert (0x44, 0x77, 0xAA) in colours


def test_a_run_that_is_whole_starts_no_engine(outcome, run, work, numbers):
    log = Folder(work).of(ALL_LAYERS) / "log.txt"
    before = log.stat().st_mtime_ns
    done = run(ALL_LAYERS, work, "--json", "-")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == numbers
    assert log.stat().st_mtime_ns == before


@pytest.mark.long
def test_a_lost_score_is_computed_again_and_is_the_same(outcome, run, work, numbers):
    folder = Folder(work).of(ALL_LAYERS)
    others = [(folder / f"{number:05}.npz").stat().st_mtime_ns for number in (0, 2)]
    (folder / "00001.npz").write_bytes((folder / "00001.npz").read_bytes()[:100])
    done = run(ALL_LAYERS, work, "--json", "-")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == numbers
    assert [(folder / f"{number:05}.npz").stat().st_mtime_ns for number in (0, 2)] == others


@pytest.mark.long
def test_the_unquantised_cache_by_another_name_diverges_from_nothing(outcome, run, work):
    # The setting means nothing to it.
    done = run("auto[boundary_layers=1]", work, "--json", "-")
    assert done.returncode == 0, done.stderr[-2000:]
    _, again = json.loads(done.stdout)["caches"]
    assert again["name"] == "auto[boundary_layers=1]"
    assert (again["divergence_max"], again["agreement"]) == (0.0, 1.0)


@pytest.mark.long
def test_a_cache_that_cannot_be_had_is_said_beside_one_that_can(outcome, run, work):
    done = run(f"turboquant_4bit_nc,{ALL_LAYERS}", work)
    assert done.returncode == 2
    assert "8 of 8" in done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith("vllm-hybrid-kv eval: turboquant_4bit_nc: --kv-cache-dtype turboquant_4")
    assert "has no CPU kernels" in last
    assert "log.txt" in last


@pytest.mark.long
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_goes_on(outcome, command, environment, run, tmp_path, numbers, how):
    work = tmp_path / "work"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command(ALL_LAYERS, work), env=environment, stdout=log, stderr=log, cwd=tmp_path
        )
        first = Folder(work).path / "auto" / "00000.npz"
        while not first.exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(how)
        process.wait(60)
    if how == signal.SIGKILL:
        # Its engine then sees that nobody listens.
        end_engines(work)
    kept = first.stat().st_mtime_ns
    done = run(ALL_LAYERS, work, "--json", "-")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == numbers
    assert first.stat().st_mtime_ns == kept


def end_engines(work):
    """Wait until no process works on a job of a folder."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        jobs = []
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    with open(f"/proc/{entry}/cmdline", "rb") as line:
                        jobs += [entry] if str(work).encode() in line.read() else []
                except OSError:
                    continue
        if not jobs:
            return
        time.sleep(0.5)
    raise AssertionError(f"processes {jobs} still run")
