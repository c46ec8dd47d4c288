# SPDX-License-Identifier: Apache-2.0
"""Kill a process of a server while it streams answers, and record what is left behind."""

from __future__ import annotations

import contextlib
import signal
import tempfile
import threading
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from openai.types import Completion

from testing.processes import group_ends, group_members, wait_until
from testing.server import Server, serve
from testing.tokenizer import random_prompt

STREAMS = 4
ENDLESS = 8000
"""More tokens than any stream receives before it breaks off."""

COMPLETE = ("finish_reason=length", "finish_reason=stop")
SETTLED_S = 60.0
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Crash:
    """The state of a server after one of its processes was killed.

    Attributes:
        running_after_hang_up: Requests that still ran after a client had hung up.
        answered_after_hang_up: Tokens of the next request.
        ended_by_itself: Whether the server's other processes ended without a signal.
        endings: For each stream, the error or the finish reason.
        processes: Names of the processes left.
        mapped: Files of /dev/shm that the server had mapped when the process was killed.
        shared_memory: Those of them that are left.
        temporary: Files left in the server's temporary folder.
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
        """The endings of streams that a client cannot take for complete."""
        return [ending for ending in self.endings if ending not in COMPLETE]


def crash(model: Path, folder: Path, name: str, *arguments: str) -> Crash:
    """Serve a model, hang up once, and kill one process of the server while it answers.

    Args:
        model: The model's folder.
        folder: For the log.
        name: Part of the command line of only the process to kill.
        arguments: Further arguments of `vllm serve`.
    """
    # vLLM creates sockets in TMPDIR, whose paths must have at most 107 characters; a test's own
    # folder may use most of them.
    with tempfile.TemporaryDirectory() as short, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", short)
        options = [
            *("--served-model-name", "served", "--max-model-len", str(ENDLESS + 100)),
            *("--gpu-memory-utilization", "0.3", "--enable-prefix-caching", "--enforce-eager"),
            *arguments,
        ]
        with serve(model, options, folder / "log.txt") as (server, _):
            running, answered = _hang_up(server)
            endings, by_itself, mapped = _kill(server, name)
            names = [process.name() for process in group_members(server.group)]
        temporary = sorted(path.name for path in Path(short).iterdir())
    left = {path.name for path in SHARED_MEMORY.iterdir()} if SHARED_MEMORY.exists() else set()
    return Crash(
        running,
        answered,
        by_itself,
        endings,
        names,
        sorted(mapped),
        sorted(mapped & left),
        temporary,
    )


def stream(url: str, seed: int, tokens: int) -> Generator[Completion, None, None]:
    """Stream the answer to a random prompt."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
    options: dict[str, Any] = {"include_usage": True, "continuous_usage_stats": True}
    chunks: openai.Stream[Completion] = client.completions.create(
        model="served",
        prompt=random_prompt(60, seed),
        max_tokens=tokens,
        temperature=0.0,
        stream=True,
        # A chunk may hold several tokens if the client is slower than the engine.
        stream_options=options,  # type: ignore[call-overload]
        extra_body={"ignore_eos": True},
    )
    with chunks:
        yield from chunks


def _hang_up(server: Server) -> tuple[float, int]:
    """Close a stream in mid-answer; return the running requests and the next answer's tokens."""
    answer = stream(server.url, seed=1, tokens=ENDLESS)
    for _ in range(5):
        next(answer)
    answer.close()
    wait_until(lambda: server.metric("vllm:num_requests_running") == 0, SETTLED_S)
    *_, last = stream(server.url, seed=2, tokens=5)
    assert last.usage is not None
    return server.metric("vllm:num_requests_running"), last.usage.completion_tokens


def _kill(server: Server, name: str) -> tuple[list[str], bool, set[str]]:
    """Kill a process; return the streams' endings, whether all ended, and mapped /dev/shm files."""
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
            # A stream may break off anywhere, also inside what the client parses as JSON.
            endings.append(f"{type(error).__name__}: {error}")

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(STREAMS)]
    for reader in readers:
        reader.start()
    began.wait()
    processes = group_members(server.group)
    (process,) = (p for p in processes if name in " ".join(p.cmdline()))
    mapped = _mapped_by(processes)
    process.send_signal(signal.SIGKILL)
    for reader in readers:
        reader.join(SETTLED_S)
    return endings, group_ends(server.group, SETTLED_S), mapped


def _mapped_by(processes: list[psutil.Process]) -> set[str]:
    names = set()
    for process in processes:
        with contextlib.suppress(OSError, psutil.Error):
            maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
            names |= {line.rsplit("/", 1)[1] for line in maps if f" {SHARED_MEMORY}/" in line}
    return names
