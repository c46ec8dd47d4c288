# SPDX-License-Identifier: Apache-2.0
"""Engines of two processes, and compiled ones, give what an eager engine of one process gives.

They add the same numbers in another order. With an unquantised cache the log-probabilities of
1966 prompt tokens then move by no more than 4.2e-5 (two processes) and 5.6e-5 (compiled). With a
k8v4 cache it is 0.13 and 0.15, and the pages say why: a key that stands next to the middle between
two codes takes the other one. Of the 81,920 keys that 640 tokens leave in the first quantised
layer 6 and 4 do. Each moves what later tokens read there by far more than float32 rounds, and with
it the keys that they leave in the layers behind: there 43, 588 and 3523 keys have another code
(two processes), and 17, 599 and 4045 (compiled). The log-probabilities of tokens in front of the
first such key agree.

So three things are asked:

* The first tokens of a prompt depend on so few codes that most of them see none that changed.
  The median of their differences is below 1e-4, about twice the largest of an unquantised cache.
* Log-probabilities of generated tokens are within `APART` of each other.
* Tokens that were ahead of the second by twice as much are the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from testing.engine_host import EngineHost
from testing.requests import Output
from testing.workload import (
    DIFFERENT,
    Case,
    assert_same,
    choose_prompts,
    mixed_prompts,
    random_prompt,
    run_alone,
    settings,
)

pytestmark = pytest.mark.engine

APART = 0.25
"""Generated tokens were seen to be 0.10 apart, tokens of prompts 0.15."""

# One case, because each starts three engines, and one of them compiles.
CASES = [Case("llama", "float32", rounding=APART, tokens=3, candidates=64)]

BEGINNINGS = [random_prompt(12, seed=i) for i in range(40)]
BEGINNINGS_APART = 1e-4


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineHost]:
    folder = tmp_path_factory.mktemp("host")
    host = EngineHost(
        folder / "log.txt",
        # A cache of its own: what is compiled here is what is run here.
        VLLM_CACHE_ROOT=str(folder / "cache"),
        # Two processes of a thread each, on whatever cores there are.
        VLLM_CPU_OMP_THREADS_BIND="nobind",
    )
    yield host
    host.close()


@dataclass(frozen=True)
class Reference:
    """What an eager engine of a single process gives."""

    case: Case
    model: Path
    host: EngineHost
    prompts: list[list[int]]
    outputs: list[Output]
    beginnings: list[float]

    def engine(self, **more: object) -> EngineHost:
        """Return the host with an engine of the case's settings, changed by `more`."""
        return self.host.engine(**settings(self.model, self.case, **more))

    def compare(self, engine: EngineHost) -> None:
        """Assert that an engine gives the same, first by itself and then from its cache."""
        tokens = self.case.tokens
        assert_same(engine.generate(self.prompts, tokens, fresh=True), self.outputs, self.case)
        cached = engine.generate(self.prompts, tokens)
        assert max(output.cached for output in cached) >= engine.started["block_size"]
        assert_same(cached, self.outputs, self.case)

    def beginnings_apart(self, engine: EngineHost) -> float:
        """Return how far the log-probabilities of the first tokens of prompts are apart."""
        pairs = zip(first_log_probabilities(engine), self.beginnings, strict=True)
        return statistics.median(abs(a - b) for a, b in pairs)


def first_log_probabilities(engine: EngineHost) -> list[float]:
    outputs = engine.generate(BEGINNINGS, 1, prompt_logprobs=True)
    return [logprob for output in outputs for logprob in output.prompt_logprobs or []]


@pytest.fixture(scope="module", params=CASES, ids=str)
def reference(
    request: pytest.FixtureRequest, host: EngineHost, small_model: Callable[[str, str], Path]
) -> Reference:
    case: Case = request.param
    model = small_model(case.model, case.dtype)
    engine = host.engine(**settings(model, case))
    assert not engine.started["compiled"]
    prompts = choose_prompts(engine, case, mixed_prompts(case.candidates), 10, case.tokens)
    assert len(prompts[-1]) > 400
    outputs = run_alone(engine, prompts, case.tokens)
    return Reference(case, model, host, prompts, outputs, first_log_probabilities(engine))


@pytest.fixture(scope="module", params=["two processes", "compiled"])
def engine(request: pytest.FixtureRequest, reference: Reference) -> EngineHost:
    if request.param == "two processes":
        return reference.engine(tensor_parallel_size=2)
    engine = reference.engine(enforce_eager=False)
    assert engine.started["compiled"]
    return engine


def test_an_engine_gives_the_tokens_of_an_eager_one_in_one_process(
    engine: EngineHost, reference: Reference
) -> None:
    reference.compare(engine)


def test_the_first_tokens_of_a_prompt_have_equal_log_probabilities(
    engine: EngineHost, reference: Reference
) -> None:
    apart = reference.beginnings_apart(engine)
    print(f"{apart:.2g} apart")
    assert apart < BEGINNINGS_APART


@pytest.mark.parametrize("fault", ["heads of the neighbour", "stored too late"])
def test_these_comparisons_would_show_what_goes_wrong_in_a_process_or_a_graph(
    engine: EngineHost, reference: Reference, request: pytest.FixtureRequest, fault: str
) -> None:
    if fault == "heads of the neighbour" and "compiled" in request.node.name:
        pytest.skip("a compiled engine of one process has no neighbour")
    engine.plant(fault)
    try:
        with pytest.raises(AssertionError, match=DIFFERENT) as different:
            reference.compare(engine)
        print(different.value)
        apart = reference.beginnings_apart(engine)
        print(f"{apart:.2g} apart")
        assert apart > 10 * BEGINNINGS_APART
    finally:
        engine.plant(None)
