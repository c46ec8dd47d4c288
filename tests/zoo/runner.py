# SPDX-License-Identifier: Apache-2.0
"""Run as a process that gets names of architectures and returns the results of their engines.

It runs each architecture's small model with `auto` and with k8v4.
"""

from __future__ import annotations

import gc
import json
import math
import random
import statistics
import tempfile
import traceback
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from testing.engine_host import execute_commands

DTYPES = ("auto", "turboquant_k8v4")
LENGTHS = (900, 640, 333, 97)


def run(architecture: str) -> dict[str, Any]:
    """Run an architecture's small model with each dtype; return its outputs, or why it fails."""
    from testing.output_comparison import errors_of
    from tests.zoo.tiny import small_model

    fields, name = small_model(architecture)
    row: dict[str, Any] = {"model": name}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(fields, default=str))
        for dtype in DTYPES:
            try:
                row[dtype] = _run_engine(folder, dtype)
            except Exception as error:
                traceback.print_exc()
                row[dtype] = {"refused": _reason(error)}
                break
        else:
            auto, k8v4 = (row[dtype].pop("logprobs") for dtype in DTYPES)
            row["errors"] = errors_of(auto, k8v4, row["auto"]["head_size"], statistics.pstdev(auto))
            row["lengths"] = list(LENGTHS)
    row["auto"].pop("logprobs", None)
    return row


def _reason(error: Exception) -> str:
    """Return vLLM's own message in one line. For other errors, name the failing layer's class."""
    if isinstance(error, ValueError | NotImplementedError):
        return " ".join(str(error).split())[:300]
    failing = "model"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        layer = frame.f_locals.get("self")
        if isinstance(layer, torch.nn.Module) and type(layer).__module__.startswith("vllm."):
            failing = type(layer).__name__
    return f"vLLM's {failing} fails"


def _run_engine(folder: str, dtype: str) -> dict[str, Any]:
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    from testing.engine_worker import start_engine, stop_engine
    from testing.output_comparison import UNQUANTISED_ENDS
    from tests.zoo.weights import fill

    def load_weights(self: Any, model: Any, model_config: Any) -> None:
        fill(model)

    try:
        with patch.object(DummyModelLoader, "load_weights", load_weights):
            llm = start_engine(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                kv_cache_dtype=dtype,
                additional_config={"hybrid_kv": UNQUANTISED_ENDS},
                dtype="bfloat16",
                enforce_eager=True,
                enable_prefix_caching=True,
                max_model_len=1024,
                max_num_seqs=8,
                max_num_batched_tokens=2048,
                gpu_memory_utilization=0.1,
                disable_log_stats=False,
                seed=0,
            )
        try:
            return _measure(llm)
        finally:
            stop_engine(llm)
            del llm
    finally:
        gc.collect()


def _measure(llm: Any) -> dict[str, Any]:
    """Send prompts for their log-probabilities, then each one twice to use the prefix cache."""
    from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes

    from testing.engine_worker import Worker
    from tests.zoo.tiny import VOCABULARY
    from vllm_hybrid_kv.planning.capacity import smallest_hit

    draws = (random.Random(length) for length in LENGTHS)
    prompts = [
        [draw.randrange(4, VOCABULARY) for _ in range(length)]
        for draw, length in zip(draws, LENGTHS, strict=True)
    ]
    generate = Worker(llm).generate
    outputs = generate(prompts, 1, prompt_logprobs=True)
    logprobs = [value for output in outputs for value in output.prompt_logprobs or []]
    fresh = generate(prompts, 4, alone=True, fresh=True)
    generate(prompts, 4, alone=True)
    again = generate(prompts, 4, alone=True)
    config = llm.llm_engine.vllm_config
    plan = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    return {
        "logprobs": logprobs,
        "apart": max(_difference(a, b) for a, b in zip(fresh, again, strict=True)),
        "cached": [output.cached for output in again],
        "head_size": config.model_config.get_head_size(),
        "smallest_hit": smallest_hit(config, plan, *resolve_kv_cache_block_sizes(plan, config)),
    }


def _difference(one: Any, other: Any) -> float:
    """Compare log-probabilities of equal tokens. Returns inf if decisive first tokens differ."""
    if one.tokens[0] != other.tokens[0] and max(one.margins[0], other.margins[0]) > 0.5:
        return math.inf
    largest = 0.0
    for a, b, x, y in zip(one.tokens, other.tokens, one.logprobs, other.logprobs, strict=True):
        if a != b:
            break
        largest = max(largest, abs(x - y))
    return largest


if __name__ == "__main__":
    from vllm_hybrid_kv import plugin

    plugin.register()
    execute_commands({"answer": run}.__getitem__)
