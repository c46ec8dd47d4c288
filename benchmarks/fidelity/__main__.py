# SPDX-License-Identifier: Apache-2.0
"""The command `python -m benchmarks.fidelity`."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.fidelity import report, sources
from benchmarks.fidelity.measure import summarise
from vllm_hybrid_kv.tools.machine import cpu_model

HEAD_SIZES = (64, 96, 128, 256)
SEEDS = {512: 4, 2048: 2}
"""Samples of each length on which every rule is measured."""

MANY = 16
"""How many times as many samples our rule and vLLM's are measured on."""


def measure_distributions(
    head_sizes: Iterable[int], seeds: dict[int, int], many: int
) -> list[dict[str, Any]]:
    """Return a row for each head size, length and distribution."""

    def samples(head_size: int, length: int, count: int) -> Iterator[sources.Sample]:
        for seed in range(count):
            yield from sources.drawn(head_size, length, seed)

    rows = []
    for head_size in head_sizes:
        for length, count in seeds.items():
            rows += summarise(samples(head_size, length, count * many), every_rule=count)
            print(f"head size {head_size}, {length} tokens", flush=True)
    return rows


def measure_model(folder: Path) -> list[dict[str, Any]]:
    """Return a row for each attention layer of a model."""
    rows = summarise(sources.recorded(folder, sources.prompts(folder)), sources.EVERY_RULE)
    print(f"{folder.name}: {len(rows)} layers", flush=True)
    return [{"model": folder.name, **row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    parser.add_argument("--model", type=Path, action="append", default=[],
                        help="record this model's layers")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="few samples of 512 tokens")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes: tuple[int, ...] = HEAD_SIZES
    seeds, many = SEEDS, MANY
    if arguments.quick:
        sizes, seeds, many = HEAD_SIZES[::2], {512: 2}, 1
    result = {
        "machine": {
            "cpu": cpu_model(),
            "Python": platform.python_version(),
            "torch": torch.__version__,
        },
        "seeds": seeds,
        "many": many,
        "distributions": measure_distributions(sizes, seeds, many),
        "recorded": [row for folder in arguments.model for row in measure_model(folder)],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "fidelity.json").write_text(json.dumps(result, indent=1) + "\n")
    text = report.markdown(result)
    (arguments.out / "fidelity.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
