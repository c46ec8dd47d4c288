# SPDX-License-Identifier: Apache-2.0
"""Test what is learned from past requests: when prefixes return, and which were seen before."""

import hashlib
import random

import numpy as np
import pytest

from vllm_hybrid_kv.coordinator.traffic import EDGES, ReuseCurve, SeenPrefixes, age_range


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
    index = ReuseCurve().index
    assert index == sorted(index, reverse=True)
    assert len(set(index)) == len(index)


def test_the_rate_is_returns_per_time_waited():
    curve = ReuseCurve()
    draw = random.Random(1)
    for _ in range(20_000):
        # At any age, a checkpoint returns at a rate of 1/500. It is tracked for 1,000 requests.
        age = int(draw.expovariate(1 / 500))
        curve.record(0, min(age, 1000), returned=age < 1000)
    curve.update(())
    for index in range(4, 9):
        assert curve.rates[index] == pytest.approx(1 / 500, rel=0.15)
    # If the rate is constant, so is the index.
    assert np.ptp(curve.index[4:9]) < 0.2 / 500


def test_the_index_rises_towards_the_age_at_which_users_return():
    curve = ReuseCurve()
    for i in range(1000):
        curve.record(0, 256 + i % 256 if i % 4 == 0 else 4096, returned=i % 4 == 0)
    curve.update(())
    young, waiting, returning, old = (curve.index[age_range(a)] for a in (2, 100, 300, 2000))
    assert young < waiting < returning
    assert old < young / 5


def test_waiting_checkpoints_lower_the_rate():
    curve = ReuseCurve()
    for _ in range(50):
        curve.record(0, 10, returned=True)
    curve.update(())
    without = curve.rates[age_range(10)]
    curve.update([(0, 100)] * 950)
    assert curve.rates[age_range(10)] < without / 5


def test_time_counts_for_the_kind_in_which_it_was_spent():
    whole, first, second = ReuseCurve(), ReuseCurve(), ReuseCurve()
    whole.record(0, 700, returned=True)
    first.record(0, 300, returned=False)
    second.record(300, 700, returned=True)
    assert list(first._time + second._time) == list(whole._time)
    assert list(first._returns + second._returns) == list(whole._returns)
    waiting = ReuseCurve()
    waiting.update([(300, 700), (0, 300)])
    whole.update(())
    assert waiting.rates[age_range(700)] < whole.rates[age_range(700)]
    assert waiting.rates[age_range(200)] == whole.rates[age_range(200)]


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
