# SPDX-License-Identifier: Apache-2.0
"""What is learned of the chance that a checkpoint is used again, and of prefixes seen before."""

import hashlib
import random

import numpy as np
import pytest

from vllm_hybrid_kv.coordinator.checkpoints import Checkpoints, Kind, Place
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
        curve.record(0, min(age, 1000), returned=age < 1000)
    curve.update(())
    for place in range(4, 9):
        assert curve.rates[place] == pytest.approx(1 / 500, rel=0.15)
    # However long it waited, the chance is the same, and so is the index.
    assert np.ptp(curve.index[4:9]) < 0.2 / 500


def test_the_index_rises_towards_the_age_at_which_users_return():
    curve = ReuseCurve()
    for i in range(1000):
        curve.record(0, 256 + i % 256 if i % 4 == 0 else 4096, returned=i % 4 == 0)
    curve.update(())
    young, waiting, returning, old = (curve.index[age_range(a)] for a in (2, 100, 300, 2000))
    assert young < waiting < returning
    assert old < young / 5


def test_those_that_still_wait_count_as_not_returned():
    curve = ReuseCurve()
    for _ in range(50):
        curve.record(0, 10, returned=True)
    curve.update(())
    alone = curve.rates[age_range(10)]
    curve.update([(0, 100)] * 950)
    assert curve.rates[age_range(10)] < alone / 5


def test_time_counts_for_the_kind_that_it_was_spent_as():
    whole, first, then = ReuseCurve(), ReuseCurve(), ReuseCurve()
    whole.record(0, 700, returned=True)
    first.record(0, 300, returned=False)
    then.record(300, 700, returned=True)
    assert list(first._time + then._time) == list(whole._time)
    assert list(first._returns + then._returns) == list(whole._returns)
    waiting = ReuseCurve()
    waiting.update([(300, 700), (0, 300)])
    whole.update(())
    # What waits has not returned.
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


@pytest.mark.parametrize("at_a_time", [1, 50, 1024])
def test_every_hash_that_was_entered_is_found_though_many_share_a_byte(at_a_time):
    seen = SeenPrefixes(1024)
    entered = hashes(1024)
    for first in range(0, 1024, at_a_time):
        seen.add(entered[: first + at_a_time], known=first)
    # One by one: bisection would not miss the loss of a few.
    assert all(seen.longest([key], 1) for key in entered)


@pytest.fixture
def checkpoints():
    return Checkpoints(state_blocks=3, block_tokens=1000)


def add(checkpoints, key, tokens, at, blocks, parent):
    checkpoint = checkpoints.watch(key, tokens, at, blocks, parent)
    checkpoints.keep(checkpoint)
    return checkpoint


def arrive(checkpoints, *keys):
    return checkpoints.arrive(list(keys), len(keys))


def test_what_a_longer_turn_has_superseded_is_given_up_first(checkpoints):
    arrive(checkpoints)
    other = add(checkpoints, b"other", 3000, Place.PROMPT_END, [1, 2, 3], None)
    first = add(checkpoints, b"first", 3000, Place.PROMPT_END, [4, 5, 6], None)
    assert arrive(checkpoints, b"first", b"unknown") is first
    second = add(checkpoints, b"second", 4000, Place.PROMPT_END, [4, 5, 6, 7], first)
    assert checkpoints.kind(first) is Kind.SUPERSEDED
    assert checkpoints.give_up() is first
    # Its blocks are the longer one's too.
    assert all(checkpoints.needs(block) for block in (1, 2, 3, 4, 5, 6, 7))
    assert {checkpoints.give_up(), checkpoints.give_up()} == {other, second}
    assert checkpoints.give_up() is None
    assert not any(checkpoints.needs(block) for block in range(8))


def test_a_turn_stays_superseded_when_the_next_is_gone_and_the_one_after_it_is_kept(checkpoints):
    arrive(checkpoints)
    first = add(checkpoints, b"first", 1000, Place.PROMPT_END, [1], None)
    second = add(checkpoints, b"second", 2000, Place.PROMPT_END, [1, 2], first)
    third = add(checkpoints, b"third", 3000, Place.PROMPT_END, [1, 2, 3], second)
    checkpoints.drop(second)
    assert checkpoints.kind(first) is Kind.SUPERSEDED
    assert third.fallback() is None
    checkpoints.drop(third)
    assert checkpoints.kind(first) is not Kind.SUPERSEDED
    assert not first.extensions


def test_an_answer_that_may_not_come_back_supersedes_nothing(checkpoints):
    arrive(checkpoints)
    end = add(checkpoints, b"end", 3000, Place.PROMPT_END, [1, 2, 3], None)
    answer = checkpoints.watch(b"answer", 3200, Place.ANSWER, [1, 2, 3], end, supersedes=False)
    checkpoints.keep(answer)
    assert checkpoints.kind(end) is Kind.PROMPT
    assert answer.fallback() is end


def test_a_return_counts_for_all_that_are_gone_down_to_the_one_that_is_kept(checkpoints):
    arrive(checkpoints)
    first = add(checkpoints, b"first", 1000, Place.PROMPT_END, [1], None)
    second = add(checkpoints, b"second", 2000, Place.PROMPT_END, [1, 2], first)
    third = add(checkpoints, b"third", 3000, Place.PROMPT_END, [1, 2, 3], second)
    checkpoints.drop(second)
    checkpoints.drop(third)
    arrive(checkpoints, b"first", b"second", b"third", b"new")
    assert [first.uses, second.uses, third.uses] == [1, 1, 1]
    add(checkpoints, b"second", 2000, Place.PROMPT_END, [1, 2], first)
    arrive(checkpoints, b"first", b"second", b"new")
    assert [first.uses, second.uses, third.uses] == [1, 2, 1]


def test_block_ends_on_the_way_to_a_checkpoint_are_not_what_the_request_came_for(checkpoints):
    arrive(checkpoints)
    boundary = checkpoints.watch(b"boundary", 2000, Place.BOUNDARY, [1, 2], None, supersedes=False)
    add(checkpoints, b"end", 3000, Place.PROMPT_END, [1, 2, 3], None)
    checkpoints.drop(checkpoints.kept_at(b"end"))
    returns = checkpoints._curves[Kind.BOUNDARY]._returns
    arrive(checkpoints, b"boundary", b"end")
    assert returns.sum() == 0
    arrive(checkpoints, b"boundary", b"another")
    assert boundary.uses == 2
    assert checkpoints._curves[Kind.REUSED]._returns.sum() + returns.sum() == 1


def test_a_block_end_pays_until_something_worth_more_was_given_up(checkpoints):
    arrive(checkpoints)
    boundary = checkpoints.watch(b"boundary", 2000, Place.BOUNDARY, [1, 2], None, supersedes=False)
    assert not boundary.kept
    assert checkpoints.pays(boundary)
    add(checkpoints, b"end", 2000, Place.PROMPT_END, [3, 4], None)
    checkpoints.give_up()
    checkpoints.give_up()
    assert not checkpoints.pays(boundary)


def test_a_branch_point_is_not_superseded_by_one_that_goes_on(checkpoints):
    arrive(checkpoints)
    branch = add(checkpoints, b"branch", 500, Place.BRANCH, [1], None)
    add(checkpoints, b"end", 900, Place.PROMPT_END, [1], branch)
    assert checkpoints.kind(branch) is Kind.BRANCH
    arrive(checkpoints, b"branch")
    assert checkpoints.kind(branch) is Kind.REUSED


def test_the_one_that_saves_more_for_its_memory_is_kept(checkpoints):
    arrive(checkpoints)
    long = add(checkpoints, b"long", 20_000, Place.PROMPT_END, range(20), None)
    short = add(checkpoints, b"short", 2000, Place.PROMPT_END, [30, 31], None)
    assert checkpoints.give_up() is short
    assert checkpoints.give_up() is long


def test_a_parent_is_shorter_even_if_the_prompt_was_known_to_be_longer(checkpoints):
    arrive(checkpoints)
    long = add(checkpoints, b"long", 3000, Place.PROMPT_END, [1, 2, 3], None)
    branch = add(checkpoints, b"branch", 1000, Place.BRANCH, [1], long)
    assert branch.parent is None
    again = add(checkpoints, b"more", 2000, Place.PROMPT_END, [1, 2], branch)
    assert again.fallback() is branch


def test_who_comes_too_late_is_counted_and_remembered(checkpoints):
    arrive(checkpoints)
    gone = add(checkpoints, b"gone", 3000, Place.PROMPT_END, [1, 2, 3], None)
    checkpoints.give_up()
    assert not checkpoints.keeps(b"gone")
    assert arrive(checkpoints, b"gone") is gone
    assert gone.uses == 1
    back = add(checkpoints, b"gone", 3000, Place.PROMPT_END, [4, 5, 6], None)
    assert back is gone
    assert checkpoints.keeps(b"gone")
    assert checkpoints.needs(4)


def test_no_more_is_watched_than_a_few_times_what_is_kept(checkpoints):
    for i in range(20_000):
        arrive(checkpoints)
        add(checkpoints, str(i).encode(), 3000, Place.PROMPT_END, [i], None)
        if len(checkpoints) > 50:
            checkpoints.give_up()
    assert len(checkpoints._known) < 4 * 51 + 1024 + 64


def test_the_one_to_give_up_is_worth_the_least_of_all(checkpoints):
    draw = random.Random(5)
    for i in range(60):
        arrive(checkpoints, *(str(j).encode() for j in draw.sample(range(i + 1), min(i, 2))))
        # They share many of their blocks, which those that are alone in needing theirs do not.
        blocks = {draw.randrange(40) for _ in range(draw.randrange(1, 9))}
        at = draw.choice(list(Place))
        add(checkpoints, str(i).encode(), draw.randrange(100, 9000), at, blocks, None)
    for _ in range(60):
        worths = [(checkpoints._worth(one), one.slot) for one in checkpoints.kept()]
        least = checkpoints.kept()[min(worths)[1]]
        assert checkpoints.give_up() is least
