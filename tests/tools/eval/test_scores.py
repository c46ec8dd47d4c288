# SPDX-License-Identifier: Apache-2.0
"""Scores are those of the formulas, by torch's own functions and by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hybrid_kv.tools.eval import scores
from vllm_hybrid_kv.tools.eval.scores import score


def logits_of(seed, positions, vocabulary, spread=4.0):
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(positions, vocabulary, generator=generator)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1000),
    st.integers(1, 9),
    st.integers(2, 40),
    st.sampled_from([1e-4, 0.1, 3.0]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([1, 64, 1 << 20]),
)
def test_scores_are_torchs_own_in_float64(seed, positions, vocabulary, noise, dtype, elements):
    reference = logits_of(seed, positions, vocabulary).to(dtype)
    logits = (reference + noise * logits_of(seed + 1, positions, vocabulary)).to(dtype)
    targets = torch.randint(vocabulary, (positions,), generator=torch.Generator().manual_seed(seed))
    whole, scores.MOST_ELEMENTS = scores.MOST_ELEMENTS, elements
    try:
        found = score(logits, targets, reference)
    finally:
        scores.MOST_ELEMENTS = whole
    q, p = (torch.log_softmax(one.double(), -1) for one in (logits, reference))
    divergences = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    came = -torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    torch.testing.assert_close(torch.tensor(found.logprobs, dtype=torch.float64), came)
    found_divergences = torch.tensor(found.divergences, dtype=torch.float64)
    torch.testing.assert_close(found_divergences, divergences, rtol=1e-9, atol=1e-13)


def test_two_coins_diverge_as_on_paper():
    fair, loaded = torch.log(torch.tensor([[0.5, 0.5], [0.25, 0.75]])), torch.tensor([0, 1])
    found = score(fair[1:], loaded[:1], fair[:1])
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert found.divergences == pytest.approx([expected], rel=1e-6)
    assert found.logprobs == pytest.approx([math.log(0.25)], rel=1e-6)


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_no_distribution_diverges_from_itself_shifted(seed):
    reference = logits_of(seed, 3, 50)
    found = score(reference + 2.0, torch.zeros(3, dtype=torch.long), reference)
    assert max(found.divergences) < 1e-10
    assert min(found.divergences) >= 0.0
    assert found.agreements == [True] * 3


def test_the_reference_diverges_from_nothing():
    found = score(logits_of(0, 4, 10), torch.arange(4))
    assert found.divergences == [0.0] * 4
    assert found.agreements == [True] * 4


def test_tokens_that_cannot_come_add_nothing():
    reference = torch.tensor([[0.0, 0.0, -math.inf]])
    found = score(reference.clone(), torch.tensor([0]), reference)
    assert found.divergences == [0.0]
    assert found.logprobs == pytest.approx([math.log(0.5)])


def test_what_the_reference_finds_possible_and_the_other_does_not_diverges_without_end():
    found = score(torch.tensor([[0.0, -math.inf]]), torch.tensor([1]), torch.zeros(1, 2))
    assert found.divergences == [math.inf]
    assert found.logprobs == [-math.inf]


def test_what_is_not_a_number_stays_visible():
    found = score(torch.tensor([[0.0, math.nan]]), torch.tensor([0]), torch.zeros(1, 2))
    assert math.isnan(found.divergences[0])


def test_a_tie_of_the_references_agrees_with_either():
    reference = torch.tensor([[1.0, 5.0, 5.0]]).repeat(3, 1)
    logits = torch.tensor([[1.0, 5.0, 4.0], [1.0, 4.0, 5.0], [6.0, 5.0, 5.0]])
    found = score(logits, torch.zeros(3, dtype=torch.long), reference)
    assert found.agreements == [True, True, False]
