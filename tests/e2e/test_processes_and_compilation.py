# SPDX-License-Identifier: Apache-2.0
"""Engines as `vllm serve` runs them, in processes of their own, give what one process gives."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    mixed_prompts,
    run_alone,
    settings,
)

pytestmark = pytest.mark.engine


@dataclass(frozen=True)
class Reference:
    """What an eager engine in a single process with a single thread gives."""

    case: Case
    model: Path
    prompts: list[list[int]]
    outputs: list[Output]

    def compare(self, host: EngineHost, **more: object) -> None:
        """Assert that an engine of changed settings gives the same, first and from its cache."""
        engine = host.engine(**settings(self.model, self.case, **more))
        engine.generate(self.prompts[-1:], 1)
        assert_same(engine.generate(self.prompts, self.case.tokens), self.outputs, self.case)
        cached = engine.generate(self.prompts, self.case.tokens)
        assert max(output.cached for output in cached) >= engine.started["block_size"]
        assert_same(cached, self.outputs, self.case)


@pytest.fixture(
    scope="module",
    params=[case for case in CASES if case.dtype == "float32" or case.model == "qwen3-next"],
    ids=str,
)
def reference(
    request: pytest.FixtureRequest, host: EngineHost, small_model: Callable[[str, str], Path]
) -> Reference:
    case: Case = request.param
    model = small_model(case.model, case.dtype)
    engine = host.engine(**settings(model, case))
    pool = mixed_prompts(case.candidates)
    prompts = choose_prompts(engine, case, pool, CONCURRENT, tokens=case.tokens)
    return Reference(case, model, prompts, run_alone(engine, prompts, case.tokens))


@contextmanager
def processes(folder: Path, **environment: str) -> Iterator[EngineHost]:
    host = EngineHost(folder / "log.txt", own_process=True, **environment)
    try:
        yield host
    finally:
        host.close()


def test_two_tensor_parallel_processes_give_what_one_process_gives(
    reference: Reference, tmp_path: Path
) -> None:
    if (os.cpu_count() or 1) < 2:
        pytest.skip("two processes are bound to a core each; this machine has one")
    with processes(tmp_path, VLLM_CPU_OMP_THREADS_BIND="0|1") as host:
        reference.compare(host, tensor_parallel_size=2)


def test_a_compiled_engine_gives_what_an_eager_one_gives(
    reference: Reference, tmp_path: Path
) -> None:
    # A cache of its own: what is compiled here is what is run here.
    with processes(tmp_path, VLLM_CACHE_ROOT=str(tmp_path / "cache")) as host:
        reference.compare(host, enforce_eager=False)
        assert "enforce_eager=False" in host.log.read_text()
