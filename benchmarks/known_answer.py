# SPDX-License-Identifier: Apache-2.0
"""What the known-answer test of the CPU kernels costs at start-up; writes a table.

`python -m benchmarks.known_answer [--output FILE]`. One thread, kernels compiled before.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from vllm_hybrid_kv.attention.cpu import CpuKernels
from vllm_hybrid_kv.kernels import known_answer
from vllm_hybrid_kv.kernels.cpu import isa

CPU = torch.device("cpu")
PAGE = 64


def milliseconds(path: str, head_size: int, group: int, window: int | None, runs: int) -> float:
    """Return the median time of one variant's test, in ms of CPU time."""
    layer = SimpleNamespace(
        num_heads=2 * group, num_kv_heads=2, head_size=head_size, scale=1.0,
        sliding_window=window, soft_cap=0.0, sinks=None,
    )  # fmt: skip
    spec = SimpleNamespace(block_size=PAGE)
    found = []
    for _ in range(runs + 1):
        known_answer.forget()
        began = time.process_time()
        CpuKernels(path, debug=False).warm_up(
            {"layer": layer},
            spec,
            torch.bfloat16,
            CPU,
            max_requests=1,
        )
        found.append(1000 * (time.process_time() - began))
    # The first one compiles, or loads from disk.
    return statistics.median(found[1:])


def processor() -> str:
    """Return the name of this machine's CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    """Measure and print or write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# Cost of the known-answer test",
        "",
        f"`python -m benchmarks.known_answer` on {processor()}: median of {options.runs} runs, ms "
        f"of CPU time of one thread for one variant (bf16, pages of {PAGE} tokens, two KV heads). "
        "Each variant is tested once in a process. Compiling the kernels, or loading them from "
        "disk, comes before and is not counted.",
        "",
        "| path | head size | query heads per KV head | full attention | window |",
        "|---|---|---|---|---|",
    ]
    for path in isa.available():
        for head_size in (64, 128, 256, 512):
            for group in (1, 8):
                full, window = (
                    milliseconds(path, head_size, group, size, options.runs) for size in (None, 96)
                )
                row = f"| {path} | {head_size} | {group} | {full:.0f} | {window:.0f} |"
                print(row, flush=True)
                lines.append(row)
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
