# SPDX-License-Identifier: Apache-2.0
"""Every layer uses pages of its own layout, also pages of another layer, or start-up stops."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from testing import planted_plans, random_models
from testing.engine_host import EngineError, EngineHost
from testing.workload import random_prompt

pytestmark = pytest.mark.engine

SHORT, LONG = random_prompt(33, seed=3), random_prompt(700, seed=4)
NO_BOUNDARY = {"additional_config": {"hybrid_kv": {"boundary_layers": 0}}}
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no boundary layers": NO_BOUNDARY,
    "skipped target": {**NO_BOUNDARY, "kv_cache_dtype_skip_layers": ["5"]},
    "skipped sharing layer": {**NO_BOUNDARY, "kv_cache_dtype_skip_layers": ["9"]},
}
BOUND = 0.2
CASES = [
    *(("gemma4", how) for how in SETTINGS),
    *(("gemma3n", how) for how in list(SETTINGS)[:2]),
    *(("llama4", how) for how in list(SETTINGS)[:2]),
]


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that builds a model of `random_models` once."""
    folder = tmp_path_factory.mktemp("random")

    def build(name: str) -> Path:
        path = folder / name
        return path if path.exists() else random_models.build(name, path)

    return build


def engine(host: EngineHost, model: Path, dtype: str, **more: Any) -> EngineHost:
    return host.engine(
        model=str(model),
        dtype="bfloat16",
        kv_cache_dtype=dtype,
        enforce_eager=True,
        max_num_seqs=8,
        max_num_batched_tokens=2048,
        **more,
    )


def log_probabilities(running: EngineHost) -> list[float]:
    """Return those of the prompts, and of the answers to prompts that are sent twice."""
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
def unquantised(
    host: EngineHost, random_model: Callable[[str], Path]
) -> Callable[[str], list[float]]:
    """A function that returns a model's log-probabilities with an unquantised cache."""
    measured: dict[str, list[float]] = {}

    def measure(name: str) -> list[float]:
        if name not in measured:
            measured[name] = log_probabilities(engine(host, random_model(name), "auto"))
        return measured[name]

    return measure


@pytest.mark.parametrize(("name", "how"), CASES)
def test_log_probabilities_are_near_those_of_an_unquantised_cache(
    host: EngineHost,
    random_model: Callable[[str], Path],
    unquantised: Callable[[str], list[float]],
    name: str,
    how: str,
) -> None:
    right = unquantised(name)
    running = engine(host, random_model(name), "turboquant_k8v4", **SETTINGS[how])
    found = log_probabilities(running)
    assert all(map(math.isfinite, found))
    prompts = len(SHORT) + len(LONG) - 2
    errors = [abs(a - b) for a, b in zip(found[:prompts], right[:prompts], strict=True)]
    share = statistics.fmean(errors) / statistics.pstdev(right[:prompts])
    print(f"{name}, {how}: mean error {share:.3f} of the standard deviation")
    assert share < BOUND
    layers = {int(n.split(".")[2]): layer["backend"] for n, layer in running.layers().items()}
    for index in range(10 - random_models.SHARED_LAYERS, 10) if name != "llama4" else ():
        assert layers[index] == layers[4 + index % 2]


@pytest.mark.parametrize(
    ("fault", "settings", "words"),
    [
        (
            planted_plans.DTYPE,
            SETTINGS["skipped sharing layer"],
            "layer model.layers.9.self_attn.attn cannot use the pages of layer "
            "model.layers.5.self_attn.attn: its cache dtype is auto (NONE), theirs is "
            "TURBOQUANT_K8V4",
        ),
        (
            planted_plans.HEAD_SIZE,
            NO_BOUNDARY,
            "which it shares with layer model.layers.2.self_attn.attn: its head size is 64, "
            "theirs is 128",
        ),
    ],
)
def test_a_plan_that_does_not_fit_a_layer_stops_start_up(
    host: EngineHost,
    random_model: Callable[[str], Path],
    fault: str,
    settings: dict[str, Any],
    words: str,
) -> None:
    host.plant_in_plans(fault)
    try:
        with pytest.raises(EngineError) as caught:
            engine(host, random_model("gemma4"), "turboquant_k8v4", **settings)
    finally:
        host.plant_in_plans(None)
    assert "LayerPagesError" in str(caught.value)
    assert words in str(caught.value)


def test_pages_that_vllm_cannot_share_stop_start_up(
    host: EngineHost, random_model: Callable[[str], Path]
) -> None:
    with pytest.raises(EngineError, match=r"layer .* of different sizes, as --disable-hybrid-kv"):
        engine(
            host,
            random_model("gemma4"),
            "turboquant_k8v4",
            disable_hybrid_kv_cache_manager=True,
        )
