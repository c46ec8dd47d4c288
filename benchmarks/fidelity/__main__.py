# SPDX-License-Identifier: Apache-2.0
"""The command `python -m benchmarks.fidelity`."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

import torch

from benchmarks.fidelity import report, sources
from benchmarks.fidelity.measure import summarise
from vllm_hybrid_kv.tools.machine import cpu_model

HEAD_SIZES = (64, 72, 128, 256)
SEEDS = {512: 8, 2048: 2}
"""Maps the length of a sequence in tokens to how many samples to draw."""


def measure_distributions(head_size: int, length: int, count: int) -> list[dict[str, Any]]:
    samples = (s for seed in range(count) for s in sources.drawn(head_size, length, seed))
    print(f"head size {head_size}, {length} tokens", flush=True)
    return summarise(samples)


def measure_model(folder: Path) -> list[dict[str, Any]]:
    print(folder.name, flush=True)
    rows = summarise(sources.recorded(folder, sources.prompts(folder)))
    return [{"model": folder.name, **row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    parser.add_argument("--model", type=Path, action="append", default=[],
                        help="record this model's layers")  # fmt: skip
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models = "".join(f" --model {folder.name}" for folder in arguments.model)
    result = {
        "machine": {
            "cpu": cpu_model(),
            "Python": platform.python_version(),
            "torch": torch.__version__,
        },
        "command": f"python -m benchmarks.fidelity{models}",
        "seeds": SEEDS,
        "shown": (128, max(SEEDS)),
        "distributions": [
            row
            for size in HEAD_SIZES
            for length, count in SEEDS.items()
            for row in measure_distributions(size, length, count)
        ],
        "recorded": [row for folder in arguments.model for row in measure_model(folder)],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = report.markdown(result)
    (arguments.out / "fidelity.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
