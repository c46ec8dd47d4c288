# SPDX-License-Identifier: Apache-2.0
"""Test how compressed checkpoints are rounded, and that conversations resume from them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from benchmarks.compressed_checkpoints import conversations, storage
from benchmarks.compressed_checkpoints.measure import MODELS, PLANS, Tally, verdict
from benchmarks.compressed_checkpoints.storage import RULES, Rule, compress, restore, stored

# A restored number may be 0.2 % larger, and must stay below `storage.LARGEST`.
NUMBERS = st.floats(-float(np.float32(2.9e38)), float(np.float32(2.9e38)), width=32)
ROWS = npst.arrays(np.float32, (2, 16), elements=NUMBERS).map(torch.from_numpy)
SMALL_ROWS = npst.arrays(np.float32, (2, 16), elements=st.floats(-100, 100, width=32)).map(
    torch.from_numpy
)
CODES = [Rule(), Rule(7)]


@pytest.mark.parametrize("rule", CODES)
@settings(deadline=None)
@given(rows=ROWS)
def test_a_restored_number_errs_at_most_half_a_step_of_its_row(
    rule: Rule, rows: torch.Tensor
) -> None:
    codes, scales = compress(rows, rule)
    assert codes.abs().max() <= rule.steps
    error = (restore(codes, scales, rule).double() - rows.double()).abs()
    step = rows.double().abs().amax(-1, keepdim=True) / rule.steps
    # The scale is rounded to 8 bits. Rows of tiny numbers are stored as zeros.
    assert (error <= 0.5 * step * (1 + 2**-8) + 1.5e-36).all()


@pytest.mark.parametrize("rule", CODES)
@settings(deadline=None)
@given(rows=ROWS)
def test_a_restored_row_is_stored_and_restored_as_the_same_bits(
    rule: Rule, rows: torch.Tensor
) -> None:
    first = compress(rows, rule)
    again = compress(restore(*first, rule), rule)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


@settings(deadline=None)
@given(rows=SMALL_ROWS)
def test_rotated_rows_err_at_most_half_a_step_for_each_rotated_number(rows: torch.Tensor) -> None:
    rule = Rule(rotated=True)
    codes, scales = compress(rows, rule)
    first, second = restore(codes, scales, rule), restore(codes, scales, rule)
    assert torch.equal(first, second)
    step = rows.norm(dim=-1) / rule.steps
    assert ((first - rows).norm(dim=-1) <= 0.51 * step * rows.shape[-1] ** 0.5 + 1e-30).all()


@pytest.mark.parametrize("rule", RULES.values())
def test_zeros_are_restored_as_zeros(rule: Rule) -> None:
    assert torch.equal(stored(torch.zeros(3, 16), rule), torch.zeros(3, 16))


def test_each_row_has_its_own_scale() -> None:
    rows = torch.tensor([[1e-6, -2e-6], [1e6, 3e6]])
    torch.testing.assert_close(stored(rows, Rule()), rows, rtol=0.01, atol=0)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 3.4e38])
def test_numbers_that_cannot_be_restored_are_rejected(number: float) -> None:
    with pytest.raises(ValueError, match="states must be finite"):
        compress(torch.tensor([[1.0, number]]), Rule())


def test_a_recurrent_state_has_one_scale_per_value_dim() -> None:
    # Value dim 0 (a column) has large numbers, so only its own numbers may err by much.
    state = torch.full((4, 3), 0.01)
    state[:, 0] = torch.tensor([1000.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(storage.stored_state(state, Rule()), state, rtol=0.01, atol=0)


def test_rounding_each_token_by_nothing_equals_the_chunked_delta_rule() -> None:
    make = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 70, 1, 16, generator=make) for _ in range(3))
    gates = {
        "g": -torch.rand(2, 70, 1, generator=make),
        "beta": torch.rand(2, 70, 1, generator=make),
    }
    how = {"initial_state": None, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    found = storage.running_delta_rule(lambda state: state)(query, key, value, **gates, **how)
    wanted = qwen3_next.torch_chunk_gated_delta_rule(query, key, value, **gates, **how)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", PLANS)
def test_a_turn_asks_each_pair_of_earlier_turns_at_most_once(name: str) -> None:
    one = conversations.draw_conversation(np.random.default_rng(0), PLANS[name])
    tokens, asked = one.tokens.tolist(), set()
    for turn, answers in enumerate(one.answers, 1):
        for index in answers:
            key, value = tokens[index - 1 : index + 1]
            assert one.ends[turn - 1] < index < one.ends[turn]
            first = tokens.index(key)
            assert tokens[first + 1] == value
            assert first < one.ends[turn - 1]
            assert key not in asked
            asked.add(key)


@pytest.fixture(scope="module")
def answered() -> dict[str, dict[int, torch.Tensor]]:
    """Log-probabilities of one batch by rule; "whole" is a single turn."""
    name = "gated-deltanet"
    model = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).eval()
    draw = np.random.default_rng(0)
    asked = [conversations.draw_conversation(draw, PLANS[name]) for _ in range(8)]
    found = {
        label: conversations.answer(model, asked, rule)[0]
        for label, rule in [("exact", None), *RULES.items()]
    }
    with torch.inference_mode():
        tokens = torch.from_numpy(np.stack([one.tokens for one in asked]))
        logits = model(tokens, use_cache=False).logits.double().log_softmax(-1)
    found["whole"] = {
        turn: logits[:, [index - 1 for index in asked[0].answers[turn - 1]]]
        for turn in conversations.TURNS
    }
    found["right"] = {
        turn: conversations.right_answers(asked, turn) for turn in conversations.TURNS
    }
    return found


def test_turns_that_resume_from_exact_states_equal_one_long_prompt(
    answered: dict[str, dict[int, torch.Tensor]],
) -> None:
    for turn in conversations.TURNS:
        torch.testing.assert_close(
            answered["exact"][turn], answered["whole"][turn], atol=1e-2, rtol=0
        )


def test_the_model_without_attention_recalls_from_its_states_only(
    answered: dict[str, dict[int, torch.Tensor]],
) -> None:
    right = answered["right"][16]
    assert (answered["exact"][16].argmax(-1) == right).double().mean() > 0.8
    assert (answered["zeros"][16].argmax(-1) == right).double().mean() < 0.1


@pytest.mark.parametrize(
    ("coarse", "fine"),
    [("int4, rotated", "int8"), ("int8", "bfloat16"), ("int8, running", "int8")],
)
def test_coarser_states_change_answers_more(
    answered: dict[str, dict[int, torch.Tensor]], coarse: str, fine: str
) -> None:
    def change(label: str) -> float:
        return float((answered[label][16] - answered["exact"][16]).abs().mean())

    assert change(coarse) > 1.5 * change(fine) > 0


def test_the_interval_counts_each_conversation_once() -> None:
    exact = torch.tensor([[True, True], [True, True], [True, True], [True, False]])
    right = torch.tensor([[True, True], [False, False], [True, True], [True, False]])
    difference, half = Tally([right], [exact], [torch.zeros(4, 2)]).difference()
    assert difference == pytest.approx(-25)
    assert half == pytest.approx(1.96 * 50 / 2)
    _, half = Tally([exact], [exact], [torch.zeros(4, 2)]).difference()
    assert half == 300 / 8


@pytest.mark.parametrize(
    ("difference", "half", "words"),
    [(-0.1, 0.05, "is met"), (-0.15, 0.1, "neither"), (-0.5, 0.1, "is missed")],
)
def test_the_verdict_uses_the_whole_interval(difference: float, half: float, words: str) -> None:
    assert words in verdict(difference, half)
