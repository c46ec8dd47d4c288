# SPDX-License-Identifier: Apache-2.0
"""Test which checkpoints are pinned, superseded, reused and evicted."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hybrid_kv.coordinator.checkpoints import CheckpointKind, Checkpoints
from vllm_hybrid_kv.coordinator.traffic import Turn, age_range

END = CheckpointKind.PROMPT
PLACES = (END, CheckpointKind.BRANCH, CheckpointKind.ANSWER, CheckpointKind.BOUNDARY)


@pytest.fixture
def checkpoints():
    return Checkpoints(state_blocks=3, block_tokens=1000)


def add(checkpoints, key, tokens, place, blocks, parent, supersedes=True, turn=Turn.FIRST):
    checkpoint, released = checkpoints.enter(key, tokens, place, blocks, parent, supersedes, turn)
    assert released is None
    return checkpoint


def arrive(checkpoints, *keys):
    return checkpoints.arrive(list(keys), len(keys))


def conversation(checkpoints):
    """Register checkpoints at the ends of three turns of one conversation."""
    arrive(checkpoints)
    turns, parent = [], None
    for number, key in enumerate((b"first", b"second", b"third"), 1):
        parent = add(checkpoints, key, 1000 * number, END, range(1, number + 1), parent)
        turns.append(parent)
    return turns


def test_a_turn_that_a_longer_one_superseded_is_evicted_first(checkpoints):
    arrive(checkpoints)
    other = add(checkpoints, b"other", 3000, END, [1, 2, 3], None)
    first = add(checkpoints, b"first", 3000, END, [4, 5, 6], None)
    assert arrive(checkpoints, b"first", b"unknown") is first
    second = add(checkpoints, b"second", 4000, END, [4, 5, 6, 7], first)
    assert first.kind is CheckpointKind.SUPERSEDED
    assert checkpoints.evict() is first
    # The longer checkpoint pins the blocks of the evicted one too.
    assert all(block in checkpoints.pins for block in (1, 2, 3, 4, 5, 6, 7))
    assert {checkpoints.evict(), checkpoints.evict()} == {other, second}
    assert checkpoints.evict() is None
    assert not any(block in checkpoints.pins for block in range(8))


def test_a_turn_stays_superseded_if_a_later_turn_is_still_pinned(checkpoints):
    first, second, third = conversation(checkpoints)
    checkpoints.unpin(second)
    assert first.kind is CheckpointKind.SUPERSEDED
    assert third.fallback() is None
    checkpoints.unpin(third)
    assert first.kind is not CheckpointKind.SUPERSEDED
    assert not first.extensions


def test_an_answer_that_may_not_return_supersedes_nothing(checkpoints):
    arrive(checkpoints)
    end = add(checkpoints, b"end", 3000, END, [1, 2, 3], None)
    answer = add(
        checkpoints, b"answer", 3200, CheckpointKind.ANSWER, [1, 2, 3], end, supersedes=False
    )
    assert end.kind is CheckpointKind.PROMPT
    assert answer.fallback() is end


def test_the_next_turn_supersedes_an_answer_and_the_prompt_that_the_answer_did_not(checkpoints):
    arrive(checkpoints)
    end = add(checkpoints, b"end", 3000, END, [1, 2, 3], None)
    answer = add(
        checkpoints, b"answer", 3200, CheckpointKind.ANSWER, [1, 2, 3], end, supersedes=False
    )
    arrive(checkpoints, b"end", b"answer")
    following = add(checkpoints, b"next", 4000, END, [1, 2, 3, 4], answer)
    assert [end.kind, answer.kind] == [CheckpointKind.SUPERSEDED] * 2
    assert following.fallback() is None
    checkpoints.unpin(answer)
    assert end.kind is CheckpointKind.SUPERSEDED
    checkpoints.unpin(following)
    assert end.kind is END


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(PLACES), st.booleans()), max_size=40))
def test_a_checkpoint_is_superseded_only_while_a_longer_one_is_pinned(steps):
    checkpoints, latest = Checkpoints(3, 1000), None
    for number, (unpins, place, supersedes) in enumerate(steps, 1):
        arrive(checkpoints)
        key = str(number).encode()
        latest = add(checkpoints, key, 500 * number, place, [number], latest, supersedes) or latest
        for _ in range(min(unpins, len(checkpoints.pinned) - 1)):
            checkpoints.unpin(checkpoints.pinned[(7 * number) % len(checkpoints.pinned)])
        for one in checkpoints._tracked.values():
            assert all(longer.pinned and longer.tokens > one.tokens for longer in one.extensions)
            assert one.pinned or not one.extensions
    while checkpoints.pinned:
        checkpoints.unpin(checkpoints.pinned[0])
    assert not any(one.extensions for one in checkpoints._tracked.values())


def test_a_checkpoint_of_a_turn_that_returns_seldom_is_evicted_before_others(checkpoints):
    for i in range(300):
        arrive(checkpoints, *([b"%d" % (i - 5)] if i % 2 else []))
        turn = Turn.DOCUMENT if i % 2 else Turn.MESSAGE
        checkpoints.unpin(add(checkpoints, b"%d" % i, 3000, END, [i], None, turn=turn))
    # Only messages returned.
    message = add(checkpoints, b"message", 3000, END, [400, 401], None, turn=Turn.MESSAGE)
    document = add(checkpoints, b"document", 3000, END, [402, 403], None, turn=Turn.DOCUMENT)
    assert [checkpoints.evict(), checkpoints.evict()] == [document, message]


def test_a_return_counts_for_all_evicted_checkpoints_down_to_the_longest_pinned(checkpoints):
    first, second, third = conversation(checkpoints)
    checkpoints.unpin(second)
    checkpoints.unpin(third)
    arrive(checkpoints, b"first", b"second", b"third", b"new")
    assert [first.uses, second.uses, third.uses] == [1, 1, 1]
    add(checkpoints, b"second", 2000, END, [1, 2], first)
    arrive(checkpoints, b"first", b"second", b"new")
    assert [first.uses, second.uses, third.uses] == [1, 2, 1]


def test_the_end_of_a_block_before_a_longer_checkpoint_was_not_returned_to(checkpoints):
    arrive(checkpoints)
    boundary = add(
        checkpoints, b"boundary", 2000, CheckpointKind.BOUNDARY, [1, 2], None, supersedes=False
    )
    checkpoints.unpin(boundary)
    checkpoints.unpin(add(checkpoints, b"end", 3000, END, [1, 2, 3], None))
    returns = checkpoints._curves[CheckpointKind.BOUNDARY]._returns
    arrive(checkpoints, b"boundary", b"end")
    assert returns.sum() == 0
    arrive(checkpoints, b"boundary", b"another")
    assert boundary.uses == 2
    reused = checkpoints._curves[CheckpointKind.REUSED]._returns
    assert reused.sum() + returns.sum() == 1


def test_the_end_of_a_block_is_pinned_until_something_worth_more_was_evicted(checkpoints):
    arrive(checkpoints)
    boundary = ("boundary", 2000, CheckpointKind.BOUNDARY, [1, 2], None)
    pinned = add(checkpoints, *boundary)
    assert pinned.pinned
    checkpoints.unpin(pinned)
    add(checkpoints, b"end", 2000, END, [3, 4], None)
    checkpoints.evict()
    assert not add(checkpoints, *boundary).pinned
    assert not checkpoints.pinned


@pytest.mark.parametrize("blocks", [[1, 2], None])
def test_any_other_place_replaces_the_end_of_a_block_at_the_same_prefix(checkpoints, blocks):
    arrive(checkpoints)
    add(checkpoints, b"key", 2000, CheckpointKind.BOUNDARY, [3, 4], None)
    assert checkpoints.enter(b"key", 2000, CheckpointKind.BOUNDARY, [1, 2], None) == (None, None)
    end, released = checkpoints.enter(b"key", 2000, END, blocks, None)
    assert released == (3, 4)
    assert 3 not in checkpoints.pins
    # Without the blocks that a hit needs, no checkpoint is registered.
    assert checkpoints.pinned == ([] if blocks is None else [end])
    assert (end is None) == (blocks is None)
    if blocks is not None:
        assert checkpoints.enter(b"key", 2000, CheckpointKind.BRANCH, blocks, None) == (None, None)


def test_a_branch_point_is_not_superseded_by_a_longer_checkpoint(checkpoints):
    arrive(checkpoints)
    branch = add(checkpoints, b"branch", 500, CheckpointKind.BRANCH, [1], None)
    add(checkpoints, b"end", 900, END, [1], branch)
    assert branch.kind is CheckpointKind.BRANCH
    arrive(checkpoints, b"branch")
    assert branch.kind is CheckpointKind.REUSED


def test_a_parent_is_shorter_even_if_a_longer_prompt_was_known(checkpoints):
    arrive(checkpoints)
    long = add(checkpoints, b"long", 3000, END, [1, 2, 3], None)
    branch = add(checkpoints, b"branch", 1000, CheckpointKind.BRANCH, [1], long)
    assert branch.parent is None
    again = add(checkpoints, b"more", 2000, END, [1, 2], branch)
    assert again.fallback() is branch


def test_the_number_of_tracked_checkpoints_is_bounded(checkpoints):
    for i in range(20_000):
        arrive(checkpoints)
        add(checkpoints, str(i).encode(), 3000, END, [i], None)
        if len(checkpoints.pinned) > 50:
            checkpoints.evict()
    assert len(checkpoints._tracked) < 4 * 51 + 4096 + 64


def test_the_evicted_checkpoint_is_worth_the_least_of_all(checkpoints):
    draw = random.Random(5)
    for i in range(60):
        arrive(checkpoints, *(str(j).encode() for j in draw.sample(range(i + 1), min(i, 2))))
        # Many of these blocks are shared, so counting them all gives only a lower bound of worth.
        blocks = {draw.randrange(40) for _ in range(draw.randrange(1, 9))}
        place = draw.choice(PLACES)
        tokens, turn = draw.randrange(100, 9000), draw.choice(list(Turn))
        add(checkpoints, str(i).encode(), tokens, place, blocks, None, turn=turn)

    def worth(one):
        fallback = one.fallback()
        saved = one.tokens - (fallback.tokens if fallback else 0)
        age = age_range(checkpoints._now - one.last_use)
        index = checkpoints._curves[one.kind].index[one.turn][age]
        own = sum(checkpoints.pins[block] == 1 for block in one.blocks)
        return index * saved / (3 + own), one.slot

    for _ in range(60):
        assert checkpoints.pinned
        least = min(checkpoints.pinned, key=worth)
        assert checkpoints.evict() is least
