# SPDX-License-Identifier: Apache-2.0
"""NaN and infinity in one request's keys or values show in it, and in no other of its batch.

All layers have a k8v4 cache. vLLM's own attention for CPUs, which the first and last two layers of
such a model else have, lets a NaN of one request through to the request behind it in a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from testing.engine_host import EngineHost
from testing.faults import MARKED_TOKENS, NUMBER_FAULTS
from testing.requests import Output
from testing.workload import random_prompt

pytestmark = pytest.mark.engine

TOKENS = 6
NEIGHBOURS = [random_prompt(length, seed) for seed, length in enumerate((150, 33, 16, 97, 2, 260))]
PROMPTS = [*NEIGHBOURS[:3], random_prompt(MARKED_TOKENS + 50, seed=9), *NEIGHBOURS[3:]]
MARKED = 3


@pytest.fixture(scope="module")
def engine(host: EngineHost, small_model: Callable[[str, str], Path]) -> EngineHost:
    return host.engine(
        model=str(small_model("llama", "bfloat16")),
        dtype="bfloat16",
        kv_cache_dtype="turboquant_k8v4",
        additional_config={"hybrid_kv": {"boundary_layers": 0}},
        enforce_eager=True,
        enable_prefix_caching=True,
        max_num_seqs=16,
        # Some prompts go in two pieces, beside requests that decode.
        max_num_batched_tokens=640,
    )


@pytest.fixture(scope="module")
def clean(engine: EngineHost) -> list[Output]:
    layers = engine.layers().values()
    assert {layer["backend"].rsplit(".", 1)[1] for layer in layers} == {"K8V4AttentionBackend"}
    outputs = engine.generate(PROMPTS, TOKENS, fresh=True)
    # Else nothing could be said of bits.
    assert engine.generate(PROMPTS, TOKENS, fresh=True) == outputs
    return outputs


@pytest.mark.parametrize("fault", NUMBER_FAULTS)
def test_one_request_shows_it_and_its_neighbours_have_the_same_bits(
    engine: EngineHost, clean: list[Output], fault: str
) -> None:
    engine.plant(fault)
    try:
        spoilt = engine.generate(PROMPTS, TOKENS, fresh=True)
    finally:
        engine.plant(None)
    for i, (output, wanted) in enumerate(zip(spoilt, clean, strict=True)):
        if i != MARKED:
            assert output == wanted, f"prompt {i}"
    shown = spoilt[MARKED].logprobs
    if "NaN" in fault:
        assert all(map(math.isnan, shown)), shown
    else:
        assert shown != clean[MARKED].logprobs
        assert all(map(math.isfinite, shown))


def test_what_it_left_in_the_cache_reaches_no_later_request(
    engine: EngineHost, clean: list[Output]
) -> None:
    engine.plant("NaN value")
    engine.generate(PROMPTS, TOKENS, fresh=True)
    engine.plant(None)
    # Its pages are taken by others, and not cleared for them.
    assert engine.generate(PROMPTS, TOKENS, fresh=True) == clean
