# SPDX-License-Identifier: Apache-2.0
"""`vllm serve --data-parallel-size 2`: either engine gives what an engine alone gives."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from testing.engine_host import EngineHost
from testing.server import Server, serve
from testing.workload import CASES, Case, random_prompt, settings

pytestmark = [pytest.mark.engine, pytest.mark.long]

PROMPTS = [random_prompt(length, seed=length) for length in range(40, 680, 40)]
TOKENS = 6


@pytest.fixture(scope="module")
def case() -> Case:
    return next(case for case in CASES if case.model == "llama")


@pytest.fixture(scope="module")
def server(
    case: Case, small_model: Callable[[str, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    arguments = ["--data-parallel-size", "2", "--api-server-count", "1"]
    arguments += ["--served-model-name", "small"]
    arguments += ["--kv-cache-dtype", "turboquant_k8v4", "--dtype", case.dtype]
    arguments += ["--max-model-len", "2048", "--gpu-memory-utilization", "0.3", "--enforce-eager"]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with pytest.MonkeyPatch.context() as patch:
        # Four processes import vLLM at once.
        patch.setattr("testing.server.START_TIMEOUT_S", 900.0)
        # A thread each, on whatever cores there are.
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        model = small_model(case.model, case.dtype)
        with serve(model, arguments, log, Console(quiet=True)) as (server, _):
            yield server


def ask(server: Server, prompt: list[int]) -> list[int]:
    body = {
        "model": "small",
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0.0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300.0)
    answer.raise_for_status()
    tokens: list[int] = answer.json()["choices"][0]["token_ids"]
    return tokens


def finished(server: Server) -> dict[str, float]:
    """Requests that each engine has finished."""
    metrics = httpx.get(f"{server.url}/metrics", timeout=60.0).text
    counts: dict[str, float] = {}
    for engine, count in re.findall(
        r'^vllm:request_success_total\{[^}]*engine="(\d+)"[^}]*\} (\S+)$', metrics, re.MULTILINE
    ):
        counts[engine] = counts.get(engine, 0.0) + float(count)
    return counts


def test_both_engines_answer_and_as_an_engine_alone_does(
    server, host: EngineHost, case, small_model
):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda prompt: ask(server, prompt), PROMPTS))
    counts = finished(server)
    assert set(counts) == {"0", "1"}
    assert sum(counts.values()) == len(PROMPTS)
    assert min(counts.values()) > 0

    alone = host.engine(**settings(small_model(case.model, case.dtype), case))
    compared = 0
    for answer, wanted in zip(
        answers, alone.generate(PROMPTS, TOKENS, alone=True, fresh=True), strict=True
    ):
        close = [margin <= 2 * case.rounding for margin in wanted.margins]
        count = close.index(True) if True in close else len(close)
        assert answer[:count] == wanted.tokens[:count]
        compared += count
    assert compared >= len(PROMPTS) * TOKENS // 2


def test_every_process_says_that_the_plugin_is_active(server):
    active = re.findall(r"hybrid_kv \S+ active on vLLM .*kernels=cpu:", server.log.read_text())
    # The API server, two engine cores; each says it once.
    assert len(active) >= 3
