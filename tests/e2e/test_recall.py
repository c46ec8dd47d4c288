# SPDX-License-Identifier: Apache-2.0
"""Trained models recall as well from k8v4 pages as from an unquantised cache.

Models with random weights show whether outputs change; trained models show whether that matters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from testing import model_cases
from testing.engine_host import EngineHost, Output
from testing.planted_faults import FAULTS
from testing.recall_sequences import ANSWER, COPY, Sequence, copy_sequence, recall_sequence

pytestmark = pytest.mark.engine

MODELS = Path(__file__).parents[1] / "recall" / "models"

RECALL = 0.99
"""The share of correct answers that the models must reach with an unquantised cache."""
WORSE = 0.005
"""How much lower the share of correct answers may be with k8v4, at each distance and depth."""
LESS_SURE = 0.003
"""How much higher the mean negative log-probability of correct answers may be with k8v4."""
ENOUGH = 200
"""Distances and depths with fewer questions are not compared: one answer of 200 is 0.5 %."""

DIFFERENT = "recalls"
"""Matches the message about an engine that recalls worse."""

LENGTHS = (*[2000] * 4, *[700] * 4, *[200] * 8)
COPIED = 24
"""How many tokens to decode after each prompt that ends inside a copy."""


DISTANCES = (128, 512, 1024, 2048)
"""Questions are grouped by how many tokens back their answer is: at most 128, at most 512, ..."""
DEPTHS = 4
"""The tokens before the first question are divided into this many equal parts."""

Place = tuple[int, int]
"""Where an answer's source is: an entry of `DISTANCES`, and the index of one of `DEPTHS` parts."""


@dataclass
class Tally:
    """Counts questions and correct answers by place, and adds up negative log-probabilities."""

    asked: Counter[Place] = field(default_factory=Counter)
    right: Counter[Place] = field(default_factory=Counter)
    surprise: float = 0.0

    @property
    def share(self) -> float:
        """The share of correct answers over all places."""
        return self.right.total() / self.asked.total()

    @property
    def loss(self) -> float:
        """The mean negative log-probability of the correct answers."""
        return self.surprise / self.asked.total()


def place(index: int, source: int, first: int) -> Place:
    """Return the place of the question at `index`; the first question is at `first`."""
    distance = next(band for band in DISTANCES if index - source <= band)
    return distance, int(source) * DEPTHS // int(first)


def sheets(seed: int, lengths: Iterable[int]) -> list[Sequence]:
    """Draw recall sequences without text. Questions ask for about two thirds of the pairs."""
    draw = np.random.default_rng(seed)
    return [recall_sequence(draw, length, 0.0, length // 5) for length in lengths]


def count_answers(sequences: list[Sequence], outputs: list[Output]) -> Tally:
    """Count questions; an answer is correct if it was the most probable token at its place."""
    tally = Tally()
    for sequence, output in zip(sequences, outputs, strict=True):
        ranks, logprobs = output.prompt_ranks or [], output.prompt_logprobs or []
        answers = np.flatnonzero(sequence.kinds == ANSWER)
        for index in answers:
            where = place(index, sequence.sources[index], answers[0])
            tally.asked[where] += 1
            tally.right[where] += ranks[index - 1] == 1
            tally.surprise -= logprobs[index - 1]
    return tally


def copies(seed: int, lengths: Iterable[int]) -> tuple[list[list[int]], list[list[int]]]:
    """Return prompts that end one symbol after `COPY`, and the correct tokens after each prompt."""
    draw = np.random.default_rng(seed)
    drawn = [copy_sequence(draw, length, 0.0).tokens.tolist() for length in lengths]
    cuts = [tokens.index(COPY) + 2 for tokens in drawn]
    pairs = list(zip(drawn, cuts, strict=True))
    return [tokens[:cut] for tokens, cut in pairs], [tokens[cut:] for tokens, cut in pairs]


ALL_SHEETS = sheets(1, [2000] * 8 + [1200] * 6 + [600] * 8 + [160] * 40)
FEW_SHEETS = sheets(2, [2000] * 3 + [600] * 3 + [160] * 10)


def settings(shape: str, **more: Any) -> dict[str, Any]:
    """Return the arguments of an engine with a k8v4 cache, with `more` added or replaced."""
    return model_cases.settings(MODELS / shape, "bfloat16", **more)


@dataclass(frozen=True)
class Plain:
    """How well a model recalls with an unquantised cache, and the host for its k8v4 engines."""

    shape: str
    host: EngineHost
    tally: Tally
    few: Tally
    copied: float

    def engine(self, **more: Any) -> EngineHost:
        """Start an engine with a k8v4 cache in the host, and return the host."""
        return self.host.engine(**settings(self.shape, **more))


def answer(engine: EngineHost, asked: list[Sequence]) -> Tally:
    """Let the engine answer the questions of the sequences, and count the correct answers."""
    prompts = [sheet.tokens.tolist() for sheet in asked]
    return count_answers(asked, engine.generate(prompts, 1, prompt_logprobs=True))


def copied_share(
    engine: EngineHost, lengths: Iterable[int] = LENGTHS, tokens: int = COPIED, **how: bool
) -> float:
    """Return the share of tokens that the engine copies correctly from its prompts."""
    prompts, wanted = copies(3, lengths)
    outputs = engine.generate(prompts, tokens, **how)
    pairs = [
        token == right
        for output, of_prompt in zip(outputs, wanted, strict=True)
        for token, right in zip(output.tokens, of_prompt, strict=False)
    ]
    print(f"copied {sum(pairs)} of {len(pairs)}")
    return sum(pairs) / len(pairs)


def assert_as_good(tally: Tally, plain: Tally) -> None:
    """Assert that recall is about as good as `plain`, in total and at each distance and depth."""
    print(f"{tally.share:.2%}, loss {tally.loss:.4f}")
    assert tally.share >= plain.share - WORSE, f"recalls {tally.share:.2%}, not {plain.share:.2%}"
    assert tally.loss <= plain.loss + LESS_SURE, (
        f"recalls with a loss of {tally.loss:.4f}, not {plain.loss:.4f}"
    )
    for place, asked in plain.asked.items():
        if asked >= ENOUGH:
            assert tally.right[place] >= plain.right[place] - WORSE * asked, (
                f"recalls less at {place}"
            )


@pytest.fixture(scope="module", params=["gemma3", "qwen3-next"])
def plain(request: pytest.FixtureRequest, host: EngineHost) -> Plain:
    shape: str = request.param
    engine = host.engine(**settings(shape, kv_cache_dtype="auto"))
    tally = answer(engine, ALL_SHEETS)
    return Plain(shape, host, tally, answer(engine, FEW_SHEETS), copied_share(engine))


@pytest.mark.both_minors
def test_the_model_recalls_and_copies_with_an_unquantised_cache(plain: Plain) -> None:
    assert plain.tally.share >= RECALL
    assert plain.copied >= RECALL
    few = {place: asked for place, asked in plain.tally.asked.items() if asked < ENOUGH}
    # Only the longest prompts have sources in the last quarter that are over 1,024 tokens back.
    assert set(few) <= {(2048, 3)}


@pytest.mark.both_minors
def test_k8v4_recalls_at_every_distance_and_depth(plain: Plain) -> None:
    assert_as_good(answer(plain.engine(), ALL_SHEETS), plain.tally)


@pytest.mark.both_minors
def test_k8v4_copies_token_by_token_in_a_mixed_batch_and_from_the_prefix_cache(
    plain: Plain,
) -> None:
    engine = plain.engine()
    assert copied_share(engine, fresh=True) >= plain.copied - WORSE
    before = engine.metrics()["vllm:prefix_cache_hits"]
    assert copied_share(engine) >= plain.copied - WORSE
    assert engine.metrics()["vllm:prefix_cache_hits"] > before


def test_k8v4_copies_token_by_token_from_host_memory(plain: Plain) -> None:
    transfer = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": 200 << 20},
    }
    plan = plain.engine().plan()
    # The KV cache holds two of the longest requests, and so a part of the prompts.
    blocks = int(2 * plan["blocks"] / plan["reported_concurrency"]) + 1
    engine = plain.engine(num_gpu_blocks_override=blocks, kv_transfer_config=transfer)
    copied_share(engine, fresh=True)
    before = engine.metrics()["vllm:external_prefix_cache_hits"]
    assert copied_share(engine) >= plain.copied - WORSE
    prompts, _ = copies(3, LENGTHS)
    hits = engine.metrics()["vllm:external_prefix_cache_hits"] - before
    assert hits > 0.25 * sum(map(len, prompts))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_page_that_is_stored_wrongly_is_detected(
    plain: Plain, plant: Callable[[str], None], fault: str
) -> None:
    engine = plain.engine()
    plant(fault)
    with pytest.raises(AssertionError, match=DIFFERENT):
        assert_as_good(answer(engine, FEW_SHEETS), plain.few)


@pytest.mark.long
def test_k8v4_copies_the_same_after_preemption(plain: Plain) -> None:
    lengths, tokens = [2000] * 8, 500
    # A layer with a window holds a chunk and the window in prefill, but only the window in decode.
    # With long chunks, decode would need fewer blocks, so no request would be preempted.
    chunks = {"max_num_batched_tokens": 64} if plain.shape == "gemma3" else {}
    engine = plain.engine(**chunks)
    # The model may make mistakes in long copies even without preemption, so count these first.
    expected = copied_share(engine, lengths, tokens, fresh=True)
    plan = engine.plan()
    # These blocks hold two of the prompts, but not both answers.
    longest = {"gemma3": 1.2, "qwen3-next": 2.0}[plain.shape]
    blocks = int(longest * plan["blocks"] / plan["reported_concurrency"]) + 1
    engine = plain.engine(**chunks, num_gpu_blocks_override=blocks)
    assert copied_share(engine, lengths, tokens, fresh=True) >= expected - WORSE
    assert engine.metrics()["vllm:num_preemptions"] > 0
