# SPDX-License-Identifier: Apache-2.0
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

LENGTHS = (150, 90, 33)
ENGINE = {"max_num_batched_tokens": 64, "dtype": "float32"}
"""Chunks that the longest has three of; and vLLM would else take bfloat16 for float32."""


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of a small dense model with random weights in float32."""
    import torch

    from testing.models import CONFIGS, build_model

    folder = tmp_path_factory.mktemp("models") / "llama"
    return build_model(CONFIGS["llama"](), folder, torch.float32)


@pytest.fixture(scope="session")
def sequences(model):
    """Random tokens of that model's."""
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    drawn = random.Random(0)
    return [[drawn.randrange(size) for _ in range(length)] for length in LENGTHS]


@pytest.fixture(scope="session")
def data(sequences, tmp_path_factory):
    """The file with them."""
    file = tmp_path_factory.mktemp("data") / "tokens.jsonl"
    lines = (json.dumps({"prompt_token_ids": tokens}) for tokens in sequences)
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


@pytest.fixture(scope="session")
def command(model, data):
    """A function that makes the command line of an evaluation."""

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
    """What commands run in."""
    ours = {name for name in os.environ if name.startswith("VLLM_HYBRID_KV_")}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return {**kept, "HF_HUB_OFFLINE": "1", "COLUMNS": "120", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def run(command, environment):
    """A function that runs an evaluation, as a user does."""

    def call(caches, work, *more, **variables):
        return subprocess.run(
            command(caches, work, *more),
            env={**environment, **variables},
            cwd=work.parent,
            capture_output=True,
            text=True,
            timeout=540,
            check=False,
        )

    return call
