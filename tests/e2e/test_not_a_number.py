# SPDX-License-Identifier: Apache-2.0
"""NaN and infinity in one request's keys or values affect only that request of a batch.

All layers have a k8v4 cache. Otherwise the first and last two layers would have vLLM's own
attention for CPUs, which lets a NaN of one request through to the next request of the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from testing.engine_host import EngineHost
from testing.engine_requests import Output
from testing.model_cases import settings
from testing.planted_faults import MARKED_TOKENS, NUMBER_FAULTS
from testing.tokenizer import random_prompt

pytestmark = pytest.mark.engine

TOKENS = 6
NEIGHBOURS = [random_prompt(length, seed) for seed, length in enumerate((150, 33, 16, 97, 2, 260))]
PROMPTS = [*NEIGHBOURS[:3], random_prompt(MARKED_TOKENS + 50, seed=9), *NEIGHBOURS[3:]]
MARKED = 3


@pytest.fixture(scope="module")
def engine(host: EngineHost, small_model: Callable[..., Path]) -> EngineHost:
    # Some prompts are cut in two, and their second chunk runs with decodes of others.
    more = {"max_num_seqs": 16, "max_num_batched_tokens": 640}
    quantise_all = {"hybrid_kv": {"boundary_layers": 0}}
    return host.engine(
        **settings(small_model("llama"), "bfloat16", additional_config=quantise_all, **more)
    )


@pytest.fixture(scope="module")
def clean(engine: EngineHost) -> list[Output]:
    layers = engine.layers().values()
    assert {layer["backend"].rsplit(".", 1)[1] for layer in layers} == {"K8V4AttentionBackend"}
    outputs = engine.generate(PROMPTS, TOKENS, fresh=True)
    # The comparison of bits below needs an engine that repeats them.
    assert engine.generate(PROMPTS, TOKENS, fresh=True) == outputs
    return outputs


@pytest.mark.parametrize("fault", NUMBER_FAULTS)
def test_one_request_shows_the_number_and_the_others_keep_their_bits(
    engine: EngineHost, clean: list[Output], plant: Callable[[str], None], fault: str
) -> None:
    plant(fault)
    spoilt = engine.generate(PROMPTS, TOKENS, fresh=True)
    for i, (output, wanted) in enumerate(zip(spoilt, clean, strict=True)):
        if i != MARKED:
            assert output == wanted, f"prompt {i}"
    shown = spoilt[MARKED].logprobs
    if "NaN" in fault:
        assert all(map(math.isnan, shown)), shown
    else:
        assert shown != clean[MARKED].logprobs
        assert all(map(math.isfinite, shown))


def test_later_requests_do_not_see_what_it_left_in_its_pages(
    engine: EngineHost, clean: list[Output], plant: Callable[[str | None], None]
) -> None:
    plant("NaN value")
    engine.generate(PROMPTS, TOKENS, fresh=True)
    plant(None)
    # Its pages are reused without being cleared.
    assert engine.generate(PROMPTS, TOKENS, fresh=True) == clean
