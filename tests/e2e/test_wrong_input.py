# SPDX-License-Identifier: Apache-2.0
"""What cannot be served is refused by `vllm serve` with one message that names the way out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_host import BASE_ENVIRONMENT
from transformers import BloomConfig, DeepseekV2Config, PreTrainedConfig

from demo.models import llama_config
from demo.tokenizer import VOCAB_SIZE, build_tokenizer

pytestmark = pytest.mark.engine

TIMEOUT_S = 240.0

Refuse = Callable[..., str]


@pytest.fixture
def refuse(tmp_path: Path) -> Refuse:
    """A function that runs `vllm serve` on a model, asserts that it ends, returns its output."""

    def run(config: PreTrainedConfig, architecture: str, *arguments: str, **environ: str) -> str:
        # Weights are made up by vLLM, if it gets as far as that.
        config.architectures = [architecture]
        config.save_pretrained(tmp_path)
        build_tokenizer(tmp_path)
        command = [
            *(Path(sys.executable).with_name("vllm"), "serve", tmp_path, "--load-format", "dummy"),
            *("--kv-cache-dtype", "turboquant_k8v4", "--gpu-memory-utilization", "0.3"),
            *("--enforce-eager", "--port", "0", *arguments),
        ]
        environment = {**os.environ, **BASE_ENVIRONMENT, **environ}
        if "--kv-cache-memory-bytes" in arguments:
            # It wins over the argument.
            del environment["VLLM_CPU_KVCACHE_SPACE"]
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode not in (0, -9), done.stdout[-2000:]
        return done.stdout

    return run


def assert_said(output: str, *parts: str, times: int = 1) -> None:
    """Assert that one message, and no other, has all of the parts."""
    lines = [line for line in output.splitlines() if all(part in line for part in parts)]
    messages = {line[line.index(parts[0]) :] for line in lines}
    assert len(messages) == 1, f"{len(messages)} messages with {parts} in:\n{output[-4000:]}"
    assert len(lines) == times, f"said {len(lines)} times:\n{output[-4000:]}"


@pytest.mark.parametrize("source", ["command line", "environment"])
def test_an_unknown_strategy_is_refused_with_the_known_ones(refuse: Refuse, source: str) -> None:
    if source == "environment":
        output = refuse(llama_config(), "LlamaForCausalLM", VLLM_HYBRID_KV_UNIFY_PAGE_SIZES="least")
    else:
        chosen = json.dumps({"hybrid_kv": {"unify_page_sizes": "least"}})
        output = refuse(llama_config(), "LlamaForCausalLM", "--additional-config", chosen)
    assert_said(output, "unify_page_sizes='least'", "no such strategy", "lcm", "stock")
    assert "Traceback" not in output


@pytest.mark.parametrize("head_size", [48, 264])
def test_an_unsupported_head_size_is_refused_naming_the_layer_and_the_sizes(
    refuse: Refuse, head_size: int
) -> None:
    output = refuse(llama_config(head_size=head_size), "LlamaForCausalLM")
    assert_said(
        output,
        "model.layers.2.self_attn.attn",
        f"64 to 256 in multiples of 8, got {head_size}",
        "--kv-cache-dtype auto",
    )


def test_latent_attention_is_refused_naming_the_layer(refuse: Refuse) -> None:
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
        kv_lora_rank=64,
        q_lora_rank=None,
        qk_rope_head_dim=32,
        qk_nope_head_dim=64,
        v_head_dim=64,
        max_position_embeddings=2048,
    )
    output = refuse(config, "DeepseekV2ForCausalLM")
    assert_said(
        output, "model.layers.2.self_attn.attn", "multi-head latent", "--kv-cache-dtype auto"
    )


def test_alibi_is_refused_naming_the_layer(refuse: Refuse) -> None:
    config = BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=512, n_layer=6, n_head=8)
    output = refuse(config, "BloomForCausalLM", "--max-model-len", "512")
    assert_said(output, "transformer.h.2.self_attention.attn", "ALiBi", "--kv-cache-dtype auto")


def test_a_cache_too_small_for_one_request_is_refused_with_the_sizes(refuse: Refuse) -> None:
    output = refuse(llama_config(), "LlamaForCausalLM", "--kv-cache-memory-bytes", "2000000")
    # vLLM's own message, which its engine process logs and then ends with.
    parts = ("ValueError: To serve at least one request", "8192", "decreasing `max_model_len`")
    assert_said(output, *parts, times=2)
