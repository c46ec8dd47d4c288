# SPDX-License-Identifier: Apache-2.0
"""A hybrid model in a real engine with the strategy `hybrid_aware`: chats resume from states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from testing import planted_faults
from testing.engine_host import EngineHost
from testing.engine_requests import Output
from testing.model_cases import case_of, settings
from testing.tokenizer import random_prompt

pytestmark = [pytest.mark.engine, pytest.mark.both_minors]

UNIT = 64
TURNS = 6
CHATS = 12
POLICY = {"hybrid_kv": {"coordinator": "hybrid_aware", "prefix_match_unit": "auto"}}
CASE = case_of("qwen3-next")

Start = Callable[[], EngineHost]


@dataclass(frozen=True)
class Chats:
    """Chats in which each turn is the previous turn, its answer and new tokens.

    Attributes:
        turns: The prompts, by chat and turn.
        uncached: Their outputs without a prefix cache.
        cached: Their outputs with our strategy, sent one after another, by turn and then by chat.
        block: Tokens of a block.
    """

    turns: list[list[list[int]]]
    uncached: list[list[Output]]
    cached: list[list[Output]]
    block: int


@pytest.fixture(scope="module")
def start(host: EngineHost, small_model: Callable[..., Path]) -> Start:
    """A function that returns the host with an engine of our strategy."""
    model = small_model(CASE.model, CASE.dtype)
    return lambda: host.engine(**settings(model, CASE.dtype, additional_config=POLICY))


@pytest.fixture(scope="module")
def chats(host: EngineHost, start: Start, small_model: Callable[..., Path]) -> Chats:
    model = small_model(CASE.model, CASE.dtype)
    engine = host.engine(**settings(model, CASE.dtype, enable_prefix_caching=False))
    turns: list[list[list[int]]] = [[random_prompt(90 + 7 * i, seed=i)] for i in range(CHATS)]
    uncached: list[list[Output]] = [[] for _ in turns]
    for turn in range(TURNS):
        outputs = engine.generate([chat[-1] for chat in turns], CASE.tokens, alone=True)
        for i, (chat, output) in enumerate(zip(turns, outputs, strict=True)):
            uncached[i].append(output)
            if turn + 1 < TURNS:
                more = random_prompt(60 + 11 * i, seed=1000 * (turn + 1) + i)
                chat.append(chat[-1] + output.tokens + more[1:])
    engine = start()
    cached: list[list[Output]] = [[] for _ in turns]
    for turn in range(TURNS):
        outputs = engine.generate([chat[turn] for chat in turns], CASE.tokens, alone=True)
        for chat_outputs, output in zip(cached, outputs, strict=True):
            chat_outputs.append(output)
    return Chats(turns, uncached, cached, engine.started["block_size"])


def test_a_turn_resumes_where_the_previous_prompt_ended(chats: Chats) -> None:
    for prompts, outputs in zip(chats.turns, chats.cached, strict=True):
        assert outputs[0].cached == 0
        for before, output in zip(prompts, outputs[1:], strict=False):
            assert output.cached == (len(before) - 1) // UNIT * UNIT
        counts = [output.cached for output in outputs]
        assert counts == sorted(set(counts))
    # Hits end both inside the first block and after it.
    assert any(0 < outputs[1].cached < chats.block for outputs in chats.cached)
    assert any(outputs[-1].cached > chats.block for outputs in chats.cached)


def assert_same_first_tokens(uncached: list[Output], cached: list[Output]) -> None:
    """Assert that outputs begin alike.

    Prompts resume at multiples of 64 tokens, where Gated DeltaNet cuts a prompt anyway, so only
    the shapes of the multiplied matrices differ. If the best token leads by more than their
    rounding, it must be the same.
    """
    pairs = list(zip(uncached, cached, strict=True))
    decisive = [pair for pair in pairs if pair[0].margins[0] > 2 * CASE.bounds.limit]
    assert len(decisive) >= 5
    for without, with_cache in decisive:
        assert with_cache.tokens[0] == without.tokens[0], f"{without.margins=}"
    apart = [
        abs(with_cache.logprobs[0] - without.logprobs[0])
        for without, with_cache in pairs
        if with_cache.tokens[0] == without.tokens[0]
    ]
    mean = sum(apart) / len(apart)
    print(f"{len(apart)} of {len(pairs)} first tokens the same, {mean:.2g} apart on average")
    assert len(apart) >= 0.9 * len(pairs), "first tokens differ"
    assert mean <= 0.01, "log-probabilities differ"


def test_answers_do_not_depend_on_the_prefix_cache(chats: Chats) -> None:
    uncached = [output for outputs in chats.uncached for output in outputs[1:]]
    cached = [output for outputs in chats.cached for output in outputs[1:]]
    assert_same_first_tokens(uncached, cached)


def test_a_state_that_is_not_copied_is_detected(start: Start, chats: Chats) -> None:
    engine = start()
    engine.generate([random_prompt(4, seed=0)], 1, fresh=True)
    engine.plant(planted_faults.STATE_FAULT)
    try:
        prompts = [prompt for chat in chats.turns for prompt in chat]
        spoilt = engine.generate(prompts, CASE.tokens, alone=True)
    finally:
        engine.plant(None)
        engine.generate([random_prompt(4, seed=0)], 1, fresh=True)
    assert [output.cached for output in spoilt] == [
        output.cached for outputs in chats.cached for output in outputs
    ]
    uncached = [output for outputs in chats.uncached for output in outputs]
    with pytest.raises(AssertionError, match=r"margins|differ"):
        assert_same_first_tokens(uncached, spoilt)


def test_the_third_prompt_with_a_common_beginning_resumes_at_its_end(
    start: Start, chats: Chats
) -> None:
    # Not at the end of a block, where a state of the first prompt may be cached too.
    beginning = random_prompt(9 * UNIT, seed=77)
    prompts = [beginning + random_prompt(100, seed=80 + i)[1:] for i in range(4)]
    outputs = start().generate(prompts, CASE.tokens, alone=True)
    assert [output.cached for output in outputs] == [0, 0, 9 * UNIT, 9 * UNIT]


def test_a_repeated_prompt_gives_the_same_bits(start: Start, chats: Chats) -> None:
    engine = start()
    prompts = [random_prompt(100 + 61 * i, seed=500 + i) for i in range(8)]
    first, again = (engine.generate(prompts, CASE.tokens, alone=True) for _ in range(2))
    assert [output.cached for output in again] == [
        (len(prompt) - 1) // UNIT * UNIT for prompt in prompts
    ]
    assert any(output.cached % chats.block for output in again)
    assert [output.tokens for output in again] == [output.tokens for output in first]
    assert [output.logprobs for output in again] == [output.logprobs for output in first]


def test_seeded_output_does_not_depend_on_chunks(start: Start) -> None:
    engine = start()
    prompts = [random_prompt(length, seed=900 + length) for length in (100, 300)]
    # A chunk ends where a state is cached, and its sample is discarded. A hit leaves one chunk.
    chunked = engine.generate(prompts, CASE.tokens, alone=True, seed=7)
    hit = engine.generate(prompts, CASE.tokens, alone=True, seed=7)
    assert [output.cached for output in chunked] == [0, 0]
    assert [output.cached for output in hit] == [UNIT, 4 * UNIT]
    assert [output.tokens for output in hit] == [output.tokens for output in chunked]
    other = engine.generate(prompts, CASE.tokens, alone=True, seed=8)
    assert [output.tokens for output in other] != [output.tokens for output in hit]
