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

from benchmarks.engine.machine import cpu_name

from . import measure, prompts, report, sources
from .rules import OURS, STOCK

HEAD_SIZES = (64, 96, 128, 256)
SEEDS = {512: 4, 2048: 2}
"""Samples of each length."""


def _doubt(found: list[measure.Errors]) -> dict[str, float]:
    """Return the standard error over samples of ours relative to stock's rule, by kind of query."""
    ratios = {
        kind: [one[kind][OURS] / one[kind][STOCK] for one in found] for kind in found[0]
    }  # fmt: skip
    return {
        kind: statistics.stdev(of_kind) / len(of_kind) ** 0.5 if len(of_kind) > 1 else 0.0
        for kind, of_kind in ratios.items()
    }


def _mean(found: list[measure.Errors]) -> measure.Errors:
    return {
        kind: {name: statistics.fmean(one[kind][name] for one in found) for name in rules}
        for kind, rules in found[0].items()
    }


def measure_distributions(head_sizes: Iterable[int], seeds: dict[int, int]) -> list[dict[str, Any]]:
    """Return a row for each head size, length and distribution, means over seeds."""
    rows = []
    for head_size in head_sizes:
        for length, count in seeds.items():
            values: dict[str, list[measure.Errors]] = {}
            keys: dict[str, list[measure.Errors]] = {}
            for seed in range(count):
                for sample in sources.drawn(head_size, length, seed):
                    values.setdefault(sample.name, []).append(measure.errors_of_values(sample))
                    keys.setdefault(sample.name, []).append(measure.errors_of_keys(sample))
            for name in values:
                rows.append(
                    {
                        "head_size": head_size,
                        "length": length,
                        "source": name,
                        "heavy": sources.DISTRIBUTIONS[name][0],
                        "values": _mean(values[name]),
                        "doubt": _doubt(values[name]),
                        "keys": _mean(keys[name]),
                    }
                )
            print(f"head size {head_size}, {length} tokens", flush=True)
    return rows


def measure_model(folder: Path) -> list[dict[str, Any]]:
    """Return a row for each attention layer of a model, means over prompts."""
    values: dict[str, list[measure.Errors]] = {}
    keys: dict[str, list[measure.Errors]] = {}
    shape = (0, 0)
    for sample in sources.recorded(str(folder), prompts.of_model(folder)):
        values.setdefault(sample.name, []).append(measure.errors_of_values(sample))
        keys.setdefault(sample.name, []).append(measure.errors_of_keys(sample))
        shape = (sample.key.shape[2], sample.key.shape[0])
    print(f"{folder.name}: {len(values)} layers", flush=True)
    return [
        {
            "model": folder.name,
            "head_size": shape[0],
            "length": shape[1],
            "source": name,
            "heavy": False,
            "values": _mean(values[name]),
            "keys": _mean(keys[name]),
        }
        for name in values
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
    sizes, seeds = ((64, 128), {512: 2}) if arguments.quick else (HEAD_SIZES, SEEDS)
    result = {
        "machine": {
            "cpu": cpu_name(),
            "Python": platform.python_version(),
            "torch": torch.__version__,
        },
        "seeds": seeds,
        "distributions": measure_distributions(sizes, seeds),
        "recorded": [row for folder in arguments.model for row in measure_model(folder)],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "fidelity.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "fidelity.md").write_text(report.text(result))
    print(report.text(result))


if __name__ == "__main__":
    main()
