# SPDX-License-Identifier: Apache-2.0
"""An engine of two processes and a compiled engine give the output of an eager single process.

These engines add the same numbers in another order. With an unquantised cache, the order moves the
log-probabilities of 1966 prompt tokens by at most 4.2e-5 (two processes) and 5.6e-5 (compiled).
With a k8v4 cache it moves them by 0.13 and 0.15, because a key close to the middle between two
codes can get the other code. In the first quantised layer this happens to 6 (two processes) and 4
(compiled) of 81,920 keys, in the fourth to over 3,500. Tokens before the first changed key agree.
Hence three checks:

* Most of the first tokens of prompts see no changed code. The median difference of their
  log-probabilities is below 1e-4, twice the largest difference with an unquantised cache.
* Log-probabilities of generated tokens are within `APART` of each other.
* Tokens that lead by more than twice `APART` are the same.

The engine of two processes has a small KV cache and a host tier, from which it takes its hits.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from testing.engine_host import EngineHost, Output
from testing.model_cases import (
    DIFFERENT,
    Case,
    assert_same,
    choose_prompts,
    run_alone,
    settings,
)
from testing.output_comparison import Bounds
from testing.tokenizer import mixed_prompts, random_prompt

pytestmark = pytest.mark.engine

APART = 0.25
"""How far log-probabilities may differ. Measured: up to 0.10 for generated tokens, and 0.15 for
prompt tokens."""

# There is only one case, because its tests start three engines, one of which compiles.
CASE = Case("llama", "float32", Bounds(APART), tokens=3, candidates=64)

HOST_TIER = {
    "num_gpu_blocks_override": 20,
    "kv_transfer_config": {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": 200 << 20},
    },
}
"""A KV cache for little more than the longest request, and 100 MiB of host memory per process."""

BEGINNINGS = [random_prompt(12, seed=i) for i in range(40)]
BEGINNINGS_APART = 1e-4


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineHost]:
    folder = tmp_path_factory.mktemp("host")
    host = EngineHost(
        folder / "log.txt",
        # With an empty cache folder, the engine has to compile in this test.
        VLLM_CACHE_ROOT=str(folder / "cache"),
        # The two processes, with one thread each, may share a core.
        VLLM_CPU_OMP_THREADS_BIND="nobind",
    )
    yield host
    host.close()


def first_log_probabilities(engine: EngineHost) -> list[float]:
    outputs = engine.generate(BEGINNINGS, 1, prompt_logprobs=True)
    return [logprob for output in outputs for logprob in output.prompt_logprobs or []]


@dataclass(frozen=True)
class Runs:
    """The engine to test, and the outputs that an eager engine of one process gave."""

    engine: EngineHost
    prompts: list[list[int]]
    outputs: list[Output]
    beginnings: list[float]

    def compare(self) -> None:
        """Assert that the engine gives these outputs, both without and with its prefix cache."""
        outputs = self.engine.generate(self.prompts, CASE.tokens, fresh=True)
        assert_same(outputs, self.outputs, CASE)
        cached = self.engine.generate(self.prompts, CASE.tokens)
        assert max(output.cached for output in cached) >= self.engine.started["block_size"]
        assert_same(cached, self.outputs, CASE)

    def beginnings_apart(self) -> float:
        """Return the median difference of log-probabilities of the first tokens of prompts."""
        pairs = zip(first_log_probabilities(self.engine), self.beginnings, strict=True)
        apart = statistics.median(abs(a - b) for a, b in pairs)
        print(f"{apart:.2g} apart")
        return apart


@pytest.fixture(scope="module")
def reference(host: EngineHost, small_model: Callable[..., Path]) -> Runs:
    engine = host.engine(**settings(small_model(CASE.model, CASE.dtype), CASE.dtype))
    assert not engine.started["compiled"]
    prompts = choose_prompts(engine, CASE, mixed_prompts(CASE.candidates), 10, CASE.tokens)
    assert len(prompts[-1]) > 400
    outputs = run_alone(engine, prompts, CASE.tokens)
    return Runs(engine, prompts, outputs, first_log_probabilities(engine))


@pytest.fixture(
    scope="module",
    params=[{"tensor_parallel_size": 2, **HOST_TIER}, {"enforce_eager": False}],
    ids=["two processes", "compiled"],
)
def runs(request: pytest.FixtureRequest, reference: Runs, small_model: Callable[..., Path]) -> Runs:
    """Start the engine to test in the host of the reference engine."""
    model = small_model(CASE.model, CASE.dtype)
    engine = reference.engine.engine(**settings(model, CASE.dtype, **request.param))
    assert engine.started["compiled"] == ("enforce_eager" in request.param)
    return reference


def test_output_is_that_of_an_eager_engine_in_one_process(runs: Runs) -> None:
    runs.compare()
    assert runs.beginnings_apart() < BEGINNINGS_APART


def test_hits_of_two_processes_come_from_host_memory(runs: Runs) -> None:
    if runs.engine.started["compiled"]:
        pytest.skip("the compiled engine has no host tier")
    metric = "vllm:external_prefix_cache_hits"
    before = runs.engine.metrics()[metric]
    runs.compare()
    assert runs.engine.metrics()[metric] - before >= 4 * runs.engine.started["block_size"]


@pytest.mark.parametrize("fault", ["heads of the neighbour", "stored too late"])
def test_a_fault_in_a_process_or_a_graph_is_detected(
    runs: Runs, plant: Callable[[str], None], fault: str
) -> None:
    if fault == "heads of the neighbour" and runs.engine.started["compiled"]:
        pytest.skip("a compiled engine of one process has no neighbour")
    plant(fault)
    with pytest.raises(AssertionError, match=DIFFERENT):
        runs.compare()
    assert runs.beginnings_apart() > 10 * BEGINNINGS_APART
