# SPDX-License-Identifier: Apache-2.0
"""Models and options that cannot be served are refused with one message that names the remedy."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, DeepseekV2Config, Gemma4TextConfig, PreTrainedConfig

from testing.engine_host import BASE_ENVIRONMENT, EngineError, EngineHost
from testing.models import gemma3_config, llama_config
from testing.processes import kill_group, start_group
from testing.tokenizer import VOCAB_SIZE, build_tokenizer

pytestmark = pytest.mark.engine

TIMEOUT_S = 240.0
SKIP = "--kv-cache-dtype-skip-layers"

Write = Callable[[PreTrainedConfig, str], Path]
Refuse = Callable[..., str]
Follow = Callable[[dict[str, object]], dict[int, str]]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A function that writes a model without weights; vLLM creates them if it gets that far."""

    def run(config: PreTrainedConfig, architecture: str) -> Path:
        config.architectures = [architecture]
        config.save_pretrained(tmp_path)
        build_tokenizer(tmp_path)
        return tmp_path

    return run


@pytest.fixture
def serve_refused(write: Write) -> Refuse:
    """A function that runs `vllm serve` on a model, asserts that it fails, returns its output."""

    def run(config: PreTrainedConfig, architecture: str, *arguments: str) -> str:
        folder = write(config, architecture)
        command = [
            *(Path(sys.executable).with_name("vllm"), "serve", folder, "--load-format", "dummy"),
            *("--kv-cache-dtype", "turboquant_k8v4", "--gpu-memory-utilization", "0.3"),
            *("--enforce-eager", "--port", "0", *arguments),
        ]
        log = folder / "log.txt"
        process = start_group(command, log, BASE_ENVIRONMENT, cwd=folder)
        try:
            status = process.wait(TIMEOUT_S)
        finally:
            # The server may have started after all.
            kill_group(process)
        output = log.read_text(errors="replace")
        assert status not in (0, -9), output[-2000:]
        return output

    return run


@pytest.fixture
def refuse(host: EngineHost, write: Write) -> Refuse:
    """A function that starts an engine in the host and returns the error.

    A server takes half a minute to print the same error, so only two tests start one.
    """

    def run(config: PreTrainedConfig, architecture: str, **arguments: object) -> str:
        folder = write(config, architecture)
        with pytest.raises(EngineError) as caught:
            host.engine(
                model=str(folder),
                load_format="dummy",
                kv_cache_dtype="turboquant_k8v4",
                enforce_eager=True,
                **arguments,
            )
        return caught.value.reason

    return run


@pytest.fixture
def follow(host: EngineHost, tmp_path: Path) -> Follow:
    """A function that runs the refused model as advised, returns each layer's backend."""

    def run(advised: dict[str, object]) -> dict[int, str]:
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


def assert_says(reason: str, *parts: str) -> None:
    missing = [part for part in parts if part not in reason]
    assert not missing, f"no {missing} in: {reason}"


def advised_dtypes(message: str) -> list[str]:
    """Return the values of --kv-cache-dtype that a message advises."""
    found = re.search(r"serve the model with --kv-cache-dtype ([\w ]+)", message, re.IGNORECASE)
    assert found is not None, message
    return found[1].split(" or ")


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
    common = gemma3_config(layers=6).to_dict()
    kept = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads")
    config = Gemma4TextConfig(
        **{name: common[name] for name in kept},
        num_hidden_layers=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
        * 2,
        head_dim=64,
        global_head_dim=32,
        intermediate_size=512,
        sliding_window=96,
        max_position_embeddings=8192,
        vocab_size_per_layer_input=common["vocab_size"],
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
    )
    output = serve_refused(config, "Gemma4ForCausalLM")
    parts = ("model.layers.2.self_attn.attn", "64 to 256 in multiples of 8, and 512, got 32", SKIP)
    lines = [line for line in output.splitlines() if all(part in line for part in parts)]
    # The worker logs it, and it is the last line too.
    assert len(lines) == 2, output[-4000:]
    assert output.splitlines()[-1] == lines[1]
    assert lines[1].startswith("hybrid_kv: layer ")
    assert lines[0].endswith(lines[1][lines[1].index(parts[0]) :])
    skipped = re.search(rf"{SKIP} ([\d ]+), or", lines[1])
    assert skipped is not None, lines
    # vLLM itself skips the first and the last two.
    assert skipped[1] == "0 1 2 3 6 7"
    backends = follow(
        {
            "kv_cache_dtype": "turboquant_k8v4",
            "kv_cache_dtype_skip_layers": skipped[1].split(),
        }
    )
    assert [i for i in sorted(backends) if backends[i] == "K8V4AttentionBackend"] == [4, 5]


def test_an_unsupported_head_size_is_refused_with_dtypes_that_work(
    refuse: Refuse, follow: Follow
) -> None:
    message = refuse(llama_config(head_size=32), "LlamaForCausalLM")
    sizes = "64 to 256 in multiples of 8, and 512, got 32"
    assert_says(message, "model.layers.2.self_attn.attn", sizes)
    assert SKIP not in message
    dtypes = advised_dtypes(message)
    assert dtypes == (["auto", "fp8"] if torch.cpu._is_avx512_supported() else ["auto"])
    for dtype in dtypes:
        assert set(follow({"kv_cache_dtype": dtype}).values()) == {"CPUAttentionBackend"}


def test_a_head_size_that_vllm_does_not_support_either_is_refused_with_the_sizes_of_both(
    refuse: Refuse,
) -> None:
    message = refuse(llama_config(head_size=264), "LlamaForCausalLM")
    assert_says(
        message,
        "model.layers.2.self_attn.attn",
        "64 to 256 in multiples of 8, and 512, got 264",
        "Serve the model on a GPU: vLLM's own CPU kernels only take heads of 32, ",
    )
    assert SKIP not in message


def test_latent_attention_is_refused_with_the_dtype_that_works(
    refuse: Refuse, follow: Follow
) -> None:
    config = DeepseekV2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        n_shared_experts=1,
        n_routed_experts=2,
        num_experts_per_tok=1,
        first_k_dense_replace=6,
        # vLLM's CPU kernel for AMX needs latent heads of 576.
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_rope_head_dim=64,
        qk_nope_head_dim=64,
        v_head_dim=64,
        max_position_embeddings=2048,
    )
    message = refuse(config, "DeepseekV2ForCausalLM")
    assert_says(message, "model ", "multi-head latent")
    assert SKIP not in message
    (dtype,) = advised_dtypes(message)
    backends = follow({"kv_cache_dtype": dtype})
    assert len(backends) == 6
    assert all("MLA" in backend for backend in backends.values()), backends


def test_alibi_is_refused_with_dtypes_that_work(refuse: Refuse, follow: Follow) -> None:
    config = BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=512, n_layer=6, n_head=8)
    message = refuse(config, "BloomForCausalLM")
    assert_says(message, "transformer.h.2.self_attention.attn", "ALiBi")
    assert SKIP not in message
    dtypes = advised_dtypes(message)
    assert dtypes[0] == "auto"
    for dtype in dtypes:
        assert set(follow({"kv_cache_dtype": dtype}).values()) == {"CPUAttentionBackend"}


def test_a_cache_too_small_for_one_request_is_refused_with_the_sizes(refuse: Refuse) -> None:
    length = 1 << 19
    config = llama_config()
    config.max_position_embeddings = length
    message = refuse(config, "LlamaForCausalLM", max_model_len=length)
    # vLLM's own message.
    words = ("ValueError: To serve at least one request", str(length), "decreasing `max_model_len`")
    assert_says(message, *words)
