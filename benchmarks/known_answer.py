# SPDX-License-Identifier: Apache-2.0
"""Measure the start-up cost of the CPU kernels' known-answer test, and write a table.

`python -m benchmarks.known_answer [--output FILE]`. It uses one thread and compiled kernels.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.markdown import table
from vllm_hybrid_kv.attention.cpu import CpuKernels
from vllm_hybrid_kv.kernels import known_answer
from vllm_hybrid_kv.kernels.cpu import isa
from vllm_hybrid_kv.tools.machine import cpu_model

PAGE, RUNS = 64, 5


def milliseconds(path: str, head_size: int, group: int, window: int | None) -> float:
    """Run the known-answer test of one layer shape; return its median CPU time in milliseconds."""
    layer: Any = SimpleNamespace(
        num_heads=2 * group, num_kv_heads=2, head_size=head_size, scale=1.0,
        sliding_window=window, soft_cap=0.0, sinks=None,
    )  # fmt: skip
    kernels, spec = CpuKernels(path, debug=False), SimpleNamespace(block_size=PAGE)
    times = []
    for _ in range(RUNS + 1):
        known_answer.forget()
        start = time.process_time()
        kernels.warm_up(
            {"layer": layer},
            spec,
            torch.bfloat16,
            torch.device("cpu"),
            max_requests=1,
            decode_query_len=1,
        )
        times.append(1000 * (time.process_time() - start))
    # The first run compiles, or loads from disk.
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path)
    output = parser.parse_args().output
    torch.set_num_threads(1)
    lines = [
        "# Cost of the known-answer test",
        "",
        f"`python -m benchmarks.known_answer` on {cpu_model()}: median of {RUNS} runs, ms "
        f"of CPU time of one thread for one variant (bf16, pages of {PAGE} tokens, two KV heads). "
        "Each variant is tested once in a process. The time excludes compiling the kernels or "
        "loading them from disk.",
        "",
    ]
    rows = []
    for path, head_size, group in itertools.product(isa.available(), (64, 128, 256, 512), (1, 8)):
        times = [f"{milliseconds(path, head_size, group, size):.0f}" for size in (None, 96)]
        rows.append([path, str(head_size), str(group), *times])
        print(*rows[-1], flush=True)
    columns = ["path", "head size", "query heads per KV head", "full attention", "window"]
    if output is not None:
        output.write_text("\n".join([*lines, *table(columns, rows)]) + "\n")


if __name__ == "__main__":
    main()
