# SPDX-License-Identifier: Apache-2.0
"""Scores and their summaries equal torch's functions in float64 and values computed by hand."""

import math
import statistics
from types import SimpleNamespace

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hybrid_kv.tools.eval import scores
from vllm_hybrid_kv.tools.eval.engine import check_logprobs
from vllm_hybrid_kv.tools.eval.scores import summarise


def logits_of(seed, positions, vocabulary):
    generator = torch.Generator().manual_seed(seed)
    return 4 * torch.randn(positions, vocabulary, generator=generator)


def score(logits, targets, reference):
    return scores.score(logits, torch.as_tensor(targets), reference)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1000),
    st.integers(1, 9),
    st.integers(2, 40),
    st.sampled_from([1e-4, 0.1, 3.0]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([1, 64, 1 << 20]),
)
def test_scores_equal_torchs_functions(seed, positions, vocabulary, noise, dtype, elements):
    reference = logits_of(seed, positions, vocabulary).to(dtype)
    logits = (reference + noise * logits_of(seed + 1, positions, vocabulary)).to(dtype)
    targets = torch.randint(vocabulary, (positions,), generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "MOST_ELEMENTS", elements)
        found = score(logits, targets, reference)
    q, p = (torch.log_softmax(one.double(), -1) for one in (logits, reference))
    divergences = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    logprobs = -torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    torch.testing.assert_close(found[0], logprobs)
    torch.testing.assert_close(found[1], divergences, rtol=1e-9, atol=1e-13)


INF = math.inf


@pytest.mark.parametrize(
    ("logits", "reference", "divergence", "logprob"),
    [
        # A token with probability 0 in both distributions adds nothing.
        ([0.0, 0.0, -INF], [0.0, 0.0, -INF], 0.0, math.log(0.5)),
        # A token with probability 0 everywhere except in the reference adds infinity.
        ([-INF, 0.0], [0.0, 0.0], INF, -INF),
        ([0.0, math.nan], [0.0, 0.0], math.nan, math.nan),
    ],
)
def test_infinite_logits_and_nan_stay_visible(logits, reference, divergence, logprob):
    found = score(torch.tensor([logits]), [0], torch.tensor([reference]))
    assert found[:2, 0].tolist() == pytest.approx([logprob, divergence], nan_ok=True)


def test_any_of_the_references_tied_top_tokens_agrees():
    reference = torch.tensor([[1.0, 5.0, 5.0]]).repeat(3, 1)
    logits = torch.tensor([[1.0, 5.0, 4.0], [1.0, 4.0, 5.0], [6.0, 5.0, 5.0]])
    assert score(logits, [0, 0, 0], reference)[2].tolist() == [1.0, 1.0, 0.0]


def test_scores_that_differ_from_vllms_are_rejected():
    prompt_logprobs = [None, {5: SimpleNamespace(logprob=-1.0)}, {6: SimpleNamespace(logprob=-2.0)}]
    check_logprobs([-1.0, -2.001], [4, 5, 6], prompt_logprobs)
    with pytest.raises(RuntimeError, match=r"after 2 tokens is -1\.0000, but vLLM returned -2\.0"):
        check_logprobs([-1.0, -1.0], [4, 5, 6], prompt_logprobs)
    with pytest.raises(RuntimeError, match="got the logits of 1 of 2 predictions"):
        check_logprobs([-1.0], [4, 5, 6], prompt_logprobs)


def windows_of(lengths, seed=0):
    random = numpy.random.default_rng(seed)
    return [
        numpy.stack(
            [-random.exponential(2, n), random.exponential(0.1, n) ** 2, random.random(n) < 0.8]
        )
        for n in lengths
    ]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=5), st.integers(0, 99))
def test_every_position_has_the_same_weight_and_is_in_one_range(lengths, seed):
    windows = windows_of(lengths, seed)
    summary = summarise(windows)
    logprobs, divergences, agreements = numpy.concatenate(windows, axis=1)
    assert summary["positions"] == sum(lengths)
    assert summary["perplexity"] == pytest.approx(math.exp(-statistics.fmean(logprobs)))
    assert summary["divergence_mean"] == pytest.approx(statistics.fmean(divergences))
    assert summary["divergence_max"] == max(divergences)
    assert summary["agreement"] == pytest.approx(statistics.fmean(agreements))
    for share, name in ((0.99, "divergence_p99"), (0.999, "divergence_p999")):
        below = math.floor(share * (len(divergences) - 1))
        around = sorted(divergences)[below : below + 2]
        assert around[0] <= summary[name] <= around[-1]
    ranges = summary["by_position"]
    assert sum(row["positions"] for row in ranges) == summary["positions"]
    assert [row["first"] for row in ranges] == [1, 16, 32, 64][: len(ranges)]
    assert ranges[-1]["last"] == max(lengths)
    for row in ranges:
        part = numpy.concatenate([w[:, row["first"] - 1 : row["last"]] for w in windows], axis=1)
        assert row["divergence_mean"] == pytest.approx(part[1].mean())
        assert row["agreement"] == pytest.approx(part[2].mean())


def test_the_error_of_the_mean_is_the_standard_error_over_equal_windows():
    windows = windows_of([40] * 6)
    means = [statistics.fmean(window[1]) for window in windows]
    expected = statistics.stdev(means) / math.sqrt(6)
    assert summarise(windows)["divergence_error"] == pytest.approx(expected)
    assert summarise(windows[:1])["divergence_error"] is None


def test_windows_of_different_lengths_have_the_error_of_a_ratio():
    # Linearise the ratio: sqrt(sum (sum_i - ratio * length_i)^2 / (n - 1) / n) / mean length.
    windows = [
        numpy.array([[0.0] * n, [value] * n, [1.0] * n]) for n, value in ((1, 4.0), (3, 0.0))
    ]
    assert summarise(windows)["divergence_error"] == pytest.approx(1.5)
