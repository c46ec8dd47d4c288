# SPDX-License-Identifier: Apache-2.0
"""Greedy output depends on the prompt alone: not on caching, chunks, company or speculation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from engine_host import EngineHost, Output
from workload import (
    CASES,
    CONCURRENT,
    Case,
    assert_same,
    choose_prompts,
    decisive,
    mixed_prompts,
    random_prompt,
    run_alone,
    settings,
)

pytestmark = pytest.mark.engine


@dataclass(frozen=True)
class Reference:
    """What one engine gives for each prompt alone, computed from the first token on."""

    case: Case
    model: Path
    host: EngineHost
    prompts: list[list[int]]
    outputs: list[Output]

    def engine(self, **more: object) -> EngineHost:
        """Return the host with an engine of the case's settings, changed by `more`."""
        return self.host.engine(**settings(self.model, self.case, **more))


# float32 compares most sharply: bf16 moves log-probabilities by more than many choices are apart.
@pytest.fixture(
    scope="module",
    params=[case for case in CASES if (case.model, case.dtype) == ("llama", "float32")],
    ids=str,
)
def reference(
    request: pytest.FixtureRequest, host: EngineHost, small_model: Callable[[str, str], Path]
) -> Reference:
    case: Case = request.param
    model = small_model(case.model, case.dtype)
    engine = host.engine(**settings(model, case))
    prompts = choose_prompts(
        engine, case, mixed_prompts(case.candidates), CONCURRENT, tokens=case.tokens
    )
    outputs = run_alone(engine, prompts, case.tokens)
    assert len({tuple(output.tokens) for output in outputs}) > CONCURRENT // 2
    return Reference(case, model, host, prompts, outputs)


def test_a_prompt_gives_the_same_tokens_when_its_pages_come_from_the_prefix_cache(
    reference: Reference,
) -> None:
    engine = reference.engine()
    block = engine.started["block_size"]
    cacheable = [i for i, prompt in enumerate(reference.prompts) if len(prompt) > block]
    assert len(cacheable) >= 5
    prompts = [reference.prompts[i] for i in cacheable]
    engine.generate(prompts, reference.case.tokens, fresh=True)
    outputs = engine.generate(prompts, reference.case.tokens, alone=True)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.cached >= (len(prompt) - 1) // block * block > 0
    assert_same(outputs, [reference.outputs[i] for i in cacheable], reference.case)


def test_pages_left_by_another_prompt_with_the_same_beginning_give_the_same_tokens(
    reference: Reference,
) -> None:
    engine = reference.engine()
    beginning = random_prompt(512, seed=11)
    pool = [
        beginning + random_prompt(40 + i, seed=100 + i) for i in range(reference.case.candidates)
    ]
    prompts = choose_prompts(engine, reference.case, pool, 4, tokens=reference.case.tokens)
    expected = run_alone(engine, prompts, reference.case.tokens)
    engine.generate([[*beginning, 7, 8, 9]], 1, fresh=True)
    outputs = engine.generate(prompts, reference.case.tokens, alone=True)
    assert all(output.cached >= 256 for output in outputs)
    assert_same(outputs, expected, reference.case)


def test_twenty_requests_of_mixed_lengths_at_once_give_what_each_gives_alone(
    reference: Reference,
) -> None:
    engine = reference.engine()
    lengths = sorted(map(len, reference.prompts))
    assert len(lengths) == CONCURRENT
    assert lengths[0] < 64
    assert lengths[-1] > 400
    outputs = engine.generate(reference.prompts, reference.case.tokens, fresh=True)
    assert_same(outputs, reference.outputs, reference.case)


@pytest.mark.parametrize("chunk", [96, 32])
def test_output_does_not_depend_on_the_chunks_a_prompt_is_cut_into(
    reference: Reference, chunk: int
) -> None:
    engine = reference.engine(max_num_batched_tokens=chunk)
    fresh = run_alone(engine, reference.prompts, reference.case.tokens)
    assert_same(fresh, reference.outputs, reference.case)
    # All at once, chunks of several prompts share a step with other prompts' decodes.
    engine.generate(reference.prompts, 1, fresh=True)
    cached = engine.generate(reference.prompts, reference.case.tokens)
    assert max(output.cached for output in cached) >= engine.started["block_size"]
    assert_same(cached, reference.outputs, reference.case)


def test_ngram_speculation_gives_what_decoding_without_it_gives(reference: Reference) -> None:
    case, tokens = reference.case, 4 * reference.case.tokens
    # A short text over and over: its continuation is proposed, and often enough it is right.
    pool = [random_prompt(6 + i % 5, seed=i)[1:] * (8 + i % 40) for i in range(case.candidates)]
    without = reference.engine().generate(pool, tokens, fresh=True)
    chosen = decisive(without, case)
    assert len(chosen) >= 4, f"{len(chosen)} prompts are decisive"
    chosen = chosen[:CONCURRENT]
    expected = [without[i] for i in chosen]
    prompts = [pool[i] for i in chosen]
    engine = reference.engine(
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 3,
        }
    )
    assert_same(engine.generate(prompts, tokens), expected, case)
    assert_same(engine.generate(prompts, tokens, alone=True), expected, case)
    metrics = engine.metrics()
    drafted = metrics["vllm:spec_decode_num_draft_tokens"]
    accepted = metrics["vllm:spec_decode_num_accepted_tokens"]
    assert drafted > accepted > len(prompts)
