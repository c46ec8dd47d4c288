# SPDX-License-Identifier: Apache-2.0
"""`python -m demo`: build a small hybrid model, serve it with a k8v4 KV cache, send requests."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import httpx
import openai
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from testing.models import build_model, qwen3_next_config
from testing.processes import ProcessError, kill_group, start_group
from testing.server import Server, serve

ENGINE_ARGUMENTS = ("--max-model-len", "4096", "--enable-prefix-caching", "--enforce-eager")

SERVE_ARGUMENTS = (
    *("--served-model-name", "demo"),
    *("--kv-cache-dtype", "turboquant_k8v4"),
    *ENGINE_ARGUMENTS,
    # vLLM requires this share of the memory to be free. The default is 0.92, which is rarely free.
    *("--gpu-memory-utilization", "0.3"),
)

PLAN_ARGUMENTS = (
    *("--device", "cpu", "--memory", "1GiB", "--kv-cache-dtype", "auto"),
    *ENGINE_ARGUMENTS,
)
PLAN_TIMEOUT_S = 300.0

FAILURES = (ProcessError, subprocess.TimeoutExpired, openai.OpenAIError, httpx.HTTPError)

DOCUMENT = (
    "The river runs slowly through the old town and the children watch the boats. In winter the "
    "lake is covered with ice and the people walk across it to the other side. "
) * 8
"""A prompt that fills several cache blocks."""

console = Console(highlight=False)


class Capacity(NamedTuple):
    """The size of a KV cache. `tokens` is its capacity if all requests have max_model_len."""

    tokens: int
    block_size: int
    num_blocks: int


@contextlib.contextmanager
def planning(
    model: Path, folder: Path, arguments: Sequence[str] = PLAN_ARGUMENTS
) -> Iterator[Callable[[], Capacity]]:
    """Start to plan a bf16 cache in another process; yield a function that waits for the plan.

    The function raises ProcessError if planning fails, and TimeoutExpired if it takes too long.
    """
    file, log = folder / "bf16-plan.json", folder / "bf16-plan.log"
    ours = Path(sys.executable).with_name("vllm-hybrid-kv")
    process = start_group([ours, "plan", model, *arguments, "--json", file], log)

    def result() -> Capacity:
        if process.wait(PLAN_TIMEOUT_S):
            raise ProcessError("vllm-hybrid-kv plan failed", log)
        plan = json.loads(file.read_text())["plan"]
        return Capacity(plan["reported_tokens"], plan["scheduler_block_tokens"], plan["blocks"])

    try:
        yield result
    finally:
        kill_group(process)


def main() -> int:
    """Run the demo and return its exit status."""
    signal.signal(signal.SIGTERM, _interrupt)
    disable_progress_bar()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hybrid-kv-demo-") as folder:
        log = Path(folder) / "server.log"
        try:
            _run(Path(folder), log)
        except KeyboardInterrupt:
            console.print("Interrupted; the server is stopped.", style="red")
            return 130
        except FAILURES as error:
            log = getattr(error, "log", None) or log
            if log.exists():
                console.rule(f"end of {log.name}")
                tail = log.read_text(errors="replace").splitlines()[-40:]
                console.print("\n".join(tail), markup=False, soft_wrap=True)
            console.print(f"The demo failed: {error}", style="bold red", markup=False)
            return 1
    console.print(f"Done in {time.monotonic() - began:.0f} s.")
    return 0


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Stop the server as Ctrl-C does."""
    raise KeyboardInterrupt


def _run(folder: Path, log: Path) -> None:
    model = build_model(qwen3_next_config(), folder / "qwen3-next", words_only=True)
    console.print(
        "Built a Qwen3-Next model with random weights: 6 Gated DeltaNet and 2 attention layers.",
        soft_wrap=True,
    )
    console.print("$ vllm serve qwen3-next", *SERVE_ARGUMENTS, style="bold", soft_wrap=True)
    began = time.monotonic()
    # Plan while the server starts: both mostly import modules, on one core each.
    with planning(model, folder) as plan, serve(model, SERVE_ARGUMENTS, log, console) as server:
        console.print(f"Ready after {time.monotonic() - began:.0f} s.")
        active = server.find_in_log(r"(hybrid_kv \S+ active[^\n]*)")
        console.print(f"Plugin: {active}", markup=False, soft_wrap=True)
        _send_requests(server)
        with console.status("planning a bf16 KV cache for comparison"):
            bf16 = plan()
        _show_capacity(_served_capacity(server), bf16)
        _show_prefix_cache(
            server.metric("vllm:prefix_cache_queries_total"),
            server.metric("vllm:prefix_cache_hits_total"),
        )
    console.print("Server stopped; no process is left.")


def _send_requests(server: Server) -> None:
    """Send a chat and a completion, each twice, and print the answers."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120.0)
    question = "What do the children watch?"
    for attempt in ("first time", "again"):
        chat = client.chat.completions.create(
            model="demo",
            messages=[
                {"role": "system", "content": DOCUMENT},
                {"role": "user", "content": question},
            ],
            max_tokens=24,
            temperature=0,
        )
        _print_answer(f"chat, {attempt}", question, chat.choices[0].message.content, chat.usage)
    for attempt in ("first time", "again"):
        completion = client.completions.create(
            model="demo", prompt=DOCUMENT + "On the bridge", max_tokens=24, temperature=0
        )
        answer = completion.choices[0].text
        _print_answer(f"completion, {attempt}", "... On the bridge", answer, completion.usage)


def _print_answer(kind: str, prompt: str, answer: str | None, usage: Any) -> None:
    if not answer:
        raise ProcessError(f"{kind}: the server answered without any text")
    console.print(f"{kind}: {usage.prompt_tokens} prompt tokens", style="bold")
    console.print(f"  > {prompt}", markup=False)
    console.print(f"  {answer.strip()}", markup=False)


def _served_capacity(server: Server) -> Capacity:
    """Read the size of the server's KV cache from its log and its metrics."""
    tokens = server.find_in_log(r"KV cache size: ([\d,]+) tokens")
    (cache,) = (s.labels for s in server.samples() if s.name == "vllm:cache_config_info")
    block_size, blocks = int(cache["block_size"]), int(cache["num_gpu_blocks"])
    return Capacity(int(tokens.replace(",", "")), block_size, blocks)


def _show_capacity(k8v4: Capacity, bf16: Capacity) -> None:
    table = Table(title="KV cache in 1 GiB", title_justify="left")
    for heading in ("cache", "tokens at max_model_len", "block size", "blocks"):
        table.add_column(heading, justify="left" if heading == "cache" else "right")
    for name, capacity in (("bf16", bf16), ("k8v4", k8v4)):
        table.add_row(
            name, f"{capacity.tokens:,}", str(capacity.block_size), f"{capacity.num_blocks:,}"
        )
    console.print(table)
    times = k8v4.tokens / bf16.tokens
    console.print(f"In requests of max_model_len k8v4 holds {times:.2f} times the tokens of bf16.")


def _show_prefix_cache(queries: float, hits: float) -> None:
    console.print(
        f"Prefix cache: {hits:.0f} of {queries:.0f} prompt tokens were hits ({hits / queries:.0%})."
    )
    if not hits:
        raise ProcessError("prompts that were sent twice did not hit the prefix cache")


if __name__ == "__main__":
    sys.exit(main())
