# SPDX-License-Identifier: Apache-2.0
"""The command `python -m benchmarks.fidelity`; the package says what it does."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.fidelity import measure, prompts, report, sources
from benchmarks.fidelity.rules import BESIDE_STOCK, EXACT, OURS, STOCK
from vllm_hybrid_kv.tools.machine import cpu_model

HEAD_SIZES = (64, 96, 128, 256)
SEEDS = {512: 4, 2048: 2}
"""Samples of each length for which every rule is measured."""

MANY = 16
"""How many times as many are measured for ours and vLLM's rule alone."""


class Found:
    """The errors of one source's samples.

    Attributes:
        values: Of every rule for values, one for each sample that they were measured on.
        beside_stock: Of ours, of vLLM's rule and of exact values, one for each sample.
        keys: Of every rule for keys.
    """

    def __init__(self) -> None:
        self.values: list[measure.Errors] = []
        self.beside_stock: list[measure.Errors] = []
        self.keys: list[measure.Errors] = []

    def add(self, sample: sources.Sample, every_rule: bool) -> None:
        self.beside_stock.append(measure.errors_of_values(sample, BESIDE_STOCK))
        if every_rule:
            self.values.append(measure.errors_of_values(sample))
            self.keys.append(measure.errors_of_keys(sample))

    def row(self) -> dict[str, Any]:
        return {
            "values": _mean(self.values),
            "keys": _mean(self.keys),
            "samples": len(self.beside_stock),
            "beside_stock": {
                kind: self._beside_stock(kind, errors)
                for kind, errors in _mean(self.beside_stock).items()
            },
        }

    def _beside_stock(self, kind: str, mean: dict[str, float]) -> dict[str, float]:
        ratios = [one[kind][OURS] / one[kind][STOCK] for one in self.beside_stock]
        return {
            "ratio": mean[OURS] / mean[STOCK],
            "doubt": statistics.stdev(ratios) / len(ratios) ** 0.5,
            "of keys alone": mean[EXACT] / mean[STOCK],
        }


def _mean(found: list[measure.Errors]) -> measure.Errors:
    return {
        kind: {name: statistics.fmean(one[kind][name] for one in found) for name in rules}
        for kind, rules in found[0].items()
    }


def measure_distributions(
    head_sizes: Iterable[int], seeds: dict[int, int], many: int
) -> list[dict[str, Any]]:
    """Return a row for each head size, length and distribution, means over seeds."""
    rows = []
    for head_size in head_sizes:
        for length, count in seeds.items():
            found: dict[str, Found] = {}
            for seed in range(count * many):
                for sample in sources.drawn(head_size, length, seed):
                    found.setdefault(sample.name, Found()).add(sample, seed < count)
            rows += [
                {
                    "head_size": head_size,
                    "length": length,
                    "source": name,
                    "heavy": sources.DISTRIBUTIONS[name][0],
                    **of_name.row(),
                }
                for name, of_name in found.items()
            ]
            print(f"head size {head_size}, {length} tokens", flush=True)
    return rows


def measure_model(folder: Path) -> list[dict[str, Any]]:
    """Return a row for each attention layer of a model, means over prompts."""
    found: dict[str, Found] = {}
    shape = (0, 0)
    for sample in sources.recorded(str(folder), prompts.of_model(folder)):
        of_name = found.setdefault(sample.name, Found())
        of_name.add(sample, len(of_name.values) < prompts.EVERY_RULE)
        shape = (sample.key.shape[2], sample.key.shape[0])
    print(f"{folder.name}: {len(found)} layers", flush=True)
    return [
        {
            "model": folder.name,
            "head_size": shape[0],
            "length": shape[1],
            "source": name,
            "heavy": False,
            **of_name.row(),
        }
        for name, of_name in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    parser.add_argument(
        "--model",
        type=Path,
        action="append",
        default=[],
        help="record this model's layers",
    )
    parser.add_argument("--quick", action="store_true", help="few samples of 512 tokens")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes: tuple[int, ...] = HEAD_SIZES
    seeds, many = SEEDS, MANY
    if arguments.quick:
        sizes, seeds, many = (64, 128), {512: 2}, 1
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
    (arguments.out / "fidelity.md").write_text(report.text(result))
    print(report.text(result))


if __name__ == "__main__":
    main()
