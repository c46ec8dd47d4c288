# SPDX-License-Identifier: Apache-2.0
"""Run `vllm serve`: clients disconnect, an engine is killed, workers have other patches."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion

from testing.engine_host import BASE_ENVIRONMENT, EngineHost
from testing.model_cases import case_of, settings
from testing.output_comparison import decisive
from testing.processes import group_ends, group_members, kill_group, start_group, wait_until
from testing.server import Server, serve
from testing.tokenizer import random_prompt
from testing.virtual_environments import distribution

pytestmark = pytest.mark.engine

ARGUMENTS = ("--served-model-name", "served", "--gpu-memory-utilization", "0.3", "--enforce-eager")
K8V4 = ("--kv-cache-dtype", "turboquant_k8v4")

STREAMS = 4
ENDLESS = 8000
"""More tokens than any stream receives before it breaks off."""

SETTLED_S = 60.0

Model = Callable[..., Path]


def file_tier(root: Path) -> tuple[str, str]:
    """Make the option for a host tier, which all processes share, with a file tier behind it."""
    options = {
        "spec_name": "TieringOffloadingSpec",
        "cpu_bytes_to_use": 64 << 20,
        "secondary_tiers": [{"type": "fs", "root_dir": str(root)}],
    }
    transfer = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": options,
    }
    return "--kv-transfer-config", json.dumps(transfer)


def ours(names: list[str]) -> list[str]:
    """Select the files of the plugin and of host tiers."""
    return [name for name in names if "hybrid" in name or name.startswith("vllm_offload")]


def stream(url: str, seed: int, tokens: int) -> Generator[Completion, None, None]:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
    chunks: Any = client.completions.create(
        model="served",
        prompt=random_prompt(300, seed),
        max_tokens=tokens,
        temperature=0.0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    with chunks:
        yield from chunks


def assert_that_a_hang_up_stops_one_request(server: Server) -> None:
    answer = stream(server.url, seed=1, tokens=ENDLESS)
    for _ in range(5):
        next(answer)
    answer.close()
    assert wait_until(lambda: server.metric("vllm:num_requests_running") == 0, SETTLED_S)
    *_, last = stream(server.url, seed=2, tokens=5)
    assert last.choices[0].finish_reason == "length"


def assert_that_a_killed_process_ends_the_server(server: Server, name: str) -> None:
    """Kill the process whose command line has `name`, while clients read streams."""
    endings: list[str] = []
    began = threading.Barrier(STREAMS + 1, timeout=120)

    def read(url: str, seed: int) -> None:
        answer = stream(url, seed, tokens=ENDLESS)
        next(answer)
        began.wait()
        reason = None
        try:
            for chunk in answer:
                reason = chunk.choices[0].finish_reason or reason
            endings.append(f"finish_reason={reason}")
        except Exception as error:
            # A stream may break off anywhere, even within JSON, so the client may raise any error.
            endings.append(f"{type(error).__name__}: {error}")

    readers = [threading.Thread(target=read, args=(server.url, i)) for i in range(STREAMS)]
    for reader in readers:
        reader.start()
    began.wait()
    processes = group_members(server.group)
    (victim,) = (p for p in processes if name in " ".join(p.cmdline()))
    victim.send_signal(signal.SIGKILL)
    for reader in readers:
        reader.join(SETTLED_S)
    assert group_ends(server.group, SETTLED_S)
    assert len(endings) == STREAMS
    # No client may mistake its broken answer for a complete one.
    assert not {"finish_reason=length", "finish_reason=stop"} & set(endings)


def test_a_hang_up_stops_one_request_and_a_killed_engine_ends_the_server(
    small_model: Model, tmp_path: Path
) -> None:
    # vLLM creates sockets in TMPDIR. Their paths must have at most 107 characters, of which the
    # test's own folder could use most.
    with tempfile.TemporaryDirectory() as short, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", short)
        before = set(os.listdir("/dev/shm"))
        options = (*ARGUMENTS, *K8V4, *file_tier(tmp_path / "tier"))
        length = ("--max-model-len", str(ENDLESS + 100))
        with serve(small_model("llama"), (*options, *length), tmp_path / "log.txt") as server:
            assert_that_a_hang_up_stops_one_request(server)
            assert_that_a_killed_process_ends_the_server(server, "EngineCore")
        left = ours([*os.listdir(short), *(set(os.listdir("/dev/shm")) - before)])
    assert left == []
    # The tier was in use.
    assert list((tmp_path / "tier").rglob("*.bin"))


@pytest.mark.long
def test_a_killed_worker_ends_the_server_and_leaves_no_file_of_a_tier(
    small_model: Model, tmp_path: Path, nobind: None
) -> None:
    with tempfile.TemporaryDirectory() as short, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", short)
        patch.setenv("OMP_NUM_THREADS", "1")
        before = set(os.listdir("/dev/shm"))
        options = (*ARGUMENTS, *K8V4, *file_tier(tmp_path / "tier"), "--tensor-parallel-size", "2")
        length = ("--max-model-len", str(ENDLESS + 100))
        with serve(small_model("llama"), (*options, *length), tmp_path / "log.txt") as server:
            assert_that_a_killed_process_ends_the_server(server, "Worker_TP1")
        left = ours([*os.listdir(short), *(set(os.listdir("/dev/shm")) - before)])
    assert left == []


@pytest.mark.long
def test_both_engines_of_data_parallelism_answer_like_a_single_engine(
    host: EngineHost,
    small_model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    nobind: None,
) -> None:
    case, count = case_of("llama"), 6
    prompts = [random_prompt(length, seed=length) for length in range(40, 680, 40)]
    model = small_model(case.model, case.dtype)
    options = (*ARGUMENTS, *K8V4, "--max-model-len", "2048", "--dtype", case.dtype)
    # Start-up takes longer, because four processes import vLLM on the same cores.
    monkeypatch.setattr("testing.server.START_TIMEOUT_S", 900.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def ask(server: Server, prompt: list[int]) -> list[int]:
        body = {"model": "served", "prompt": prompt, "max_tokens": count, "temperature": 0.0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300.0)
        return answer.raise_for_status().json()["choices"][0]["token_ids"]

    two = ("--data-parallel-size", "2", "--api-server-count", "1")
    with serve(model, (*options, *two), tmp_path / "log.txt") as server, ThreadPoolExecutor(8) as p:
        answers = list(p.map(lambda prompt: ask(server, prompt), prompts))
        finished: Counter[str] = Counter()
        for sample in server.samples():
            if sample.name == "vllm:request_success_total":
                finished[sample.labels["engine"]] += sample.value
        active = re.findall(r"hybrid_kv \S+ active on vLLM .*kernels=cpu:", server.log.read_text())
    # The plugin is active in the API server and in both engine cores.
    assert len(active) >= 3
    assert set(finished) == {"0", "1"}
    assert finished.total() == len(prompts)
    assert min(finished.values()) > 0

    outputs = host.engine(**settings(model, case.dtype)).generate(
        prompts, count, alone=True, fresh=True
    )
    counts = [decisive(output, case.bounds) for output in outputs]
    for answer, output, tokens in zip(answers, outputs, counts, strict=True):
        assert answer[:tokens] == output.tokens[:tokens]
    assert sum(counts) >= len(prompts) * count // 2


SABOTAGE = """
import multiprocessing

def not_taken():
    if multiprocessing.current_process().name == "VllmWorker-1":
        from vllm_hybrid_kv.patches import mechanism
        mechanism.Rebinding.apply = lambda self: None

def patched():
    if multiprocessing.current_process().name == "VllmWorker-1":
        from vllm.v1.core import kv_cache_utils
        kv_cache_utils.get_kv_cache_capacity = lambda vllm_config, kv_cache_config: (0, 0)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("not_taken", "WorkerBase.__init__ is not the plugin's"),
        ("patched", "the process VllmWorker-1 has hybrid_kv"),
    ],
)
def test_a_worker_with_other_patches_stops_all_processes_with_one_message(
    small_model: Model, tmp_path: Path, nobind: None, change: str, words: str
) -> None:
    site = tmp_path / "site"
    entry_point = f"[vllm.general_plugins]\nsabotage = sabotage:{change}\n"
    distribution(site, "sabotage", "1.0", entry_point, sabotage=SABOTAGE)
    vllm = Path(sys.executable).with_name("vllm")
    two = ("--tensor-parallel-size", "2", "--port", "0", "--max-model-len", "2048")
    command = [vllm, "serve", small_model("llama"), *ARGUMENTS, *K8V4, *two]
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    log = tmp_path / "log.txt"
    process = start_group(command, log, {**BASE_ENVIRONMENT, "PYTHONPATH": path}, cwd=tmp_path)
    try:
        status = process.wait(600)
        ended = group_ends(process.pid, SETTLED_S)
    finally:
        kill_group(process)
    output = log.read_text(errors="replace")
    (message,) = (line for line in output.splitlines() if words in line)
    assert "errors.HybridKV" in message
    assert status not in (0, -9)
    assert ended
    assert "Application startup complete" not in output
