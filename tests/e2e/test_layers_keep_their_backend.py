# SPDX-License-Identifier: Apache-2.0
"""The layers that get k8v4 pages in a running engine, and the log lines about its plan."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from testing.engine_host import EngineHost
from testing.model_cases import settings
from testing.tokenizer import random_prompt

pytestmark = pytest.mark.engine

BF16_BYTES = 2

Start = Callable[..., dict[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def start(host: EngineHost, small_model: Callable[..., Path]) -> Start:
    """A function that starts an engine and returns its attention layers by index."""

    def run(model: str, **more: Any) -> dict[int, dict[str, Any]]:
        engine = host.engine(**settings(small_model(model), "bfloat16", **more))
        (output,) = engine.generate([random_prompt(300, seed=3)], 2)
        assert len(output.tokens) == 2
        return {
            int(name.split(".")[2]): layer
            for name, layer in engine.layers().items()
            if "linear_attn" not in name
        }

    return run


def planning_log(host: EngineHost, since: int = 0) -> list[str]:
    """Return the level and the text of the plugin's log lines about plans after a position."""
    lines = host.log.read_text(errors="replace")[since:].splitlines()
    found = [re.search(r"(INFO|WARNING) .*\[planning\.py:\d+\] (.*)", line) for line in lines]
    return [f"{match[1]} {match[2]}" for match in found if match]


CAPACITY = (
    r"INFO KV cache of ([\d,]+) blocks: ([\d,]+) tokens in requests of max_model_len "
    r"\(2,048 tokens\), ([\d,.]+) of them at once; ([\d,]+) whole requests always fit"
)


def is_quantised(layer: dict[str, Any]) -> bool:
    return "vllm_hybrid_kv" in layer["backend"]


@pytest.mark.parametrize(
    ("model", "skipped", "quantised"),
    [
        ("llama", [], [2, 3, 4, 5]),
        ("llama", ["3"], [2, 4, 5]),
        ("gemma3", [], [2, 3, 4, 5]),
        ("gemma3", ["sliding_window"], [3, 5]),
        ("qwen3-next", [], [3, 7]),
        ("qwen3-next", ["7"], [3]),
    ],
)
def test_all_but_boundary_and_skipped_layers_are_quantised(
    start: Start, model: str, skipped: list[str], quantised: list[int]
) -> None:
    found = start(model, **({"kv_cache_dtype_skip_layers": skipped} if skipped else {}))
    assert sorted(found) == ([3, 7] if model == "qwen3-next" else list(range(8)))
    assert [i for i in sorted(found) if is_quantised(found[i])] == quantised
    head_size = 128 if model == "qwen3-next" else 64
    for layer in found.values():
        per_token = layer["content_bytes"] / layer["block_size"]
        if is_quantised(layer):
            assert per_token == 2 * (head_size + head_size // 2 + 4)
        else:
            assert layer["backend"].endswith("CPUAttentionBackend")
            assert per_token == 2 * 2 * head_size * BF16_BYTES


def test_the_capacity_of_a_dense_model_is_logged_without_a_warning(
    host: EngineHost, start: Start
) -> None:
    before = len(host.log.read_text(errors="replace"))
    start("llama", max_num_seqs=31)
    long, short = planning_log(host, before)
    assert re.match(CAPACITY, long)
    assert short.startswith("INFO Short requests (512 tokens): ")


def test_following_the_padding_warning_reduces_the_padding(host: EngineHost, start: Start) -> None:
    # With vLLM's own planning, the states next to a skipped layer are padded by several MB.
    options: dict[str, Any] = {
        "kv_cache_dtype_skip_layers": ["7"],
        "additional_config": {
            "hybrid_kv": {"unify_page_sizes": "stock", "token_capacity_groups": "stock"}
        },
    }
    start("qwen3-next", **options)
    long, short, warning = planning_log(host)[-3:]
    match = re.match(CAPACITY, long)
    assert match is not None, long
    tokens, whole = (int(match[group].replace(",", "")) for group in (2, 4))
    concurrency = float(match[3].replace(",", ""))
    assert tokens == host.started["capacity_tokens"]
    assert concurrency == pytest.approx(tokens / 2048, abs=0.01)
    assert concurrency - 2 < whole <= concurrency
    assert re.match(r"INFO Short requests \(512 tokens\): [\d,]+ always fit at once", short), short
    padding = re.match(r"WARNING (\d+\.\d) % of the KV pool is padding,", warning)
    advice = re.search(r"; pass --block-size (\d+), because vLLM pads states", warning)
    assert padding, warning
    assert advice, warning

    before = len(host.log.read_text(errors="replace"))
    start("qwen3-next", block_size=int(advice[1]), **options)
    lines = [line for line in planning_log(host, before) if "is padding" in line]
    now = re.match(r"WARNING (\d+\.\d) %", lines[0]) if lines else None
    assert now is None or float(now[1]) < float(padding[1]), lines
