# SPDX-License-Identifier: Apache-2.0
"""Scores equal torch's functions in float64, and values computed by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hybrid_kv.tools.eval import scores
from vllm_hybrid_kv.tools.eval.engine import check_scores
from vllm_hybrid_kv.tools.eval.scores import Scores


def logits_of(seed, positions, vocabulary):
    generator = torch.Generator().manual_seed(seed)
    return 4 * torch.randn(positions, vocabulary, generator=generator)


def score(logits, targets, reference=None):
    found = Scores()
    found.add(logits, torch.as_tensor(targets), reference)
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1000),
    st.integers(1, 9),
    st.integers(2, 40),
    st.sampled_from([1e-4, 0.1, 3.0]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([1, 64, 1 << 20]),
)
def test_scores_equal_torchs_functions(seed, positions, vocabulary, noise, dtype, elements):
    reference = logits_of(seed, positions, vocabulary).to(dtype)
    logits = (reference + noise * logits_of(seed + 1, positions, vocabulary)).to(dtype)
    targets = torch.randint(vocabulary, (positions,), generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "MOST_ELEMENTS", elements)
        found = score(logits, targets, reference)
    q, p = (torch.log_softmax(one.double(), -1) for one in (logits, reference))
    divergences = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    logprobs = -torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    torch.testing.assert_close(torch.tensor(found.logprobs, dtype=torch.float64), logprobs)
    found_divergences = torch.tensor(found.divergences, dtype=torch.float64)
    torch.testing.assert_close(found_divergences, divergences, rtol=1e-9, atol=1e-13)


def test_a_loaded_coin_diverges_from_a_fair_one_as_computed_by_hand():
    fair, loaded = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    found = score(loaded, [0], fair)
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert found.divergences == pytest.approx([expected], rel=1e-6)
    assert found.logprobs == pytest.approx([math.log(0.25)], rel=1e-6)


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_shifted_logits_do_not_diverge(seed):
    reference = logits_of(seed, 3, 50)
    found = score(reference + 2.0, [0, 0, 0], reference)
    assert max(found.divergences) < 1e-10
    assert min(found.divergences) >= 0.0
    assert found.agreements == [True] * 3


def test_the_reference_does_not_diverge_from_itself():
    found = score(logits_of(0, 4, 10), range(4))
    assert found.divergences == [0.0] * 4
    assert found.agreements == [True] * 4


INF = math.inf


@pytest.mark.parametrize(
    ("logits", "reference", "divergence", "logprob"),
    [
        # An impossible token adds nothing.
        ([0.0, 0.0, -INF], [0.0, 0.0, -INF], 0.0, math.log(0.5)),
        # A token that is possible only for the reference adds infinity.
        ([-INF, 0.0], [0.0, 0.0], INF, -INF),
        ([0.0, math.nan], [0.0, 0.0], math.nan, math.nan),
    ],
)
def test_infinite_logits_and_nan_stay_visible(logits, reference, divergence, logprob):
    found = score(torch.tensor([logits]), [0], torch.tensor([reference]))
    assert found.divergences == pytest.approx([divergence], nan_ok=True)
    assert found.logprobs == pytest.approx([logprob], nan_ok=True)


def test_any_of_the_references_tied_top_tokens_agrees():
    reference = torch.tensor([[1.0, 5.0, 5.0]]).repeat(3, 1)
    logits = torch.tensor([[1.0, 5.0, 4.0], [1.0, 4.0, 5.0], [6.0, 5.0, 5.0]])
    assert score(logits, [0, 0, 0], reference).agreements == [True, True, False]


def test_scores_that_differ_from_vllms_are_rejected():
    prompt_logprobs = [None, {5: SimpleNamespace(logprob=-1.0)}, {6: SimpleNamespace(logprob=-2.0)}]
    check_scores({"logprobs": [-1.0, -2.001]}, [4, 5, 6], prompt_logprobs)
    with pytest.raises(RuntimeError, match=r"after 2 tokens is -1\.0000, but vLLM returned -2\.0"):
        check_scores({"logprobs": [-1.0, -1.0]}, [4, 5, 6], prompt_logprobs)
    for missing in (None, {"logprobs": [-1.0]}):
        with pytest.raises(RuntimeError, match="did not get the model's logits"):
            check_scores(missing, [4, 5, 6], prompt_logprobs)
