# SPDX-License-Identifier: Apache-2.0
"""What is learned of the chance that a checkpoint is used again, and of prefixes seen before."""

import hashlib
import random

import numpy as np
import pytest

from vllm_hybrid_kv.coordinator.checkpoints import Checkpoints, Kind
from vllm_hybrid_kv.coordinator.reuse import EDGES, ReuseCurve, age_range
from vllm_hybrid_kv.coordinator.seen_prefixes import SeenPrefixes


def hashes(count, seed=0, after=()):
    """Chained hashes of a random prompt that goes on after another's."""
    chain = list(after)
    draw = random.Random(seed)
    for _ in range(count):
        before = chain[-1] if chain else b""
        chain.append(hashlib.sha256(before + draw.randbytes(8)).digest())
    return chain


def test_an_age_is_in_the_range_whose_edges_enclose_it():
    for age in [*range(70), 1000, 65_535]:
        place = age_range(age)
        assert EDGES[place] <= age < EDGES[place + 1]
    assert age_range(10**9) == len(EDGES) - 2


def test_before_anything_is_known_the_older_is_worth_less():
    index = ReuseCurve().index
    assert index == sorted(index, reverse=True)
    assert len(set(index)) == len(index)


def test_rates_are_returns_by_time_waited():
    curve = ReuseCurve()
    draw = random.Random(1)
    for _ in range(20_000):
        # A chance of 1/500 at any age, and nobody is watched for longer than 1,000.
        age = int(draw.expovariate(1 / 500))
        curve.record(min(age, 1000), returned=age < 1000)
    curve.update(())
    for place in range(4, 9):
        assert curve.rates[place] == pytest.approx(1 / 500, rel=0.15)
    # However long it waited, the chance is the same, and so is the index.
    assert np.ptp(curve.index[4:9]) < 0.2 / 500


def test_the_index_rises_towards_the_age_at_which_users_return():
    curve = ReuseCurve()
    for i in range(1000):
        curve.record(256 + i % 256 if i % 4 == 0 else 4096, returned=i % 4 == 0)
    curve.update(())
    young, waiting, returning, old = (curve.index[age_range(a)] for a in (2, 100, 300, 2000))
    assert young < waiting < returning
    assert old < young / 5


def test_those_that_still_wait_count_as_not_returned():
    curve = ReuseCurve()
    for _ in range(50):
        curve.record(10, returned=True)
    curve.update(())
    alone = curve.rates[age_range(10)]
    curve.update([100] * 950)
    assert curve.rates[age_range(10)] < alone / 5


def test_the_longest_seen_prefix_is_found_at_every_length():
    seen = SeenPrefixes(1 << 12)
    first = hashes(300)
    assert seen.longest(first, 300) == 0
    seen.add(first)
    for shared in (0, 1, 7, 150, 299, 300):
        other = hashes(60, seed=1 + shared, after=first[:shared])
        assert seen.longest(other, len(other)) == shared
        assert seen.longest(other, 5) == min(shared, 5)


def test_only_the_ends_of_requests_are_ends():
    seen = SeenPrefixes(1 << 12)
    prompt = hashes(20)
    seen.add(prompt[:12])
    seen.add(prompt, known=12)
    assert [place for place, key in enumerate(prompt) if seen.ended(key)] == [11, 19]
    assert seen.longest(prompt, 20) == 20


def test_an_end_that_somebody_passed_is_none_any_more():
    seen = SeenPrefixes(1 << 12)
    prompt = hashes(20)
    seen.add(prompt[:12])
    seen.pass_by(prompt[11])
    assert not seen.ended(prompt[11])
    assert seen.longest(prompt, 20) == 12


def test_old_prefixes_are_forgotten_and_used_ones_are_not():
    seen = SeenPrefixes(1000)
    used, unused = hashes(100, seed=1), hashes(100, seed=2)
    seen.add(unused)
    for i in range(30):
        seen.add(used)
        seen.add(hashes(90, seed=10 + i))
    assert seen.longest(used, 100) == 100
    assert seen.longest(unused, 100) == 0
    assert not seen.ended(unused[-1])


def test_hardly_a_hash_is_taken_for_one_that_was_seen():
    seen = SeenPrefixes(4096)
    seen.add(hashes(4096))
    strangers = hashes(20_000, seed=3)
    false = sum(seen.longest([key], 1) for key in strangers)
    assert false <= 0.002 * len(strangers)


@pytest.fixture
def checkpoints():
    return Checkpoints(state_blocks=3, block_tokens=1000)


def arrive(checkpoints, *keys):
    return checkpoints.arrive(list(keys), len(keys))


def test_what_a_longer_turn_has_superseded_is_given_up_first(checkpoints):
    arrive(checkpoints)
    other = checkpoints.add(b"other", 3000, False, [1, 2, 3], None)
    first = checkpoints.add(b"first", 3000, False, [4, 5, 6], None)
    assert arrive(checkpoints, b"first", b"unknown") is first
    second = checkpoints.add(b"second", 4000, False, [4, 5, 6, 7], first)
    assert checkpoints.kind(first) is Kind.SUPERSEDED
    assert checkpoints.give_up() is first
    # Its blocks are the longer one's too.
    assert all(checkpoints.needs(block) for block in (1, 2, 3, 4, 5, 6, 7))
    assert {checkpoints.give_up(), checkpoints.give_up()} == {other, second}
    assert checkpoints.give_up() is None
    assert not any(checkpoints.needs(block) for block in range(8))


def test_a_branch_point_is_not_superseded_by_one_that_goes_on(checkpoints):
    arrive(checkpoints)
    branch = checkpoints.add(b"branch", 500, True, [1], None)
    checkpoints.add(b"end", 900, False, [1], branch)
    assert checkpoints.kind(branch) is Kind.BRANCH
    arrive(checkpoints, b"branch")
    assert checkpoints.kind(branch) is Kind.REUSED


def test_the_one_that_saves_more_for_its_memory_is_kept(checkpoints):
    arrive(checkpoints)
    long = checkpoints.add(b"long", 20_000, False, range(20), None)
    short = checkpoints.add(b"short", 2000, False, [30, 31], None)
    assert checkpoints.give_up() is short
    assert checkpoints.give_up() is long


def test_a_parent_is_shorter_even_if_the_prompt_was_known_to_be_longer(checkpoints):
    arrive(checkpoints)
    long = checkpoints.add(b"long", 3000, False, [1, 2, 3], None)
    branch = checkpoints.add(b"branch", 1000, True, [1], long)
    assert branch.parent is None
    again = checkpoints.add(b"more", 2000, False, [1, 2], branch)
    assert again.fallback() is branch


def test_who_comes_too_late_is_counted_and_remembered(checkpoints):
    arrive(checkpoints)
    gone = checkpoints.add(b"gone", 3000, False, [1, 2, 3], None)
    checkpoints.give_up()
    assert not checkpoints.keeps(b"gone")
    assert arrive(checkpoints, b"gone") is gone
    assert gone.uses == 1
    back = checkpoints.add(b"gone", 3000, False, [4, 5, 6], None)
    assert back is gone
    assert checkpoints.keeps(b"gone")
    assert checkpoints.needs(4)


def test_no_more_is_watched_than_a_few_times_what_is_kept(checkpoints):
    for i in range(20_000):
        arrive(checkpoints)
        checkpoints.add(str(i).encode(), 3000, False, [i], None)
        if len(checkpoints) > 50:
            checkpoints.give_up()
    assert len(checkpoints._known) < 4 * 51 + 1024 + 64
