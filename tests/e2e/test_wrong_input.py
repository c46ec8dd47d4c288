# SPDX-License-Identifier: Apache-2.0
"""What cannot be served is refused by `vllm serve` with one message that names the way out."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, DeepseekV2Config, Gemma4TextConfig, PreTrainedConfig

from testing.engine_host import BASE_ENVIRONMENT, EngineError, EngineHost
from testing.models import gemma3_config, llama_config
from testing.tokenizer import VOCAB_SIZE, build_tokenizer

pytestmark = pytest.mark.engine

TIMEOUT_S = 240.0
SKIP = "--kv-cache-dtype-skip-layers"

Refuse = Callable[..., str]
Follow = Callable[[dict[str, object]], dict[int, str]]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[PreTrainedConfig, str], Path]:
    """A function that writes a model without weights, which vLLM makes up if it gets that far."""

    def run(config: PreTrainedConfig, architecture: str) -> Path:
        config.architectures = [architecture]
        config.save_pretrained(tmp_path)
        build_tokenizer(tmp_path)
        return tmp_path

    return run


@pytest.fixture
def refuse(write: Callable[[PreTrainedConfig, str], Path]) -> Refuse:
    """A function that runs `vllm serve` on a model, asserts that it ends, returns its output."""

    def run(config: PreTrainedConfig, architecture: str, *arguments: str) -> str:
        folder = write(config, architecture)
        command = [
            *(Path(sys.executable).with_name("vllm"), "serve", folder, "--load-format", "dummy"),
            *("--kv-cache-dtype", "turboquant_k8v4", "--gpu-memory-utilization", "0.3"),
            *("--enforce-eager", "--port", "0", *arguments),
        ]
        environment = {**os.environ, **BASE_ENVIRONMENT}
        if "--kv-cache-memory-bytes" in arguments:
            # It wins over the argument.
            del environment["VLLM_CPU_KVCACHE_SPACE"]
        with subprocess.Popen(
            command,
            env=environment,
            # Not where the demo's tests look for what a demo left running.
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                output = process.communicate(timeout=TIMEOUT_S)[0]
            except subprocess.TimeoutExpired as error:
                raise AssertionError((error.output or b"")[-4000:].decode()) from error
            finally:
                # A server that started after all, and its engine.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode not in (0, -9), output[-2000:]
        return output

    return run


@pytest.fixture
def refuse_here(host: EngineHost, write: Callable[[PreTrainedConfig, str], Path]) -> Refuse:
    """A function that starts an engine in the host instead, and returns the error's message.

    A server takes half a minute to say the same: one test shows how it does.
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
    """A function that serves the refused model as advised, returns each layer's backend."""

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


def assert_said(output: str, *parts: str, times: int = 1) -> str:
    """Assert that one message, and no other, has all of the parts; return it."""
    lines = [line for line in output.splitlines() if all(part in line for part in parts)]
    messages = {line[line.index(parts[0]) :] for line in lines}
    assert len(messages) == 1, f"{len(messages)} messages with {parts} in:\n{output[-4000:]}"
    assert len(lines) == times, f"said {len(lines)} times:\n{output[-4000:]}"
    return messages.pop()


def assert_ended_before_an_engine(output: str, message: str) -> None:
    """Assert that the last line is the message, and that no engine process was started."""
    assert output.splitlines()[-1].startswith(message), output[-2000:]
    assert "Traceback" not in output
    assert "EngineCore" not in output


def assert_refused_by_a_worker(output: str, *parts: str) -> str:
    """Assert that a worker logs one message, that it is the last line too, and return it."""
    message = assert_said(output, *parts, times=2)
    last = output.splitlines()[-1]
    assert last.startswith("hybrid_kv: layer "), output[-2000:]
    assert last.endswith(message)
    return message


def advised_dtypes(message: str) -> list[str]:
    """Return the values of --kv-cache-dtype that a message ends with advising."""
    found = re.search(r"serve the model with --kv-cache-dtype ([\w ]+)", message, re.IGNORECASE)
    assert found is not None, message
    return found[1].split(" or ")


def test_a_cache_dtype_without_cpu_kernels_is_refused_before_an_engine_starts(
    refuse: Refuse,
) -> None:
    output = refuse(llama_config(), "LlamaForCausalLM", "--kv-cache-dtype", "turboquant_4bit_nc")
    assert_ended_before_an_engine(
        output, "hybrid_kv: --kv-cache-dtype turboquant_4bit_nc has no CPU kernels"
    )


def test_a_head_size_that_no_layer_can_have_is_refused_with_dtypes_that_serve_the_model(
    refuse_here: Refuse, follow: Follow
) -> None:
    output = refuse_here(llama_config(head_size=32), "LlamaForCausalLM")
    message = assert_said(
        output, "model.layers.2.self_attn.attn", "64 to 256 in multiples of 8, and 512, got 32"
    )
    assert SKIP not in message
    dtypes = advised_dtypes(message)
    assert dtypes == (["auto", "fp8"] if torch.cpu._is_avx512_supported() else ["auto"])
    for dtype in dtypes:
        assert set(follow({"kv_cache_dtype": dtype}).values()) == {"CPUAttentionBackend"}


def test_a_head_size_that_vllm_lacks_as_well_is_refused_with_the_sizes_of_both(
    refuse_here: Refuse,
) -> None:
    output = refuse_here(llama_config(head_size=264), "LlamaForCausalLM")
    message = assert_said(
        output,
        "model.layers.2.self_attn.attn",
        "64 to 256 in multiples of 8, and 512, got 264",
        "--kv-cache-dtype auto, if vLLM's own CPU kernels take heads of 264 (they list 32, 64,",
    )
    assert SKIP not in message


def test_an_odd_head_size_is_refused_with_the_layers_to_skip(
    refuse: Refuse, follow: Follow
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
    output = refuse(config, "Gemma4ForCausalLM")
    message = assert_refused_by_a_worker(
        output,
        "model.layers.2.self_attn.attn",
        "64 to 256 in multiples of 8, and 512, got 32",
        SKIP,
    )
    skipped = re.search(rf"{SKIP} ([\d ]+), or", message)
    assert skipped is not None, message
    # The first and last two are vLLM's own choice.
    assert skipped[1] == "0 1 2 3 6 7"
    backends = follow(
        {
            "kv_cache_dtype": "turboquant_k8v4",
            "kv_cache_dtype_skip_layers": skipped[1].split(),
        }
    )
    assert [i for i in sorted(backends) if backends[i] == "K8V4AttentionBackend"] == [4, 5]


def test_latent_attention_is_refused_with_the_dtype_that_serves_the_model(
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
        # Latent heads of 576, which vLLM's CPU kernel for AMX needs.
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_rope_head_dim=64,
        qk_nope_head_dim=64,
        v_head_dim=64,
        max_position_embeddings=2048,
    )
    output = refuse(config, "DeepseekV2ForCausalLM")
    message = assert_said(output, "hybrid_kv: model ", "multi-head latent")
    assert output.splitlines()[-1] == message
    assert "EngineCore" not in output
    assert SKIP not in message
    (dtype,) = advised_dtypes(message)
    backends = follow({"kv_cache_dtype": dtype})
    assert len(backends) == 6
    assert all("MLA" in backend for backend in backends.values()), backends


def test_alibi_is_refused_with_dtypes_that_serve_the_model(
    refuse_here: Refuse, follow: Follow
) -> None:
    config = BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=512, n_layer=6, n_head=8)
    output = refuse_here(config, "BloomForCausalLM")
    message = assert_said(output, "transformer.h.2.self_attention.attn", "ALiBi")
    assert SKIP not in message
    dtypes = advised_dtypes(message)
    assert dtypes[0] == "auto"
    for dtype in dtypes:
        assert set(follow({"kv_cache_dtype": dtype}).values()) == {"CPUAttentionBackend"}


def test_a_cache_too_small_for_one_request_is_refused_with_the_sizes(refuse: Refuse) -> None:
    output = refuse(llama_config(), "LlamaForCausalLM", "--kv-cache-memory-bytes", "2000000")
    # vLLM's own message, which its engine process logs and then ends with.
    parts = ("ValueError: To serve at least one request", "8192", "decreasing `max_model_len`")
    assert_said(output, *parts, times=2)
