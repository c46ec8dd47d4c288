# SPDX-License-Identifier: Apache-2.0
"""Servers of which a process is killed while they answer, and what is left of them."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
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

from testing.server import Server, serve
from testing.workload import random_prompt

STREAMS = 4
ENDLESS = 8000
"""Tokens that no answer comes to before it is broken off."""

COMPLETE = ("finish_reason=length", "finish_reason=stop")
SETTLED_S = 60.0
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Ended:
    """How a server ended of which a process was killed while it answered.

    Attributes:
        running_after_hang_up: Requests that ran once a client had hung up.
        answered_after_hang_up: Tokens of the next request.
        ended_by_itself: Whether its other processes ended without being told to.
        endings: Of every stream: the error that it ended with, or the reason that vLLM gave.
        processes: Names of its processes that were left.
        mapped: What it had mapped of /dev/shm when the process was killed.
        shared_memory: What of that it left there.
        temporary: What it left in its temporary folder.
    """

    running_after_hang_up: float
    answered_after_hang_up: int
    ended_by_itself: bool
    endings: list[str]
    processes: list[str]
    mapped: list[str]
    shared_memory: list[str]
    temporary: list[str]

    @property
    def broken_off(self) -> list[str]:
        """The endings of streams that did not pass for complete."""
        return [ending for ending in self.endings if ending not in COMPLETE]


def shared_memory() -> set[str]:
    return {path.name for path in SHARED_MEMORY.iterdir()} if SHARED_MEMORY.exists() else set()


def mapped_by(processes: list[psutil.Process]) -> set[str]:
    """Return the shared memory that these have mapped. Engines beside them have theirs."""
    names = set()
    for process in processes:
        with contextlib.suppress(OSError, psutil.Error):
            maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
            names |= {line.rsplit("/", 1)[1] for line in maps if f" {SHARED_MEMORY}/" in line}
    return names


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


def kill(server: Server, name: str) -> tuple[list[str], bool, set[str]]:
    """Kill a process of a server while it answers.

    Args:
        server: The server.
        name: Part of the command line of the process, and of no other.

    Returns:
        The streams' endings, whether all processes ended, and the shared memory they had mapped.
    """
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
        except Exception as error:
            # A stream may break off anywhere, within what a client takes for JSON too.
            endings.append(f"{type(error).__name__}: {error}")

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(STREAMS)]
    for reader in readers:
        reader.start()
    began.wait()
    processes = processes_of(server.group)
    (process,) = (p for p in processes if name in " ".join(p.cmdline()))
    mapped = mapped_by(processes)
    process.send_signal(signal.SIGKILL)
    for reader in readers:
        reader.join(SETTLED_S)
    return endings, until(lambda: not processes_of(server.group)), mapped


def crash(model: Path, folder: Path, name: str, *arguments: str) -> Ended:
    """Serve a model, hang up once, and kill one process while it answers.

    Args:
        model: Its folder.
        folder: For the log.
        name: Part of the command line of the process to kill.
        arguments: Further ones of `vllm serve`.
    """
    # vLLM's sockets are in it, whose paths must not be longer than 107 characters; a test's own
    # folder may have most of these.
    with tempfile.TemporaryDirectory() as short, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", short)
        options = [
            *("--served-model-name", "served", "--max-model-len", str(ENDLESS + 100)),
            *("--gpu-memory-utilization", "0.3", "--enable-prefix-caching", "--enforce-eager"),
            *arguments,
        ]
        console = Console(quiet=True)
        # It is gone before it is stopped, which is nothing that `serve` minds.
        with serve(model, options, folder / "log.txt", console) as (server, _):
            left_running, answered = hang_up(server.url)
            endings, by_itself, mapped = kill(server, name)
            names = [process.name() for process in processes_of(server.group)]
        temporary = sorted(path.name for path in Path(short).iterdir())
    return Ended(
        left_running,
        answered,
        by_itself,
        endings,
        names,
        sorted(mapped),
        sorted(mapped & shared_memory()),
        temporary,
    )
