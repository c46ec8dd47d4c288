# SPDX-License-Identifier: Apache-2.0
"""The command `python -m benchmarks.compressed_checkpoints`."""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
from pathlib import Path

from benchmarks.compressed_checkpoints.measure import PLANS, ROOT, compare_with_engine, measure
from benchmarks.markdown import machine, table
from testing.machine import host

SHAPE = ROOT / "testing/shapes/qwen3.6-35b-a3b/config.json"

INTRODUCTION = [
    "Two trained models (`tests/recall/models`) answer questions about pairs of a key and a value. "
    "In `qwen3-next` attention holds the pairs. `gated-deltanet` has no attention, so only its "
    "states (one head of 128 x 128 per layer, as large as Qwen3.6's heads) hold them. Each turn "
    "resumes from the states that were stored at the end of the turn before, so turn 16 resumes "
    "from 16 checkpoints. All rules answer the same questions.",
    "",
    "`recall, points` is the share of right answers minus that with exact float32 checkpoints, in "
    "percentage points, and its 95 % interval. The answers of a conversation count as one sample. "
    "An interval is at least that of the rule of three, which takes the answers as independent. "
    "`KL, nats` is the mean KL "
    "divergence of the answers from the distribution with exact checkpoints. `error of a state` is "
    "the mean relative error (norm) of the states at the end of turn 16, stored once. A row of "
    "int8 codes has the key dims of one value dim and one bfloat16 scale. `running` rounds the "
    "recurrent state after every token. All other rules round it only at the end of a turn.",
    "",
]


def sizes() -> list[str]:
    """Return a table of the bytes that a layer's state of Qwen3.6 takes at rest."""
    config = json.loads(SHAPE.read_text())["text_config"]
    key, value = config["linear_key_head_dim"], config["linear_value_head_dim"]
    heads = config["linear_num_value_heads"]
    channels = 2 * key * config["linear_num_key_heads"] + value * heads
    numbers, rows = heads * key * value, heads * value
    convolution = channels * (config["linear_conv_kernel_dim"] - 1)
    full = 4 * numbers + 2 * convolution
    stored = {
        "float32, bfloat16 (today)": full,
        "bfloat16": 2 * (numbers + convolution),
        "int8, convolution in bfloat16": numbers + 2 * rows + 2 * convolution,
        "int8, convolution in int8": numbers + 2 * rows + convolution + 2 * convolution // key,
    }
    return table(
        ["recurrent state, convolution's state", "bytes", "smaller by"],
        [[name, f"{size:,}", f"{full / size:.2f}"] for name, size in stored.items()],
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path)
    parser.add_argument("--conversations", type=int, help="measure fewer conversations")
    arguments = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(mp_context=spawn) as pool:
        sections = list(pool.map(measure, PLANS, [arguments.conversations] * len(PLANS)))
    lines = [
        "# Checkpoints of Gated DeltaNet's states in 8 bits",
        "",
        f"`python -m benchmarks.compressed_checkpoints` on {machine(host())}, one thread for each "
        "model, seed 0.",
        "",
        *INTRODUCTION,
        *compare_with_engine("qwen3-next"),
        *itertools.chain(*sections),
        "## Bytes of one state layer of Qwen3.6-35B-A3B",
        "",
        *sizes(),
    ]
    print("\n".join(lines))
    if arguments.output is not None:
        arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
