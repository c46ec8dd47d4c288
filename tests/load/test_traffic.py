# SPDX-License-Identifier: Apache-2.0
import math

import pytest

from tests.load.__main__ import margin, plan

LIKELIEST = [{3: -0.1, 4: -2.5}, {5: -0.7, 6: -0.75}, {7: -0.2, 8: -1.8}]


@pytest.mark.parametrize(
    ("answer", "index", "by"),
    [
        # The answers differ at a close choice. Later tokens depend on the choice and do not count.
        ([3, 6, 99], 1, 0.05),
        ([4, 5, 7], 0, 2.4),
        # The answer's token is not among the likeliest candidates.
        ([3, 5, 99], 2, math.inf),
        # The answer is too short.
        ([3, 5], 2, math.inf),
    ],
)
def test_an_answer_is_judged_by_its_first_different_token(
    answer: list[int], index: int, by: float
) -> None:
    assert margin([3, 5, 7], LIKELIEST, answer) == (index, pytest.approx(by))


def test_requests_are_reproducible_share_beginnings_and_are_sometimes_cancelled() -> None:
    drawn = plan(50)
    assert drawn == plan(50)
    assert len({request.prompt[:4] for request in drawn}) < 50
    assert any(request.cancelled_after for request in drawn)
