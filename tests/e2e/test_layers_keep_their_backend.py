# SPDX-License-Identifier: Apache-2.0
"""Which layers get k8v4 pages, read off a running engine, and what start-up says of the plan."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from testing.engine_host import EngineHost
from testing.workload import Case, random_prompt, settings

pytestmark = pytest.mark.engine

BF16_BYTES = 2


def layers(
    host: EngineHost, small_model: Callable[[str, str], Path], model: str, **more: Any
) -> dict[int, dict[str, Any]]:
    """Return what vLLM's runner holds for each attention layer, by index."""
    case = Case(model, "bfloat16", rounding=0.0, tokens=1, candidates=1)
    engine = host.engine(**settings(small_model(model, case.dtype), case, **more))
    # It runs, too.
    (output,) = engine.generate([random_prompt(300, seed=3)], 2)
    assert len(output.tokens) == 2
    return {
        int(name.split(".")[2]): layer
        for name, layer in engine.layers().items()
        if "linear_attn" not in name
    }


def said(host: EngineHost, since: int = 0) -> list[str]:
    """Return what the plugin logged of plans behind a place in the log, levels before."""
    lines = host.log.read_text(errors="replace")[since:].splitlines()
    found = [re.search(r"(INFO|WARNING) .*\[planning\.py:\d+\] (.*)", line) for line in lines]
    return [f"{match[1]} {match[2]}" for match in found if match]


CAPACITY = (
    r"INFO KV cache of ([\d,]+) blocks: ([\d,]+) tokens in requests of max_model_len "
    r"\(2,048 tokens\), ([\d,.]+) of them at once; ([\d,]+) whole requests always fit"
)


def is_quantised(layer: dict[str, Any]) -> bool:
    return "vllm_hybrid_kv" in layer["backend"]


@pytest.mark.parametrize("model", ["llama", "gemma3"])
def test_boundary_layers_of_dense_models_keep_their_backend_and_bytes(
    host: EngineHost, small_model: Callable[[str, str], Path], model: str
) -> None:
    before = len(host.log.read_text(errors="replace"))
    found = layers(host, small_model, model)
    assert sorted(found) == list(range(8))
    if model == "llama":
        # No warning, though the first layer, which is not quantised, represents all.
        long, short = said(host, before)
        assert re.match(CAPACITY, long)
        assert short.startswith("INFO Short requests (512 tokens): ")
    assert [i for i in sorted(found) if is_quantised(found[i])] == [2, 3, 4, 5]
    kv_heads, head_size = 2, 64
    for layer in found.values():
        per_token = layer["content_bytes"] / layer["block_size"]
        if is_quantised(layer):
            assert per_token == kv_heads * (head_size + head_size // 2 + 4)
        else:
            assert layer["backend"].endswith("CPUAttentionBackend")
            assert per_token == kv_heads * 2 * head_size * BF16_BYTES


def test_layers_to_skip_are_added_to_the_boundary(
    host: EngineHost, small_model: Callable[[str, str], Path]
) -> None:
    found = layers(host, small_model, "llama", kv_cache_dtype_skip_layers=["3"])
    assert [i for i in sorted(found) if is_quantised(found[i])] == [2, 4, 5]


def test_layer_kinds_can_be_skipped_by_name(
    host: EngineHost, small_model: Callable[[str, str], Path]
) -> None:
    found = layers(host, small_model, "gemma3", kv_cache_dtype_skip_layers=["sliding_window"])
    assert [i for i in sorted(found) if is_quantised(found[i])] == [3, 5]


def test_every_attention_layer_of_a_hybrid_model_is_quantised(
    host: EngineHost, small_model: Callable[[str, str], Path]
) -> None:
    found = layers(host, small_model, "qwen3-next")
    assert sorted(found) == [3, 7]
    assert all(map(is_quantised, found.values()))


def test_a_hybrid_model_can_skip_a_layer(
    host: EngineHost, small_model: Callable[[str, str], Path]
) -> None:
    found = layers(host, small_model, "qwen3-next", kv_cache_dtype_skip_layers=["7"])
    assert [i for i in sorted(found) if is_quantised(found[i])] == [3]


def test_following_the_padding_warning_reduces_the_padding(
    host: EngineHost, small_model: Callable[[str, str], Path]
) -> None:
    # With vLLM's own planning, the states next to a skipped layer are padded by several MB.
    options: dict[str, Any] = {
        "kv_cache_dtype_skip_layers": ["7"],
        "additional_config": {
            "hybrid_kv": {"unify_page_sizes": "stock", "token_capacity_groups": "stock"}
        },
    }
    layers(host, small_model, "qwen3-next", **options)
    long, short, warning = said(host)[-3:]
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
    layers(host, small_model, "qwen3-next", block_size=int(advice[1]), **options)
    lines = [line for line in said(host, before) if "is padding" in line]
    now = re.match(r"WARNING (\d+\.\d) %", lines[0]) if lines else None
    assert now is None or float(now[1]) < float(padding[1]), lines
