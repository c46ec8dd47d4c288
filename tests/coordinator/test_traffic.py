# SPDX-License-Identifier: Apache-2.0
"""Test what is learned from past requests: when prefixes return, and which were seen before."""

import hashlib
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hybrid_kv.coordinator.traffic import (
    DOCUMENT_TOKENS,
    EDGES,
    ReuseCurve,
    SeenPrefixes,
    Turn,
    age_range,
)

FIRST = Turn.FIRST
ages = st.integers(0, 5000)


def hashes(count, seed=0, after=()):
    """Make the block hashes of a prompt: the hashes `after` and `count` random ones."""
    chain = list(after)
    draw = random.Random(seed)
    for _ in range(count):
        before = chain[-1] if chain else b""
        chain.append(hashlib.sha256(before + draw.randbytes(8)).digest())
    return chain


def test_an_age_is_within_the_edges_of_its_range():
    for age in [*range(70), 1000, 65_535]:
        index = age_range(age)
        assert EDGES[index] <= age < EDGES[index + 1]
    assert age_range(10**9) == len(EDGES) - 2


def test_the_prior_index_decreases_with_age():
    index = ReuseCurve().index[FIRST]
    assert index == sorted(index, reverse=True)
    assert len(set(index)) == len(index)


def test_the_rate_is_returns_per_time_waited():
    curve = ReuseCurve()
    draw = random.Random(1)
    for _ in range(20_000):
        # At any age, a checkpoint returns at a rate of 1/500. It is tracked for 1,000 requests.
        age = int(draw.expovariate(1 / 500))
        curve.record(FIRST, 0, min(age, 1000), returned=age < 1000)
    curve.update(())
    for index in range(4, 9):
        assert curve.rates[FIRST, index] == pytest.approx(1 / 500, rel=0.15)
    # If the rate is constant, so is the index.
    assert np.ptp(curve.index[FIRST][4:9]) < 0.2 / 500


def test_the_index_rises_towards_the_age_at_which_users_return():
    curve = ReuseCurve()
    for i in range(1000):
        curve.record(FIRST, 0, 256 + i % 256 if i % 4 == 0 else 4096, returned=i % 4 == 0)
    curve.update(())
    young, waiting, returning, old = (curve.index[FIRST][age_range(a)] for a in (2, 100, 300, 2000))
    assert young < waiting < returning
    assert old < young / 5


def test_waiting_checkpoints_lower_the_rate():
    curve = ReuseCurve()
    for _ in range(50):
        curve.record(FIRST, 0, 10, returned=True)
    curve.update(())
    without = curve.rates[FIRST, age_range(10)]
    curve.update([(FIRST, 0, 100)] * 950)
    assert curve.rates[FIRST, age_range(10)] < without / 5


def test_waiting_checkpoints_are_counted_once_however_often_the_curve_is_updated():
    curve = ReuseCurve()
    curve.record(FIRST, 0, 10, returned=True)
    curve.update([(FIRST, 0, 100)])
    once = curve.rates.tolist()
    curve.update([(FIRST, 0, 100)])
    assert curve.rates.tolist() == once


def test_time_counts_for_the_kind_in_which_it_was_spent():
    whole, first, second = ReuseCurve(), ReuseCurve(), ReuseCurve()
    whole.record(FIRST, 0, 700, returned=True)
    first.record(FIRST, 0, 300, returned=False)
    second.record(FIRST, 300, 700, returned=True)
    assert (first._time + second._time).tolist() == whole._time.tolist()
    assert (first._returns + second._returns).tolist() == whole._returns.tolist()
    waiting = ReuseCurve()
    # A turn without observations has the rates of all turns.
    waiting.update([(FIRST, 300, 700), (FIRST, 0, 300)])
    whole.update(())
    assert waiting.rates[Turn.EDITED, age_range(700)] < whole.rates[Turn.EDITED, age_range(700)]
    assert waiting.rates[Turn.EDITED, age_range(200)] == whole.rates[Turn.EDITED, age_range(200)]


@pytest.mark.parametrize(
    ("tokens", "previous", "turn"),
    [
        (900, 0, Turn.FIRST),
        (899, 900, Turn.EDITED),
        (900, 900, Turn.MESSAGE),
        (899 + DOCUMENT_TOKENS, 900, Turn.MESSAGE),
        (900 + DOCUMENT_TOKENS, 900, Turn.DOCUMENT),
    ],
)
def test_the_growth_of_a_conversation_determines_the_turn(tokens, previous, turn):
    assert Turn.of(tokens, previous) is turn


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(Turn), ages, ages, st.booleans()), max_size=60))
def test_turns_have_the_rates_of_all_turns_times_a_factor(observed):
    each, pooled = ReuseCurve(), ReuseCurve()
    for turn, one, other, returned in observed:
        since, age = sorted((one, other))
        each.record(turn, since, age, returned)
        pooled.record(FIRST, since, age, returned)
    waiting = [(turn, min(one, other), max(one, other)) for turn, one, other, _ in observed]
    each.update(waiting)
    pooled.update([(FIRST, *some) for _, *some in waiting])
    # The rates of a turn without observations are those of all turns.
    shape = pooled.rates[Turn.EDITED]
    factors = each.rates / shape
    assert np.allclose(factors, factors[:, :1])
    unseen = set(Turn) - {turn for turn, *_ in observed}
    assert all(factors[turn, 0] == pytest.approx(1) for turn in unseen)
    # In index and rates, turns have the same order.
    index = np.array(each.index)
    assert (np.argsort(index[:, 0]) == np.argsort(factors[:, 0])).all() or len(unseen) > 1


def test_a_turn_that_returns_more_often_has_a_higher_index_at_every_age():
    curve = ReuseCurve()
    for i in range(400):
        curve.record(Turn.MESSAGE, 0, 300, returned=i % 4 > 0)
        curve.record(Turn.DOCUMENT, 0, 300, returned=i % 4 == 0)
    curve.update(())
    message, first, document = (curve.index[t] for t in (Turn.MESSAGE, FIRST, Turn.DOCUMENT))
    assert all(a > b > c for a, b, c in zip(message, first, document, strict=True))
    ratio = curve.rates[Turn.MESSAGE] / curve.rates[Turn.DOCUMENT]
    assert ratio == pytest.approx(320 / 120)


def test_the_longest_seen_prefix_is_found_at_every_length():
    seen = SeenPrefixes(1 << 12)
    first = hashes(300)
    assert seen.longest(first, 300) == 0
    seen.add(first)
    for shared in (0, 1, 7, 150, 299, 300):
        other = hashes(60, seed=1 + shared, after=first[:shared])
        assert seen.longest(other, len(other)) == shared
        assert seen.longest(other, 5) == min(shared, 5)


def test_only_the_last_hash_of_a_request_is_an_end():
    seen = SeenPrefixes(1 << 12)
    prompt = hashes(20)
    seen.add(prompt[:12])
    seen.add(prompt, known=12)
    assert [index for index, key in enumerate(prompt) if seen.is_end(key)] == [11, 19]
    assert seen.longest(prompt, 20) == 20
    seen.discard_end(prompt[11])
    assert not seen.is_end(prompt[11])
    assert seen.longest(prompt, 12) == 12


def test_old_prefixes_are_forgotten_unless_they_are_used():
    seen = SeenPrefixes(1000)
    used, unused = hashes(100, seed=1), hashes(100, seed=2)
    seen.add(unused)
    for i in range(30):
        seen.add(used)
        seen.add(hashes(90, seed=10 + i))
    assert seen.longest(used, 100) == 100
    assert seen.longest(unused, 100) == 0
    assert not seen.is_end(unused[-1])


def test_false_positives_are_rare():
    seen = SeenPrefixes(4096)
    seen.add(hashes(4096))
    others = hashes(20_000, seed=3)
    false = sum(seen.longest([key], 1) for key in others)
    assert false <= 0.002 * len(others)


@pytest.mark.parametrize("at_a_time", [1, 50, 1024])
def test_every_added_hash_is_found_although_many_share_a_byte(at_a_time):
    seen = SeenPrefixes(1024)
    added = hashes(1024)
    for first in range(0, 1024, at_a_time):
        seen.add(added[: first + at_a_time], known=first)
    # Check one by one, because bisection would not notice a few missing hashes.
    assert all(seen.longest([key], 1) for key in added)
