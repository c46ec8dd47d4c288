# SPDX-License-Identifier: Apache-2.0
"""Models and options that cannot be served are refused with one message that names the remedy."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, Gemma4TextConfig, PreTrainedConfig

from testing.engine_host import BASE_ENVIRONMENT, EngineError, EngineHost
from testing.models import gemma4_config, llama_config
from testing.processes import kill_group, start_group
from testing.tokenizer import VOCAB_SIZE, build_tokenizer

pytestmark = pytest.mark.engine

TIMEOUT_S = 240.0
SKIP = "--kv-cache-dtype-skip-layers"

Refuse = Callable[..., str]
Follow = Callable[..., dict[int, str]]


def write(config: PreTrainedConfig, architecture: str, folder: Path) -> None:
    """Write only a model's config. If vLLM does not refuse the model, it makes dummy weights."""
    config.architectures = [architecture]
    config.save_pretrained(folder)
    build_tokenizer(folder)


@pytest.fixture
def serve_refused(tmp_path: Path) -> Refuse:
    """A function that runs `vllm serve` on a model it must refuse, and returns the output."""

    def run(config: PreTrainedConfig, architecture: str, *arguments: str) -> str:
        write(config, architecture, tmp_path)
        command = [
            *(Path(sys.executable).with_name("vllm"), "serve", tmp_path, "--load-format", "dummy"),
            *("--kv-cache-dtype", "turboquant_k8v4", "--gpu-memory-utilization", "0.3"),
            *("--enforce-eager", "--port", "0", *arguments),
        ]
        log = tmp_path / "log.txt"
        process = start_group(command, log, BASE_ENVIRONMENT, cwd=tmp_path)
        try:
            status = process.wait(TIMEOUT_S)
        finally:
            # If the model was not refused, the server still runs.
            kill_group(process)
        output = log.read_text(errors="replace")
        assert status not in (0, -9), output[-2000:]
        return output

    return run


@pytest.fixture
def refuse(host: EngineHost, tmp_path: Path) -> Refuse:
    """A function that starts an engine in the host and returns its error.

    `serve_refused` takes half a minute to get the same error, so only two tests use it.
    """

    def run(config: PreTrainedConfig, architecture: str) -> str:
        write(config, architecture, tmp_path)
        arguments = {"kv_cache_dtype": "turboquant_k8v4", "enforce_eager": True}
        with pytest.raises(EngineError) as caught:
            host.engine(model=str(tmp_path), load_format="dummy", **arguments)
        return caught.value.reason

    return run


@pytest.fixture
def follow(host: EngineHost, tmp_path: Path) -> Follow:
    """A function that runs a refused model as advised and returns each layer's backend."""

    def run(**advised: object) -> dict[int, str]:
        engine = host.engine(
            model=str(tmp_path), load_format="dummy", enforce_eager=True, **advised
        )
        (output,) = engine.generate([list(range(3, 303))], 2)
        assert len(output.tokens) == 2
        return {
            int(re.search(r"\.(\d+)\.", name)[1]): layer["backend"].rsplit(".", 1)[1]
            for name, layer in engine.layers().items()
        }

    return run


def test_serve_refuses_a_cache_dtype_without_cpu_kernels_before_it_starts_an_engine(
    serve_refused: Refuse,
) -> None:
    dtype = ("--kv-cache-dtype", "turboquant_4bit_nc")
    output = serve_refused(llama_config(), "LlamaForCausalLM", *dtype)
    message = "hybrid_kv: --kv-cache-dtype turboquant_4bit_nc has no CPU kernels"
    assert output.splitlines()[-1].startswith(message), output[-2000:]
    assert "Traceback" not in output
    assert "EngineCore" not in output


def test_serve_refuses_a_head_size_with_the_layers_to_skip(
    serve_refused: Refuse, follow: Follow
) -> None:
    fields = gemma4_config(32).to_dict()
    del fields["per_layer_config"]
    fields |= {
        "global_head_dim": 32,
        "num_hidden_layers": 8,
        "num_kv_shared_layers": 0,
        "layer_types": [*["sliding_attention"] * 2, *["full_attention"] * 2] * 2,
    }
    config = Gemma4TextConfig(**fields)
    output = serve_refused(config, "Gemma4ForCausalLM")
    parts = ("model.layers.2.self_attn.attn", "64 to 256 in multiples of 8, and 512, got 32", SKIP)
    lines = [line for line in output.splitlines() if all(part in line for part in parts)]
    # The error is printed twice: the worker logs it, and the command ends with it.
    assert len(lines) == 2, output[-4000:]
    assert output.splitlines()[-1] == lines[1]
    assert lines[1].startswith("hybrid_kv: layer ")
    assert lines[0].endswith(lines[1][lines[1].index(parts[0]) :])
    (skipped,) = re.findall(rf"{SKIP} ([\d ]+), or", lines[1])
    assert skipped == "2 3 6 7"
    backends = follow(kv_cache_dtype="turboquant_k8v4", kv_cache_dtype_skip_layers=skipped.split())
    assert [i for i in sorted(backends) if backends[i] == "K8V4AttentionBackend"] == [0, 1, 4, 5]


@pytest.mark.parametrize(
    ("config", "architecture", "parts"),
    [
        (
            llama_config(head_size=32),
            "LlamaForCausalLM",
            ("model.layers.0.self_attn.attn", "64 to 256 in multiples of 8, and 512, got 32"),
        ),
        (
            BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=512, n_layer=6, n_head=8),
            "BloomForCausalLM",
            ("transformer.h.0.self_attention.attn", "ALiBi"),
        ),
    ],
    ids=["head size 32", "ALiBi"],
)
def test_an_unsupported_layer_is_refused_with_dtypes_that_work(
    refuse: Refuse,
    follow: Follow,
    config: PreTrainedConfig,
    architecture: str,
    parts: tuple[str, ...],
) -> None:
    message = refuse(config, architecture)
    assert all(part in message for part in parts), message
    assert SKIP not in message
    advice = re.search(r"serve the model with --kv-cache-dtype ([\w ]+)", message, re.IGNORECASE)
    dtypes = advice[1].split(" or ")
    assert dtypes[0] == "auto"
    if architecture == "LlamaForCausalLM":
        assert ("fp8" in dtypes) == torch.cpu._is_avx512_supported()
    for dtype in dtypes:
        backends = follow(kv_cache_dtype=dtype)
        assert list(backends.values()) == ["CPUAttentionBackend"] * config.num_hidden_layers
