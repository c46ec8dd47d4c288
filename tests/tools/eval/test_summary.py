# SPDX-License-Identifier: Apache-2.0
"""Summaries of scores, against the plain definitions."""

import json
import math
import statistics

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hybrid_kv.tools.eval.folder import Scored
from vllm_hybrid_kv.tools.eval.summary import summarise

LENGTHS = st.lists(st.integers(1, 70), min_size=1, max_size=5)


def scored_of(lengths, seed=0):
    random = numpy.random.default_rng(seed)
    return [
        Scored(-random.exponential(2, n), random.exponential(0.1, n) ** 2, random.random(n) < 0.8)
        for n in lengths
    ]


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(0, 99))
def test_a_summary_is_of_all_positions_alike(lengths, seed):
    scored = scored_of(lengths, seed)
    summary = summarise(scored)
    logprobs = [float(x) for one in scored for x in one.logprobs]
    divergences = sorted(float(x) for one in scored for x in one.divergences)
    agreements = [bool(x) for one in scored for x in one.agreements]
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
def test_ranges_part_the_positions(lengths, seed):
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


def test_the_error_of_the_mean_is_that_of_sequences_of_one_length():
    scored = scored_of([40] * 6)
    means = [float(one.divergences.mean()) for one in scored]
    expected = statistics.stdev(means) / math.sqrt(6)
    assert summarise(scored).divergence_error == pytest.approx(expected)
    assert summarise(scored[:1]).divergence_error is None


def test_what_is_no_number_is_null_in_json():
    scored = Scored(
        numpy.array([-1.0, -2.0]), numpy.array([0.5, math.inf]), numpy.array([True] * 2)
    )
    written = json.loads(json.dumps(summarise([scored]).to_json(), allow_nan=False))
    assert written["divergence_mean"] is None
    assert written["divergence_error"] is None
    assert written["by_position"][0]["divergence_mean"] is None
    assert written["positions"] == 2
