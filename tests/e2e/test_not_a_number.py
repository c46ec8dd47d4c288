# SPDX-License-Identifier: Apache-2.0
"""NaN and infinity in one request's keys or values affect only that request of a batch.

All layers have a k8v4 cache. Unquantised layers would use vLLM's own CPU attention, which lets a
NaN of one request reach the next request of the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from testing.engine_host import EngineHost, Output
from testing.model_cases import settings
from testing.planted_faults import MARKED_TOKENS, NUMBER_FAULTS
from testing.tokenizer import random_prompt

pytestmark = pytest.mark.engine

MARKED = 3
LENGTHS = (150, 33, 16, MARKED_TOKENS + 50, 97, 2, 260)
PROMPTS = [random_prompt(length, seed) for seed, length in enumerate(LENGTHS)]

Run = Callable[[], list[Output]]


@pytest.fixture(scope="module")
def run(host: EngineHost, small_model: Callable[..., Path]) -> Run:
    """A function that sends all prompts to an engine with an empty prefix cache."""
    # Some prompts need two chunks. The second one shares a step with decodes of other requests.
    more = {"max_num_seqs": 16, "max_num_batched_tokens": 640}
    engine = host.engine(**settings(small_model("llama"), "bfloat16", **more))
    return lambda: engine.generate(PROMPTS, 6, fresh=True)


@pytest.fixture(scope="module")
def clean(run: Run) -> list[Output]:
    outputs = run()
    # The comparisons below are exact, so equal runs must give equal outputs.
    assert run() == outputs
    return outputs


@pytest.mark.parametrize("fault", NUMBER_FAULTS)
def test_a_number_changes_one_request_and_no_later_request_that_reuses_its_pages(
    run: Run, clean: list[Output], plant: Callable[[str | None], None], fault: str
) -> None:
    plant(fault)
    spoilt = run()
    for i, (output, wanted) in enumerate(zip(spoilt, clean, strict=True)):
        assert i == MARKED or output == wanted, f"prompt {i}"
    shown = spoilt[MARKED].logprobs
    if "NaN" in fault:
        assert all(map(math.isnan, shown)), shown
    else:
        assert shown != clean[MARKED].logprobs
        assert all(map(math.isfinite, shown))
    # The new requests reuse the pages of the marked request, which still hold its NaNs.
    plant(None)
    assert run() == clean
