# SPDX-License-Identifier: Apache-2.0
"""Serve a small hybrid model with a k8v4 KV cache and talk to it: `python -m demo`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.table import Table

from demo.models import build_model, qwen3_next_config
from demo.server import ENVIRONMENT, Server, ServerError, find_line

FOLDER = Path(".cache/demo")
CACHE_DTYPE = "turboquant_k8v4"
MAX_MODEL_LEN = 4096
MEMORY_FRACTION = 0.3
CAPACITY = r"KV cache size: ([\d,]+) tokens"

QUESTION = "Which layers of a hybrid model keep a KV cache, and which keep a state?"
# Longer than one block of the hybrid model, so that the second asking finds it in the cache.
STORY = "Once upon a time a token met a page and they agreed to share a block. " * 40

console = Console(highlight=False, width=100)


def main() -> int:
    """Run the demo; return the exit status."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    model = FOLDER / "qwen3-next"
    if not (model / "config.json").exists():
        with console.status("Making a small Qwen3-Next model with random weights"):
            build_model(qwen3_next_config(), model)
    console.print(f"Model: {model}, Gated DeltaNet and full attention, random weights")
    arguments = [
        *("--kv-cache-dtype", CACHE_DTYPE),
        *("--max-model-len", str(MAX_MODEL_LEN)),
        *("--gpu-memory-utilization", str(MEMORY_FRACTION)),
        *("--served-model-name", "demo"),
        "--enable-prefix-caching",
        "--enforce-eager",
    ]
    console.print(f"$ vllm serve {model} {' '.join(arguments)}")
    try:
        with Server(model, FOLDER / "server.log", arguments) as server:
            bfloat16 = _plan_of_bfloat16(model)
            try:
                with console.status("starting") as status:
                    server.wait(
                        lambda seconds, line: status.update(f"{seconds:3.0f} s  {line[:80]}")
                    )
                console.print("The server is up.")
                _ask(server)
                with console.status("planning the same cache in bfloat16"):
                    if bfloat16.wait():
                        raise ServerError("the bfloat16 engine did not start")
            finally:
                bfloat16.kill()
            _report(server)
    except ServerError as error:
        console.print(f"[red]The demo failed:[/red] {error}", markup=True)
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted.")
        return 130
    console.print("The server is shut down.")
    return 0


def _plan_of_bfloat16(model: Path) -> subprocess.Popen[bytes]:
    """Start an engine with vLLM's default cache beside the server, for its capacity only."""
    with (FOLDER / "bfloat16.log").open("wb") as sink:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "demo.capacity", str(model)),
                *("--max-model-len", str(MAX_MODEL_LEN)),
                *("--gpu-memory-utilization", str(MEMORY_FRACTION)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**ENVIRONMENT, **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        )


def _ask(server: Server) -> None:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    chat = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=24,
        temperature=0,
    )
    console.print(f"\nchat        {QUESTION}")
    console.print(f"         -> {chat.choices[0].message.content!r}", markup=False)
    answers = []
    for time_of_asking in ("first", "second"):
        completion = client.completions.create(
            model="demo", prompt=STORY, max_tokens=24, temperature=0
        )
        answers.append(completion.choices[0].text)
        tokens = completion.usage.prompt_tokens if completion.usage else 0
        console.print(f"completion  {STORY[:40]}… ({tokens} tokens, {time_of_asking} time)")
        console.print(f"         -> {answers[-1]!r}", markup=False)
    if answers[0] != answers[1]:
        raise ServerError(f"the answer changed with the cache: {answers}")
    console.print("The same prompt gave the same answer, cached and not.")


def _report(server: Server) -> None:
    ours = find_line(server.log, CAPACITY)[1]
    theirs = find_line(FOLDER / "bfloat16.log", CAPACITY)[1]
    gain = int(ours.replace(",", "")) / int(theirs.replace(",", ""))
    console.print(f"\n{find_line(server.log, r'hybrid_kv [0-9.]+ active .*')[0]}\n")
    table = Table("KV cache", "tokens in 1 GiB", "")
    table.add_row("auto (bfloat16)", theirs, "")
    table.add_row(CACHE_DTYPE, ours, f"{gain:.2f} times as many")
    console.print(table)
    metrics = server.text("/metrics")
    for name in ("prefix_cache_queries", "prefix_cache_hits"):
        for line in metrics.splitlines():
            if line.startswith(f"vllm:{name}_total"):
                console.print(f"vllm:{name:<22} {float(line.rsplit(' ', 1)[1]):.0f} tokens")


if __name__ == "__main__":
    sys.exit(main())
