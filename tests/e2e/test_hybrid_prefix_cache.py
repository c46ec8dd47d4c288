# SPDX-License-Identifier: Apache-2.0
"""With the strategy `hybrid_aware`, a real engine resumes chats from cached recurrent states.

The last tests use an engine whose KV cache holds one request, and a host tier.
"""

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
MIB = 1 << 20
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
    model: Path

    @property
    def ends(self) -> list[int]:
        """The hits in tokens if each prompt resumes where the previous prompt of the chat ended."""
        ends = [(len(prompt) - 1) // UNIT * UNIT for prompt in self.prompts[:-CHATS]]
        return [0] * CHATS + ends

    def with_tier(self, size: int = 200 * MIB, blocks: int = 40) -> EngineHost:
        """Start an engine with a small KV cache and a host tier of `size` bytes.

        By default, the KV cache holds little more than the longest request.
        """
        transfer = {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"cpu_bytes_to_use": size},
        }
        return self.engine.engine(
            **settings(
                self.model,
                CASE.dtype,
                additional_config=POLICY,
                num_gpu_blocks_override=blocks,
                kv_transfer_config=transfer,
            )
        )

    def differences(self, outputs: list[Output]) -> list[str]:
        """Compare the first token of each output with the one computed without a prefix cache.

        Hits end at multiples of 64 tokens, where Gated DeltaNet cuts a prompt anyway. So hits only
        change the shapes of matrix products, and thus rounding. If a token leads by more than
        rounding can change, both tokens must be equal. The first turn, without hits, is left out.
        """
        pairs = list(zip(self.uncached, outputs, strict=True))[CHATS:]
        equal = [(a, b) for a, b in pairs if a.tokens[0] == b.tokens[0]]
        apart = statistics.fmean([abs(a.logprobs[0] - b.logprobs[0]) for a, b in equal] or [0.0])
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
    return Chats(prompts, uncached, cached, engine, model)


def test_a_turn_resumes_where_the_previous_prompt_ended(chats: Chats) -> None:
    counts = [output.cached for output in chats.cached]
    assert counts == chats.ends
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


def test_a_turn_resumes_from_host_memory_if_the_kv_cache_is_too_small(chats: Chats) -> None:
    engine = chats.with_tier()
    outputs = engine.generate(chats.prompts, CASE.tokens, alone=True)
    assert [output.cached for output in outputs] == chats.ends
    assert chats.differences(outputs) == []
    metrics = engine.metrics()
    from_device, from_host = (
        metrics[f"vllm:{tier}prefix_cache_hits"] for tier in ("", "external_")
    )
    assert from_host > 0.9 * sum(chats.ends) > from_device
    assert from_device + from_host == sum(chats.ends)


def test_a_block_that_is_not_loaded_is_detected(chats: Chats, plant: Callable[[str], None]) -> None:
    engine = chats.with_tier()
    plant(planted_faults.LOAD_FAULT)
    assert chats.differences(engine.generate(chats.prompts, CASE.tokens, alone=True))


def test_requests_at_the_same_time_resume_from_host_memory(chats: Chats) -> None:
    engine = chats.with_tier()
    outputs = engine.generate(chats.prompts, CASE.tokens)
    assert sum(output.cached for output in outputs) > 0
    assert chats.differences(outputs) == []


def test_an_answer_is_resumed_from_host_memory(chats: Chats) -> None:
    # Copies of the states of decoding requests may take one block in 32.
    engine = chats.with_tier(blocks=100)
    prompts = [random_prompt(200 + 30 * i, seed=700 + i) for i in range(4)]
    answers = engine.generate(prompts, 150, alone=True)
    engine.generate(chats.prompts[-CHATS:], 1, alone=True)
    turns = [
        [*prompt, *answer.tokens, 5, 6, 7] for prompt, answer in zip(prompts, answers, strict=True)
    ]
    # The engine copies the state of a decoding request at multiples of 64 tokens.
    ends = [(len(prompt) + 149) // UNIT * UNIT for prompt in prompts]
    before = engine.metrics()["vllm:external_prefix_cache_hits"]
    outputs = engine.generate(turns, CASE.tokens, alone=True)
    assert [output.cached for output in outputs] == ends
    assert engine.metrics()["vllm:external_prefix_cache_hits"] - before == sum(ends)


def test_a_full_host_tier_evicts_checkpoints_and_keeps_answers_correct(chats: Chats) -> None:
    engine = chats.with_tier(6 * MIB)
    outputs = engine.generate(chats.prompts, CASE.tokens, alone=True)
    assert 0 < sum(output.cached for output in outputs) < sum(chats.ends)
    assert chats.differences(outputs) == []
