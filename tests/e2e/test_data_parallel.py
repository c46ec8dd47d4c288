# SPDX-License-Identifier: Apache-2.0
"""`vllm serve --data-parallel-size 2`: both engines give what a single engine gives."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from testing.engine_host import EngineHost
from testing.model_cases import case_of, settings
from testing.output_comparison import decisive
from testing.server import Server, serve
from testing.tokenizer import random_prompt

pytestmark = [pytest.mark.engine, pytest.mark.long]

PROMPTS = [random_prompt(length, seed=length) for length in range(40, 680, 40)]
TOKENS = 6
CASE = case_of("llama")


@pytest.fixture(scope="module")
def server(
    small_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    arguments = ["--data-parallel-size", "2", "--api-server-count", "1"]
    arguments += ["--served-model-name", "small"]
    arguments += ["--kv-cache-dtype", "turboquant_k8v4", "--dtype", CASE.dtype]
    arguments += ["--max-model-len", "2048", "--gpu-memory-utilization", "0.3", "--enforce-eager"]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with pytest.MonkeyPatch.context() as patch:
        # Four processes import vLLM at once, and share the cores.
        patch.setattr("testing.server.START_TIMEOUT_S", 900.0)
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        with serve(small_model(CASE.model, CASE.dtype), arguments, log) as (server, _):
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


def test_both_engines_answer_like_a_single_engine(server, host: EngineHost, small_model):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda prompt: ask(server, prompt), PROMPTS))
    finished: Counter[str] = Counter()
    for family in server.metrics():
        for sample in family.samples:
            if sample.name == "vllm:request_success_total":
                finished[sample.labels["engine"]] += sample.value
    assert set(finished) == {"0", "1"}
    assert sum(finished.values()) == len(PROMPTS)
    assert min(finished.values()) > 0

    alone = host.engine(**settings(small_model(CASE.model, CASE.dtype), CASE.dtype))
    outputs = alone.generate(PROMPTS, TOKENS, alone=True, fresh=True)
    counts = [decisive(output, CASE.bounds) for output in outputs]
    for answer, output, count in zip(answers, outputs, counts, strict=True):
        assert answer[:count] == output.tokens[:count]
    assert sum(counts) >= len(PROMPTS) * TOKENS // 2


def test_every_process_logs_that_the_plugin_is_active(server):
    active = re.findall(r"hybrid_kv \S+ active on vLLM .*kernels=cpu:", server.log.read_text())
    # The API server and two engine cores.
    assert len(active) >= 3
