# SPDX-License-Identifier: Apache-2.0
"""Check which layers get or share k8v4 pages, and that start-up finds layers with wrong pages."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from testing import planted_faults
from testing.engine_host import EngineError, EngineHost
from testing.model_cases import settings
from testing.models import SHARED_LAYERS, build_model, gemma4_config
from testing.tokenizer import random_prompt

pytestmark = pytest.mark.engine

SHORT, LONG = random_prompt(33, seed=3), random_prompt(700, seed=4)


def boundary(number: int) -> dict[str, Any]:
    return {"additional_config": {"hybrid_kv": {"boundary_layers": number}}}


SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "boundary layers": boundary(2),
    "skipped layer whose pages are shared": {"kv_cache_dtype_skip_layers": ["5"]},
    "skipped sharing layer": {"kv_cache_dtype_skip_layers": ["9"]},
}
BOUND = 0.2
WIDE_ERROR = 0.110
"""Mean error of the log-probabilities of the model `wide`, divided by their standard deviation.
Measured with transformers in float32, with a cache whose contents were quantised and dequantised
by `reference`."""
OURS = "K8V4AttentionBackend"

Model = Callable[..., Path]
Plant = Callable[[str], None]


def engine(host: EngineHost, model: Path, dtype: str, **more: Any) -> EngineHost:
    more = {"kv_cache_dtype": dtype, "max_num_seqs": 8, **more}
    return host.engine(**settings(model, "bfloat16", **more))


def layers_of(running: EngineHost) -> dict[int, dict[str, Any]]:
    """Return the engine's attention layers by index, without linear attention."""
    layers = running.layers().items()
    found = {int(n.split(".")[2]): layer for n, layer in layers if "linear_attn" not in n}
    return dict(sorted(found.items()))


def log_probabilities(running: EngineHost) -> list[float]:
    """Return the log-probabilities of two prompts, and of their outputs without and with hits."""
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
def unquantised(host: EngineHost, small_model: Model) -> Callable[[str], list[float]]:
    """A function that returns a model's log-probabilities with an unquantised cache."""
    return cache(lambda name: log_probabilities(engine(host, small_model(name), "auto")))


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *(("gemma4", how) for how in SETTINGS),
        *((name, how) for name in ("gemma3n", "llama4") for how in list(SETTINGS)[:2]),
    ],
)
def test_log_probabilities_are_close_to_those_of_an_unquantised_cache(
    host: EngineHost,
    small_model: Model,
    unquantised: Callable[[str], list[float]],
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
    if name != "llama4":
        layers = layers_of(running)
        for index in range(10 - SHARED_LAYERS, 10):
            assert layers[index]["backend"] == layers[4 + index % 2]["backend"]


@pytest.mark.parametrize(
    ("fault", "settings", "words"),
    [
        (
            planted_faults.DTYPE_FAULT,
            SETTINGS["skipped sharing layer"],
            "layer model.layers.9.self_attn.attn cannot use the pages of layer "
            "model.layers.5.self_attn.attn: its quantisation is NONE, that of the pages is "
            "TURBOQUANT_K8V4",
        ),
        (
            planted_faults.HEAD_SIZE_FAULT,
            {},
            "which it shares with layer model.layers.2.self_attn.attn: its head size is 64, "
            "that of the pages is 128",
        ),
        (
            None,
            {**SETTINGS["boundary layers"], "disable_hybrid_kv_cache_manager": True},
            "of different sizes, as with --disable-hybrid-kv",
        ),
    ],
)
def test_pages_that_do_not_fit_a_layer_stop_start_up(
    host: EngineHost,
    small_model: Model,
    plant: Plant,
    fault: str,
    settings: dict[str, Any],
    words: str,
) -> None:
    host.stop()
    plant(fault)
    with pytest.raises(EngineError) as caught:
        engine(host, small_model("gemma4"), "turboquant_k8v4", **settings)
    assert words in str(caught.value)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 4 with its real head sizes: 256 in window layers, 512 in global ones."""
    return build_model(gemma4_config(512, 256), tmp_path_factory.mktemp("wide"))


def test_heads_of_256_next_to_512_differ_from_an_unquantised_cache_by_the_formats_error(
    host: EngineHost, wide: Path
) -> None:
    found = {}
    for dtype in ("auto", "turboquant_k8v4"):
        running = engine(host, wide, dtype)
        outputs = running.generate([LONG, SHORT], 1, prompt_logprobs=True)
        found[dtype] = [number for o in outputs for number in o.prompt_logprobs or []]
    layers = layers_of(running)
    assert all(layer["backend"].endswith(OURS) for layer in layers.values())
    per_token = [layers[i]["content_bytes"] / layers[i]["block_size"] for i in (0, 1)]
    assert per_token == [2 * (256 + 128 + 4), 2 * (512 + 256 + 4)]

    pairs = zip(found["auto"], found["turboquant_k8v4"], strict=True)
    error = statistics.fmean(abs(a - b) for a, b in pairs)
    spread = statistics.pstdev(found["auto"])
    print(f"heads of 256 and 512: mean error {error / spread:.3f} of the standard deviation")
    # Activations differ slightly between CPUs, and so do the codes of a few keys and values.
    assert error / spread == pytest.approx(WIDE_ERROR, rel=0.1)


def test_a_wrong_kernel_stops_start_up_with_the_layer_the_error_and_the_remedy(
    host: EngineHost, wide: Path, plant: Plant
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


@pytest.mark.parametrize(
    ("model", "number", "skipped", "quantised"),
    [
        ("llama", 0, [], [0, 1, 2, 3, 4, 5, 6, 7]),
        ("llama", 2, ["3"], [2, 4, 5]),
        ("gemma3", 2, [], [2, 3, 4, 5]),
        ("gemma3", 0, ["sliding_window"], [1, 3, 5, 7]),
        ("qwen3-next", 2, [], [3, 7]),
        ("qwen3-next", 0, ["7"], [3]),
    ],
)
def test_all_but_boundary_and_skipped_layers_are_quantised(
    host: EngineHost,
    small_model: Model,
    model: str,
    number: int,
    skipped: list[str],
    quantised: list[int],
) -> None:
    more = boundary(number) if number else {}
    more |= {"kv_cache_dtype_skip_layers": skipped} if skipped else {}
    running = engine(host, small_model(model), "turboquant_k8v4", **more)
    assert len(running.generate([LONG], 2)[0].tokens) == 2
    layers = layers_of(running)
    assert list(layers) == ([3, 7] if model == "qwen3-next" else list(range(8)))
    assert [i for i, layer in layers.items() if layer["backend"].endswith(OURS)] == quantised
    head_size = 128 if model == "qwen3-next" else 64
    for index, layer in layers.items():
        # A token has two heads: 8-bit keys, 4-bit values and two scales, or bf16 keys and values.
        elements = head_size + head_size // 2 + 4 if index in quantised else 4 * head_size
        assert layer["content_bytes"] / layer["block_size"] == 2 * elements
        assert layer["backend"].endswith(OURS if index in quantised else "CPUAttentionBackend")


def test_the_capacity_of_a_dense_model_is_logged_without_a_warning(
    host: EngineHost, small_model: Model
) -> None:
    host.stop()
    before = len(host.log.read_text(errors="replace"))
    engine(host, small_model("llama"), "turboquant_k8v4")
    log = host.log.read_text(errors="replace")[before:]
    long, short = re.findall(r"(INFO|WARNING) .*\[planning\.py:\d+\] (.*)", log)
    match = re.fullmatch(
        r"KV cache of [\d,]+ blocks: ([\d,]+) tokens in requests of max_model_len "
        r"\(2,048 tokens\), ([\d,.]+) of them at once; ([\d,]+) whole requests always fit.*",
        long[1],
    )
    assert match, long
    tokens, concurrency, whole = (float(text.replace(",", "")) for text in match.groups())
    assert tokens == host.started["capacity_tokens"]
    assert concurrency == pytest.approx(tokens / 2048, abs=0.01)
    assert concurrency - 2 < whole <= concurrency
    assert re.match(r"Short requests \(512 tokens\): [\d,]+ always fit at once", short[1]), short
    assert long[0] == short[0] == "INFO"
