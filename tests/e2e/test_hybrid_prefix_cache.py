# SPDX-License-Identifier: Apache-2.0
"""A hybrid model in a real engine with the policy `hybrid_aware`: chats that reuse states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from testing import faults
from testing.engine_host import EngineHost
from testing.requests import Output
from testing.workload import CASES, Case, random_prompt, settings

pytestmark = [pytest.mark.engine, pytest.mark.both_minors]

UNIT = 64
TURNS = 6
CHATS = 12
POLICY = {"hybrid_kv": {"coordinator": "hybrid_aware", "prefix_match_unit": "auto"}}


@dataclass(frozen=True)
class Chats:
    """Chats whose every turn is the one before, its answer and something new.

    Attributes:
        turns: The prompts, by chat and turn.
        uncached: What an engine without a prefix cache gives for each.
        cached: What the engine with our policy gives, one after the other, all chats' first
            turns first.
        block: Tokens of a block.
    """

    turns: list[list[list[int]]]
    uncached: list[list[Output]]
    cached: list[list[Output]]
    block: int


@pytest.fixture(scope="module")
def case() -> Case:
    return next(case for case in CASES if case.model == "qwen3-next")


@pytest.fixture(scope="module")
def model(case: Case, small_model: Callable[[str, str], Path]) -> Path:
    return small_model(case.model, case.dtype)


@pytest.fixture(scope="module")
def chats(host: EngineHost, case: Case, model: Path) -> Chats:
    engine = host.engine(**settings(model, case, enable_prefix_caching=False))
    turns: list[list[list[int]]] = [[random_prompt(90 + 7 * i, seed=i)] for i in range(CHATS)]
    uncached: list[list[Output]] = [[] for _ in turns]
    for turn in range(TURNS):
        outputs = engine.generate([chat[-1] for chat in turns], case.tokens, alone=True)
        for i, (chat, output) in enumerate(zip(turns, outputs, strict=True)):
            uncached[i].append(output)
            if turn + 1 < TURNS:
                more = random_prompt(60 + 11 * i, seed=1000 * (turn + 1) + i)
                chat.append(chat[-1] + output.tokens + more[1:])
    engine = host.engine(**settings(model, case, additional_config=POLICY))
    cached: list[list[Output]] = [[] for _ in turns]
    for turn in range(TURNS):
        outputs = engine.generate([chat[turn] for chat in turns], case.tokens, alone=True)
        for chat_outputs, output in zip(cached, outputs, strict=True):
            chat_outputs.append(output)
    return Chats(turns, uncached, cached, engine.started["block_size"])


def test_a_turn_resumes_where_the_prompt_before_it_ended(chats: Chats) -> None:
    for prompts, outputs in zip(chats.turns, chats.cached, strict=True):
        assert outputs[0].cached == 0
        for before, output in zip(prompts, outputs[1:], strict=False):
            assert output.cached == (len(before) - 1) // UNIT * UNIT


def test_cached_tokens_grow_turn_by_turn_across_blocks(chats: Chats) -> None:
    for outputs in chats.cached:
        counts = [output.cached for output in outputs]
        assert counts == sorted(set(counts))
    assert any(0 < outputs[1].cached < chats.block for outputs in chats.cached)
    assert any(outputs[-1].cached > chats.block for outputs in chats.cached)


def first_tokens(uncached: list[Output], cached: list[Output], case: Case) -> None:
    """Assert that answers begin alike.

    Prompts resume at multiples of 64 tokens, where Gated DeltaNet cuts a prompt anyway: the states
    that it goes on from are the same but for the shapes of the matrices that were multiplied.
    Where the best token is ahead of the second by more than that it must be the same.
    """
    assert case.farthest is not None
    pairs = list(zip(uncached, cached, strict=True))
    sure = [pair for pair in pairs if pair[0].margins[0] > 2 * case.farthest]
    assert len(sure) >= 5
    for without, with_cache in sure:
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


def test_answers_do_not_depend_on_what_came_from_the_cache(chats: Chats, case: Case) -> None:
    uncached = [output for outputs in chats.uncached for output in outputs[1:]]
    cached = [output for outputs in chats.cached for output in outputs[1:]]
    first_tokens(uncached, cached, case)


def test_a_state_that_is_not_copied_would_show(
    host: EngineHost, case: Case, model: Path, chats: Chats
) -> None:
    engine = host.engine(**settings(model, case, additional_config=POLICY))
    engine.generate([random_prompt(4, seed=0)], 1, fresh=True)
    host.plant(faults.STATE_FAULT)
    try:
        prompts = [prompt for chat in chats.turns for prompt in chat]
        spoilt = engine.generate(prompts, case.tokens, alone=True)
    finally:
        host.plant(None)
        engine.generate([random_prompt(4, seed=0)], 1, fresh=True)
    assert [output.cached for output in spoilt] == [
        output.cached for outputs in chats.cached for output in outputs
    ]
    uncached = [output for outputs in chats.uncached for output in outputs]
    with pytest.raises(AssertionError, match=r"margins|differ"):
        first_tokens(uncached, spoilt, case)


def test_the_third_prompt_with_a_common_beginning_resumes_at_its_end(
    host: EngineHost, case: Case, model: Path, chats: Chats
) -> None:
    engine = host.engine(**settings(model, case, additional_config=POLICY))
    # Not at the end of a block, where a state of the first prompt may be kept, too.
    beginning = random_prompt(9 * UNIT, seed=77)
    prompts = [beginning + random_prompt(100, seed=80 + i)[1:] for i in range(4)]
    outputs = engine.generate(prompts, case.tokens, alone=True)
    assert [output.cached for output in outputs] == [0, 0, 9 * UNIT, 9 * UNIT]


def test_a_prompt_sent_again_gives_the_same_to_the_last_bit(
    host: EngineHost, case: Case, model: Path, chats: Chats
) -> None:
    engine = host.engine(**settings(model, case, additional_config=POLICY))
    prompts = [random_prompt(100 + 61 * i, seed=500 + i) for i in range(8)]
    first, again = (engine.generate(prompts, case.tokens, alone=True) for _ in range(2))
    assert [output.cached for output in again] == [
        (len(prompt) - 1) // UNIT * UNIT for prompt in prompts
    ]
    assert any(output.cached % chats.block for output in again)
    assert [output.tokens for output in again] == [output.tokens for output in first]
    assert [output.logprobs for output in again] == [output.logprobs for output in first]


def test_a_seeded_request_survives_chunks_and_does_not_depend_on_them(
    host: EngineHost, case: Case, model: Path
) -> None:
    engine = host.engine(**settings(model, case, additional_config=POLICY))
    prompts = [random_prompt(length, seed=900 + length) for length in (100, 300)]
    # A chunk ends where a state is kept, and its sample is discarded. A hit leaves one chunk.
    chunked = engine.generate(prompts, case.tokens, alone=True, seed=7)
    hit = engine.generate(prompts, case.tokens, alone=True, seed=7)
    assert [output.cached for output in chunked] == [0, 0]
    assert [output.cached for output in hit] == [UNIT, 4 * UNIT]
    assert [output.tokens for output in hit] == [output.tokens for output in chunked]
    other = engine.generate(prompts, case.tokens, alone=True, seed=8)
    assert [output.tokens for output in other] != [output.tokens for output in hit]
