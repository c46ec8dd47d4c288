# SPDX-License-Identifier: Apache-2.0
"""Clients that hang up and engines that are killed: vLLM's own recovery, and nothing left."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from openai.types import Completion
from rich.console import Console
from workload import random_prompt

from demo.server import Server, serve

pytestmark = pytest.mark.engine

STREAMS = 4
ENDLESS = 8000
"""Tokens that no answer comes to before it is broken off."""

COMPLETE = ("finish_reason=length", "finish_reason=stop")
SETTLED_S = 60.0
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Ended:
    """How a server ended whose engine was killed while it answered.

    Attributes:
        running_after_hang_up: Requests that ran once a client had hung up.
        answered_after_hang_up: Tokens of the next request.
        ended_by_itself: Whether its other processes ended without being told to.
        endings: Of every stream: the error that it ended with, or the reason that vLLM gave.
        processes: Names of its processes that were left.
        shared_memory: What it left in /dev/shm.
        temporary: What it left in its temporary folder.
    """

    running_after_hang_up: float
    answered_after_hang_up: int
    ended_by_itself: bool
    endings: list[str]
    processes: list[str]
    shared_memory: list[str]
    temporary: list[str]


def shared_memory() -> set[str]:
    return {path.name for path in SHARED_MEMORY.iterdir()} if SHARED_MEMORY.exists() else set()


def processes_of(group: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def stream(url: str, seed: int, tokens: int) -> Iterator[Completion]:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
    chunks = client.completions.create(
        model="served",
        prompt=random_prompt(60, seed),
        max_tokens=tokens,
        temperature=0.0,
        stream=True,
        # A chunk may hold several tokens where the client is slower than the engine.
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        extra_body={"ignore_eos": True},
    )
    with chunks:
        yield from chunks


def running(url: str) -> float:
    text = httpx.get(f"{url}/metrics", follow_redirects=True, timeout=60).text
    values = [
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith("vllm:num_requests_running{")
    ]
    return sum(values)


def until(done: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SETTLED_S
    while time.monotonic() < deadline:
        if done():
            return True
        time.sleep(0.2)
    return False


def hang_up(url: str) -> tuple[float, int]:
    """Hang up in the middle of an answer; return what runs then, and the next answer's tokens."""
    answer = stream(url, seed=1, tokens=ENDLESS)
    for _ in range(5):
        next(answer)
    answer.close()
    until(lambda: running(url) == 0)
    *_, last = stream(url, seed=2, tokens=5)
    return running(url), last.usage.completion_tokens


def kill_engine(server: Server) -> tuple[list[str], bool]:
    """Kill the engine while it answers; return the streams' endings, and whether all ended."""
    began, endings = threading.Barrier(STREAMS + 1, timeout=120), []

    def read(seed: int) -> None:
        answer = stream(server.url, seed, tokens=ENDLESS)
        next(answer)
        began.wait()
        reason = None
        try:
            for chunk in answer:
                reason = chunk.choices[0].finish_reason if chunk.choices else reason
            endings.append(f"finish_reason={reason}")
        except (openai.APIError, httpx.TransportError) as error:
            endings.append(f"{type(error).__name__}: {error}")

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(STREAMS)]
    for reader in readers:
        reader.start()
    began.wait()
    engines = [p for p in processes_of(server.group) if "EngineCore" in " ".join(p.cmdline())]
    assert len(engines) == 1
    engines[0].send_signal(signal.SIGKILL)
    for reader in readers:
        reader.join(SETTLED_S)
    return endings, until(lambda: not processes_of(server.group))


def crash(model: Path, folder: Path, *arguments: str) -> Ended:
    temporary = folder / "tmp"
    temporary.mkdir()
    before = shared_memory()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        options = [
            *(
                "--served-model-name",
                "served",
                "--max-model-len",
                str(ENDLESS + 100),
                "--enforce-eager",
            ),
            *("--gpu-memory-utilization", "0.3", "--enable-prefix-caching", "--enforce-eager"),
            *arguments,
        ]
        console = Console(quiet=True)
        # It is gone before it is stopped, which is nothing that `serve` minds.
        with serve(model, options, folder / "log.txt", console) as (server, _):
            left_running, answered = hang_up(server.url)
            endings, by_itself = kill_engine(server)
            names = [process.name() for process in processes_of(server.group)]
    return Ended(
        left_running,
        answered,
        by_itself,
        endings,
        names,
        sorted(shared_memory() - before),
        sorted(path.name for path in temporary.iterdir()),
    )


@pytest.fixture(scope="module")
def ended(small_model, tmp_path_factory) -> Ended:
    folder = tmp_path_factory.mktemp("ours")
    return crash(small_model("llama", "bfloat16"), folder, "--kv-cache-dtype", "turboquant_k8v4")


def broken_off(ended: Ended) -> list[str]:
    return [ending for ending in ended.endings if ending not in COMPLETE]


def test_a_client_that_hangs_up_stops_its_request_and_no_other(ended):
    assert ended.running_after_hang_up == 0
    assert ended.answered_after_hang_up == 5


def test_a_killed_engine_ends_the_server_and_no_stream_passes_for_complete(ended):
    assert ended.ended_by_itself
    assert len(broken_off(ended)) == STREAMS, ended.endings
    assert ended.processes == []


def test_a_killed_engine_leaves_nothing_of_ours(ended):
    assert [name for name in ended.temporary if "hybrid" in name] == []


def test_without_the_plugin_a_killed_engine_ends_a_server_in_the_same_way(
    ended, small_model, tmp_path_factory, monkeypatch
):
    monkeypatch.setenv("VLLM_PLUGINS", "")
    stock = crash(small_model("llama", "bfloat16"), tmp_path_factory.mktemp("stock"))
    assert (stock.ended_by_itself, len(broken_off(stock)), stock.processes) == (
        ended.ended_by_itself, len(broken_off(ended)), ended.processes
    )  # fmt: skip
    assert len(ended.shared_memory) <= len(stock.shared_memory)
    assert len(ended.temporary) <= len(stock.temporary)
