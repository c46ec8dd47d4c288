# SPDX-License-Identifier: Apache-2.0
"""Real engines: the reference scores equal those of transformers, and interrupted runs continue."""

import contextlib
import json
import math
import signal
import subprocess
import time

import numpy
import psutil
import pytest

from testing.processes import wait_until
from tests.tools.eval.conftest import LENGTHS
from vllm_hybrid_kv.tools.machine import cpu_model

pytestmark = pytest.mark.engine

CACHE = "turboquant_k8v4[boundary_layers=1]"
POSITIONS = sum(LENGTHS) - len(LENGTHS)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluation") / "work"


@pytest.fixture(scope="module")
def outcome(run, work):
    done = run(CACHE, work, "--json", "out.json", "--plot", "out.png")
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def numbers(outcome, work):
    return json.loads((work.parent / "out.json").read_text())


def scores_of(work, cache):
    files = sorted((work / cache).glob("0*.json"))
    assert len(files) == len(LENGTHS)
    return [numpy.array(json.loads(file.read_text())) for file in files]


@pytest.fixture(scope="module")
def by_transformers(model, sequences):
    """The log-probabilities that transformers gives the actual next tokens, in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = []
    for tokens in sequences:
        with torch.inference_mode():
            logits = reference(torch.tensor([tokens])).logits[0, :-1]
        logprobs = logits.double().log_softmax(-1)
        found.append(logprobs.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy())
    return found


def test_the_reference_has_the_log_probabilities_and_perplexity_of_transformers(
    numbers, work, by_transformers
):
    scored = scores_of(work, "auto")
    for (logprobs, divergences, _), expected in zip(scored, by_transformers, strict=True):
        numpy.testing.assert_allclose(logprobs, expected, rtol=2e-4, atol=2e-4)
        assert set(divergences) == {0.0}
    expected = math.exp(-numpy.concatenate(by_transformers).mean())
    assert numbers["caches"][0]["perplexity"] == pytest.approx(expected, rel=1e-4)


def test_a_quantised_cache_diverges_a_little_everywhere(numbers, work):
    # Comparing the hidden states of two different positions would give a mean of over 10 nats.
    auto, k8v4 = numbers["caches"]
    assert (auto["name"], k8v4["name"]) == ("auto", CACHE)
    assert (auto["quantised_layers"], auto["unquantised_layers"]) == (0, 8)
    assert (k8v4["quantised_layers"], k8v4["unquantised_layers"]) == (6, 2)
    assert 1e-4 < k8v4["divergence_mean"] < 0.5
    # The random model has many close choices: 26 of 45 tokens agree.
    assert 0.5 < k8v4["agreement"] < 1
    assert numbers["positions"] == k8v4["positions"] == POSITIONS
    for _, divergences, _ in scores_of(work, CACHE):
        # Even the first token diverges, because it attends to its own quantised key and value.
        assert 0 < min(divergences) <= max(divergences) < 5


def test_the_text_has_a_table_of_caches_and_a_table_of_positions(outcome, numbers):
    text = " ".join(outcome.stdout.split())
    assert f" in float32 on {cpu_model()}, vLLM " in text
    assert f"{POSITIONS:,} predictions in 3 windows of up to 150 tokens" in text
    assert " 6 of 8 " in text
    k8v4 = numbers["caches"][1]
    assert f"{100 * k8v4['agreement']:.2f} %" in text
    assert f"{k8v4['divergence_mean']:.5f} ± " in text
    for context in ("1-15", "16-31", "32-63", "64-127", "128-149"):
        assert any(context in line.split() for line in outcome.stdout.splitlines())


def test_the_plot_shows_the_quantised_cache(outcome, work):
    from matplotlib import image

    drawn = image.imread(work.parent / "out.png")
    assert drawn.shape[:2] == (750, 1950)
    colours = {tuple(pixel) for pixel in (drawn[..., :3] * 255).astype(int).reshape(-1, 3)}
    assert (0x1F, 0x77, 0xB4) in colours


def repeated(run, work, caches=CACHE):
    done = run(caches, work, "--json", "-")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.long
def test_an_unquantised_cache_does_not_diverge(outcome, run, work):
    # `boundary_layers` has no effect on an unquantised cache.
    name = "auto[boundary_layers=1]"
    _, again = repeated(run, work, name)["caches"]
    assert again["name"] == name
    assert (again["divergence_max"], again["agreement"]) == (0.0, 1.0)


@pytest.mark.long
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_continues(outcome, command, environment, run, tmp_path, numbers, how):
    work = tmp_path / "work"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command(CACHE, work), env=environment, stdout=log, stderr=log, cwd=tmp_path
        )
        first = work / "auto" / "00000.json"
        while not first.exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(how)
        process.wait(60)
    if how == signal.SIGKILL:
        # The engine outlives the killed command until it tries to send the command a message.
        assert wait_until(lambda: not runs(work), 120)
    written = first.stat().st_mtime_ns
    assert repeated(run, work) == numbers
    assert first.stat().st_mtime_ns == written


def runs(work):
    """Return whether any process has the folder on its command line."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(work) in " ".join(process.cmdline()):
                return True
    return False
