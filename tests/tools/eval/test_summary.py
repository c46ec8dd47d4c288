# SPDX-License-Identifier: Apache-2.0
"""Summaries of scores against plain definitions."""

import json
import math
import statistics

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hybrid_kv.tools.eval.scores import Scores
from vllm_hybrid_kv.tools.eval.summary import summarise

LENGTHS = st.lists(st.integers(1, 70), min_size=1, max_size=5)


def scored_of(lengths, seed=0):
    random = numpy.random.default_rng(seed)
    return [
        Scores(
            (-random.exponential(2, n)).tolist(),
            (random.exponential(0.1, n) ** 2).tolist(),
            (random.random(n) < 0.8).tolist(),
        )
        for n in lengths
    ]


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(0, 99))
def test_every_position_has_the_same_weight(lengths, seed):
    scored = scored_of(lengths, seed)
    summary = summarise(scored)
    logprobs = [x for one in scored for x in one.logprobs]
    divergences = sorted(x for one in scored for x in one.divergences)
    agreements = [x for one in scored for x in one.agreements]
    assert summary.positions == sum(lengths)
    assert summary.perplexity == pytest.approx(math.exp(-statistics.fmean(logprobs)))
    assert summary.divergence_mean == pytest.approx(statistics.fmean(divergences))
    assert summary.divergence_max == divergences[-1]
    assert summary.agreement == pytest.approx(sum(agreements) / len(agreements))
    for share, found in ((0.99, summary.divergence_p99), (0.999, summary.divergence_p999)):
        below = math.floor(share * (len(divergences) - 1))
        assert divergences[below] <= found <= divergences[min(below + 1, len(divergences) - 1)]


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(0, 99))
def test_ranges_contain_every_position_once(lengths, seed):
    scored = scored_of(lengths, seed)
    summary = summarise(scored)
    ranges = summary.by_position
    assert sum(row.positions for row in ranges) == summary.positions
    assert [row.first for row in ranges] == [1, 16, 32, 64][: len(ranges)]
    assert ranges[-1].last == max(lengths)
    for row in ranges:
        part = [one.divergences[row.first - 1 : row.last] for one in scored]
        assert row.divergence_mean == pytest.approx(numpy.concatenate(part).mean())
        part = [one.agreements[row.first - 1 : row.last] for one in scored]
        assert row.agreement == pytest.approx(numpy.concatenate(part).mean())


def test_the_error_of_the_mean_is_the_standard_error_over_equal_sequences():
    scored = scored_of([40] * 6)
    means = [statistics.fmean(one.divergences) for one in scored]
    expected = statistics.stdev(means) / math.sqrt(6)
    assert summarise(scored).divergence_error == pytest.approx(expected)
    assert summarise(scored[:1]).divergence_error is None


def test_infinity_and_nan_are_null_in_json():
    scored = Scores([-1.0, -2.0], [0.5, math.inf], [True, True])
    written = json.loads(json.dumps(summarise([scored]).to_json(), allow_nan=False))
    assert written["divergence_mean"] is None
    assert written["divergence_error"] is None
    assert written["by_position"][0]["divergence_mean"] is None
    assert written["positions"] == 2
