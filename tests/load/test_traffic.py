# SPDX-License-Identifier: Apache-2.0
"""When an answer under load may be another than the one computed alone."""

import math

from tests.load.traffic import margin, plan

LIKELIEST = [{3: -0.1, 4: -2.5}, {5: -0.7, 6: -0.75}, {7: -0.2, 8: -1.8}]


def test_answers_are_judged_where_they_part_and_not_by_what_follows() -> None:
    place, by = margin([3, 5, 7], LIKELIEST, [3, 6, 99])
    assert place == 1
    assert math.isclose(by, 0.05)


def test_a_choice_that_was_not_close_shows_by_how_much() -> None:
    assert margin([3, 5, 7], LIKELIEST, [4, 5, 7]) == (0, 2.4)


def test_a_token_that_is_not_among_the_likeliest_lost_by_far() -> None:
    assert margin([3, 5, 7], LIKELIEST, [3, 5, 99]) == (2, math.inf)


def test_an_answer_cut_short_is_no_close_choice() -> None:
    assert margin([3, 5, 7], LIKELIEST, [3, 5]) == (2, math.inf)


def test_the_same_seed_draws_the_same_requests_and_some_begin_alike() -> None:
    drawn = plan(50, 512, seed=1)
    assert drawn == plan(50, 512, seed=1) != plan(50, 512, seed=2)
    assert len({request.prompt[:4] for request in drawn}) < 50
    assert any(request.cancelled_after for request in drawn)
