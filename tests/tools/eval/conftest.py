# SPDX-License-Identifier: Apache-2.0
import json
import os
import random
import sys
from pathlib import Path

import pytest

from testing import processes

LENGTHS = (150, 90, 33)
ENGINE = {"max_num_batched_tokens": 64, "dtype": "float32"}
"""Chunks of 64 tokens split the longest sequence in three. vLLM's default dtype is bfloat16."""


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Write a small dense model with random float32 weights; return its folder."""
    import torch

    from testing.models import CONFIGS, build_model

    folder = tmp_path_factory.mktemp("models") / "llama"
    return build_model(CONFIGS["llama"](), folder, torch.float32)


@pytest.fixture(scope="session")
def sequences(model):
    """Random token ids from the model's vocabulary, one sequence for each of `LENGTHS`."""
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    drawn = random.Random(0)
    return [[drawn.randrange(size) for _ in range(length)] for length in LENGTHS]


@pytest.fixture(scope="session")
def command(model, sequences, tmp_path_factory):
    """A function that returns the command line of an evaluation."""
    data = tmp_path_factory.mktemp("data") / "tokens.jsonl"
    data.write_text("".join(f"{json.dumps({'prompt_token_ids': s})}\n" for s in sequences))

    def make(caches, work, *more):
        return [
            str(Path(sys.executable).with_name("vllm-hybrid-kv")),
            *("eval", str(model), "--data", str(data), "--kv-cache-dtype", caches),
            *("--engine-args", json.dumps(ENGINE)),
            *("--work", str(work), *map(str, more)),
        ]

    return make


@pytest.fixture(scope="session")
def environment():
    kept = {k: value for k, value in os.environ.items() if not k.startswith("VLLM_HYBRID_KV_")}
    return {**kept, "HF_HUB_OFFLINE": "1", "COLUMNS": "120", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def run(command, environment):
    """A function that runs `vllm-hybrid-kv eval` in a new process, as a user does."""

    return lambda caches, work, *more: processes.run(
        command(caches, work, *more), cwd=work.parent, timeout_s=540, **environment
    )
