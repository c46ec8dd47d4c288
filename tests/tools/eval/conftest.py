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
"""The longest sequence needs three chunks. Without `dtype` vLLM would use bfloat16."""


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of a small dense model with random weights in float32."""
    import torch

    from testing.models import CONFIGS, build_model

    folder = tmp_path_factory.mktemp("models") / "llama"
    return build_model(CONFIGS["llama"](), folder, torch.float32)


@pytest.fixture(scope="session")
def sequences(model):
    """Random tokens of the model's vocabulary."""
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
    """The environment of the commands."""
    kept = {k: value for k, value in os.environ.items() if not k.startswith("VLLM_HYBRID_KV_")}
    return {**kept, "HF_HUB_OFFLINE": "1", "COLUMNS": "120", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def run(command, environment):
    """A function that runs an evaluation as a user does."""

    return lambda caches, work, *more: processes.run(
        command(caches, work, *more), cwd=work.parent, timeout_s=540, **environment
    )
