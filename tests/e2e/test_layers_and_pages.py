# SPDX-License-Identifier: Apache-2.0
"""Each layer uses pages of its own layout, also those of another layer, or start-up stops."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from testing import planted_faults
from testing.engine_host import EngineError, EngineHost
from testing.model_cases import settings
from testing.models import SHARED_LAYERS, build_model, gemma4_config
from testing.output_comparison import format_error
from testing.tokenizer import random_prompt

pytestmark = pytest.mark.engine

SHORT, LONG = random_prompt(33, seed=3), random_prompt(700, seed=4)
ALL_QUANTISED = {"additional_config": {"hybrid_kv": {"boundary_layers": 0}}}
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no boundary layers": ALL_QUANTISED,
    "skipped layer whose pages are shared": {**ALL_QUANTISED, "kv_cache_dtype_skip_layers": ["5"]},
    "skipped sharing layer": {**ALL_QUANTISED, "kv_cache_dtype_skip_layers": ["9"]},
}
BOUND = 0.2
CASES = [
    *(("gemma4", how) for how in SETTINGS),
    *(("gemma3n", how) for how in list(SETTINGS)[:2]),
    *(("llama4", how) for how in list(SETTINGS)[:2]),
]

Unquantised = Callable[[str], list[float]]


def engine(host: EngineHost, model: Path, dtype: str, **more: Any) -> EngineHost:
    more = {"kv_cache_dtype": dtype, "max_num_seqs": 8, **more}
    return host.engine(**settings(model, "bfloat16", **more))


def log_probabilities(running: EngineHost) -> list[float]:
    """Return those of the prompts, and of the outputs of prompts that are sent twice."""
    prompts = [SHORT, LONG]
    of_prompts = running.generate(prompts, 1, prompt_logprobs=True, alone=True)
    first = running.generate(prompts, 4, alone=True, fresh=True)
    second = running.generate(prompts, 4, alone=True)
    for fresh, cached in zip(first, second, strict=True):
        assert cached.tokens == fresh.tokens
        assert cached.logprobs == pytest.approx(fresh.logprobs, abs=0.5)
    return [
        *(number for output in of_prompts for number in output.prompt_logprobs or []),
        *(number for output in (*first, *second) for number in output.logprobs),
    ]


@pytest.fixture(scope="module")
def unquantised(host: EngineHost, small_model: Callable[..., Path]) -> Unquantised:
    """A function that returns a model's log-probabilities with an unquantised cache."""
    measured: dict[str, list[float]] = {}

    def measure(name: str) -> list[float]:
        if name not in measured:
            measured[name] = log_probabilities(engine(host, small_model(name), "auto"))
        return measured[name]

    return measure


@pytest.mark.parametrize(("name", "how"), CASES)
def test_log_probabilities_are_close_to_those_of_an_unquantised_cache(
    host: EngineHost,
    small_model: Callable[..., Path],
    unquantised: Unquantised,
    name: str,
    how: str,
) -> None:
    right = unquantised(name)
    running = engine(host, small_model(name), "turboquant_k8v4", **SETTINGS[how])
    found = log_probabilities(running)
    assert all(map(math.isfinite, found))
    prompts = len(SHORT) + len(LONG) - 2
    errors = [abs(a - b) for a, b in zip(found[:prompts], right[:prompts], strict=True)]
    share = statistics.fmean(errors) / statistics.pstdev(right[:prompts])
    print(f"{name}, {how}: mean error {share:.3f} of the standard deviation")
    assert share < BOUND
    layers = {int(n.split(".")[2]): layer["backend"] for n, layer in running.layers().items()}
    for index in range(10 - SHARED_LAYERS, 10) if name != "llama4" else ():
        assert layers[index] == layers[4 + index % 2]


@pytest.mark.parametrize(
    ("fault", "settings", "words"),
    [
        (
            planted_faults.DTYPE_FAULT,
            SETTINGS["skipped sharing layer"],
            "layer model.layers.9.self_attn.attn cannot use the pages of layer "
            "model.layers.5.self_attn.attn: its cache dtype is auto (NONE), theirs is "
            "TURBOQUANT_K8V4",
        ),
        (
            planted_faults.HEAD_SIZE_FAULT,
            ALL_QUANTISED,
            "which it shares with layer model.layers.2.self_attn.attn: its head size is 64, "
            "theirs is 128",
        ),
    ],
)
def test_a_plan_that_does_not_fit_a_layer_stops_start_up(
    host: EngineHost,
    small_model: Callable[..., Path],
    plant: Callable[[str], None],
    fault: str,
    settings: dict[str, Any],
    words: str,
) -> None:
    plant(fault)
    with pytest.raises(EngineError) as caught:
        engine(host, small_model("gemma4"), "turboquant_k8v4", **settings)
    assert "LayerPagesError" in str(caught.value)
    assert words in str(caught.value)


def test_pages_that_vllm_cannot_share_stop_start_up(
    host: EngineHost, small_model: Callable[..., Path]
) -> None:
    more = {"disable_hybrid_kv_cache_manager": True}
    with pytest.raises(EngineError, match=r"of different sizes, as with --disable-hybrid-kv"):
        engine(host, small_model("gemma4"), "turboquant_k8v4", **more)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 4 whose global layers have heads of 512 elements."""
    return build_model(gemma4_config(512), tmp_path_factory.mktemp("wide"))


def test_heads_of_512_next_to_64_are_close_to_an_unquantised_cache(
    host: EngineHost, wide: Path
) -> None:
    found = {}
    for dtype in ("auto", "turboquant_k8v4"):
        running = engine(host, wide, dtype, **ALL_QUANTISED)
        outputs = running.generate([LONG, SHORT], 4, prompt_logprobs=True)
        found[dtype] = [number for o in outputs for number in o.prompt_logprobs or []]
    layers = running.layers()
    assert {layer["backend"].rsplit(".", 1)[1] for layer in layers.values()} == {
        "K8V4AttentionBackend"
    }
    per_token = {
        int(name.split(".")[2]): layer["content_bytes"] / layer["block_size"]
        for name, layer in layers.items()
    }
    assert per_token[0] == 2 * (64 + 32 + 4)
    assert per_token[1] == 2 * (512 + 256 + 4)
    pairs = zip(found["auto"], found["turboquant_k8v4"], strict=True)
    error = statistics.fmean(abs(a - b) for a, b in pairs)
    spread = statistics.pstdev(found["auto"])
    print(f"heads of 512: mean error {error / spread:.3f} of the standard deviation")
    assert 0.005 * spread < error < math.sqrt(2 / math.pi) * format_error(512) * spread


def test_a_wrong_kernel_stops_start_up_with_the_layer_the_error_and_the_remedy(
    host: EngineHost, wide: Path, plant: Callable[[str], None]
) -> None:
    host.stop()
    plant(planted_faults.KERNEL_FAULT)
    with pytest.raises(
        EngineError,
        match=r"HybridKVKernelError: layer model.layers.*fail their known-answer test: "
        r"(decode|a step of \d+ new tokens) has a relative error of \S+, the bound is 0\.01\. "
        r"Serve the model with --kv-cache-dtype auto",
    ):
        engine(host, wide, "turboquant_k8v4")
