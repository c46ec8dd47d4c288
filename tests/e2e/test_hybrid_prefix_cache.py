# SPDX-License-Identifier: Apache-2.0
"""With the strategy `hybrid_aware`, a real engine resumes chats from cached recurrent states."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from testing import planted_faults
from testing.engine_host import EngineHost, Output
from testing.model_cases import case_of, settings
from testing.tokenizer import random_prompt

pytestmark = [pytest.mark.engine, pytest.mark.both_minors]

UNIT = 64
TURNS = 6
CHATS = 12
POLICY = {"hybrid_kv": {"coordinator": "hybrid_aware", "prefix_match_unit": "auto"}}
CASE = case_of("qwen3-next")


@dataclass(frozen=True)
class Chats:
    """Prompts and outputs of chats. Each prompt is the previous one, its answer and new tokens.

    Attributes:
        prompts: The prompts by turn, then by chat.
        uncached: The outputs without a prefix cache.
        cached: The outputs of `engine`, which has our strategy and gets one prompt at a time.
    """

    prompts: list[list[int]]
    uncached: list[Output]
    cached: list[Output]
    engine: EngineHost

    def differences(self, outputs: list[Output]) -> list[str]:
        """Compare the first token of each output with the one computed without a prefix cache.

        Hits end at multiples of 64 tokens, where Gated DeltaNet cuts a prompt anyway. So hits only
        change the shapes of matrix products, and thus rounding. If a token leads by more than
        rounding can change, both tokens must be equal. The first turn, without hits, is left out.
        """
        pairs = list(zip(self.uncached, outputs, strict=True))[CHATS:]
        equal = [(a, b) for a, b in pairs if a.tokens[0] == b.tokens[0]]
        apart = statistics.fmean(abs(a.logprobs[0] - b.logprobs[0]) for a, b in equal)
        decisive = [pair for pair in pairs if pair[0].margins[0] > 2 * CASE.bounds.limit]
        assert len(decisive) >= 5
        found = {
            "a clear choice differs": any(pair not in equal for pair in decisive),
            f"{len(equal)} of {len(pairs)} tokens are equal": len(equal) < 0.9 * len(pairs),
            f"log-probabilities are {apart:.2g} apart on average": apart > 0.01,
        }
        return [difference for difference, exists in found.items() if exists]


@pytest.fixture(scope="module")
def chats(host: EngineHost, small_model: Callable[..., Path]) -> Chats:
    model = small_model(CASE.model, CASE.dtype)
    engine = host.engine(**settings(model, CASE.dtype, enable_prefix_caching=False))
    turn = [random_prompt(90 + 7 * i, seed=i) for i in range(CHATS)]
    prompts: list[list[int]] = []
    uncached: list[Output] = []
    for number in range(1, TURNS + 1):
        outputs = engine.generate(turn, CASE.tokens, alone=True)
        prompts += turn
        uncached += outputs
        more = [random_prompt(60 + 11 * i, seed=1000 * number + i)[1:] for i in range(CHATS)]
        turn = [p + o.tokens + m for p, o, m in zip(turn, outputs, more, strict=True)]
    engine = host.engine(**settings(model, CASE.dtype, additional_config=POLICY))
    cached = engine.generate(prompts, CASE.tokens, alone=True)
    return Chats(prompts, uncached, cached, engine)


def test_a_turn_resumes_where_the_previous_prompt_ended(chats: Chats) -> None:
    counts = [output.cached for output in chats.cached]
    ends = [(len(prompt) - 1) // UNIT * UNIT for prompt in chats.prompts[:-CHATS]]
    assert counts == [0] * CHATS + ends
    # Hits end both inside the first block and after it.
    block = chats.engine.started["block_size"]
    assert any(0 < count < block for count in counts[CHATS : 2 * CHATS])
    assert max(counts) > block


def test_answers_do_not_depend_on_the_prefix_cache(chats: Chats) -> None:
    assert chats.differences(chats.cached) == []


def test_a_state_that_is_not_copied_is_detected(chats: Chats) -> None:
    engine = chats.engine
    engine.generate([random_prompt(4, seed=0)], 1, fresh=True)
    engine.plant(planted_faults.STATE_FAULT)
    try:
        spoilt = engine.generate(chats.prompts, CASE.tokens, alone=True)
    finally:
        engine.plant(None)
        engine.generate([random_prompt(4, seed=0)], 1, fresh=True)
    assert [output.cached for output in spoilt] == [output.cached for output in chats.cached]
    assert chats.differences(spoilt)


def test_a_repeated_prompt_gives_the_same_bits(chats: Chats) -> None:
    prompts = [random_prompt(100 + 61 * i, seed=500 + i) for i in range(8)]
    first, again = (chats.engine.generate(prompts, CASE.tokens, alone=True) for _ in range(2))
    counts = [output.cached for output in again]
    assert counts == [(len(prompt) - 1) // UNIT * UNIT for prompt in prompts]
    assert any(count % chats.engine.started["block_size"] for count in counts)
    assert [(o.tokens, o.logprobs) for o in again] == [(o.tokens, o.logprobs) for o in first]


def test_seeded_output_does_not_depend_on_chunks(chats: Chats) -> None:
    prompts = [random_prompt(length, seed=900 + length) for length in (100, 300)]
    # Without a hit, chunks end where states are cached, and the engine discards their samples.
    # With a hit there is one chunk.
    chunked, hit, other = (
        chats.engine.generate(prompts, CASE.tokens, alone=True, seed=seed) for seed in (7, 7, 8)
    )
    assert [output.cached for output in chunked] == [0, 0]
    assert [output.cached for output in hit] == [UNIT, 4 * UNIT]
    assert [output.tokens for output in hit] == [output.tokens for output in chunked]
    assert [output.tokens for output in other] != [output.tokens for output in hit]
