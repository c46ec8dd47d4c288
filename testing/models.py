# SPDX-License-Identifier: Apache-2.0
"""Build small models with random weights whose output depends on every page of the KV cache.

transformers' own initialisation gives nearly uniform attention over keys near zero. One page then
hardly moves the output, and a test would miss a wrong page. The scales below prevent that:

* Scores vary by `SCORE_SIZE`, so a query attends to a handful of tokens anywhere in the prompt.
* Keys are as large as keys of real models: `KEY_SIZE`, with peaks beyond 30.
* Values share a direction, so their range, and thus their k8v4 scale, differs between tokens.
* Logits vary by `LOGIT_SIZE`, so rounding can change few of the greedy tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Llama4TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)

from testing.tokenizer import (
    BOS_TOKEN_ID,
    EOS_TOKEN_ID,
    PAD_TOKEN_ID,
    VOCAB_SIZE,
    build_tokenizer,
    word_tokens,
)

SCORE_SIZE = 2.0
"""Standard deviation of attention scores over the tokens of a prompt."""

KEY_SIZE = 8.0
"""Standard deviation of a key's elements."""

VALUE_DIRECTION = 2.0
"""How much larger the part of a value that all tokens share is than the rest of the value."""

LOGIT_SIZE = 4.0
"""Standard deviation of logits over the vocabulary."""

HIDDEN_SIZE = 256
NUM_QUERY_HEADS, NUM_KV_HEADS = 8, 2
HEAD_SIZE = 64
SHARED_LAYERS = 4
"""In `gemma4` and `gemma3n`, this many last layers use the pages of earlier layers."""


def llama_config(head_size: int = HEAD_SIZE, layers: int = 8) -> LlamaConfig:
    """Return a dense model with full attention and 4 query heads for each KV head."""
    return LlamaConfig(
        **_common(layers),
        head_dim=head_size,
        intermediate_size=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


def gemma3_config(
    head_size: int = HEAD_SIZE, layers: int = 8, window: int = 96
) -> Gemma3TextConfig:
    """Return a dense model in which layers with sliding windows and full attention alternate."""
    return Gemma3TextConfig(
        **_common(layers),
        head_dim=head_size,
        intermediate_size=512,
        query_pre_attn_scalar=head_size,
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention"] * (layers // 2),
    )


def qwen3_next_config(head_size: int = 128, layers: int = 8, **changes: Any) -> Qwen3NextConfig:
    """Return a hybrid model with experts: three Gated DeltaNet layers per full-attention layer."""
    fields = {**_common(layers), **_gated_delta_net(head_size, layers), **changes}
    return Qwen3NextConfig(
        **fields,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=256,
    )


def qwen3_5_config(head_size: int = 128, layers: int = 8) -> Qwen3_5TextConfig:
    """Return a hybrid model like that of `qwen3_next_config`, without experts."""
    return Qwen3_5TextConfig(**_common(layers), **_gated_delta_net(head_size, layers))


def gemma4_config(
    global_head_size: int = HEAD_SIZE, head_size: int = HEAD_SIZE
) -> Gemma4TextConfig:
    """Return a model like Gemma 4 E2B: window and full attention alternate, layers share pages."""
    return Gemma4TextConfig(
        **{**_shared_pages(10), "head_dim": head_size},
        global_head_dim=global_head_size,
        hidden_size_per_layer_input=0,
    )


def gemma3n_config() -> Gemma3nTextConfig:
    """Return a model like Gemma 3n: `gemma4_config` with AltUp and per-layer inputs."""
    return Gemma3nTextConfig(
        **_shared_pages(10),
        hidden_size_per_layer_input=32,
        vocab_size_per_layer_input=VOCAB_SIZE,
        laurel_rank=16,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 10,
    )


def llama4_config() -> Llama4TextConfig:
    """Return a model like Llama 4: three layers of chunked local attention per full layer."""
    return Llama4TextConfig(
        **_common(8),
        head_dim=HEAD_SIZE,
        intermediate_size=512,
        intermediate_size_mlp=512,
        attention_chunk_size=256,
        num_local_experts=2,
        interleave_moe_layer_step=8,
        attn_temperature_tuning=False,
    )


def large_state_config() -> Qwen3NextConfig:
    """Return a hybrid model to plan only. Its large states make blocks of over 1,000 tokens."""
    return qwen3_next_config(
        architectures=["Qwen3NextForCausalLM"],
        dtype="bfloat16",
        max_position_embeddings=16384,
        linear_num_key_heads=4,
        linear_num_value_heads=16,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
    )


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": llama_config,
    "gemma3": gemma3_config,
    "qwen3-next": qwen3_next_config,
    "qwen3.5": qwen3_5_config,
    "gemma4": gemma4_config,
    "gemma3n": gemma3n_config,
    "llama4": llama4_config,
}
"""The models by name."""

PLAIN_SCALES = ("gemma4_text", "gemma3n_text", "llama4_text")
"""Model types whose weights only keep activations at size 1, without most scales above."""

MTP_LAYERS = {"qwen3_next": "num_nextn_predict_layers", "qwen3_5_text": "mtp_num_hidden_layers"}
"""The configuration field for the number of multi-token prediction layers, by model type."""


def with_mtp_layer(config: PreTrainedConfig) -> PreTrainedConfig:
    """Add a layer for multi-token prediction to a copy of the configuration.

    Raises:
        ValueError: vLLM knows no such layer for this type of model.
    """
    if config.model_type not in MTP_LAYERS:
        raise ValueError(f"a {config.model_type} model has no multi-token prediction")
    config = copy.deepcopy(config)
    setattr(config, MTP_LAYERS[config.model_type], 1)
    return config


def build_model(
    config: PreTrainedConfig,
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    *,
    words_only: bool = False,
    seed: int = 0,
) -> Path:
    """Write a model with random weights as safetensors, and its tokenizer.

    Args:
        config: One of `CONFIGS`, or a variant of it.
        folder: The folder to write to; created if it does not exist.
        dtype: The dtype of the weights in the file. Weights are drawn in float32.
        words_only: Make greedy answers of whole words, by scaling down all other tokens' logits.
        seed: The seed of the weights.

    Returns:
        `folder`, which `vllm serve` and `transformers` accept as a model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(folder)
    generator = torch.Generator().manual_seed(seed)
    model = _random_model(config, generator)
    if words_only:
        others = torch.ones(VOCAB_SIZE, dtype=torch.bool)
        others[word_tokens(tokenizer)] = False
        with torch.no_grad():
            model.get_output_embeddings().weight[others] *= 0.2
    model.to(dtype).save_pretrained(folder)
    if getattr(config, MTP_LAYERS.get(config.model_type, ""), 0):
        _add_mtp_layer(config, folder, dtype, generator)
    return folder


def _random_model(config: PreTrainedConfig, generator: torch.Generator) -> PreTrainedModel:
    if config.model_type in PLAIN_SCALES:
        # Parameters that `_initialise_plainly` does not set keep transformers' values.
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.to_empty(device="cpu")
    initialise = _initialise_plainly if config.model_type in PLAIN_SCALES else _initialise
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            initialise(name, parameter, config, generator)
    return model


def _add_mtp_layer(
    config: PreTrainedConfig, folder: Path, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Add the weights of a multi-token prediction layer to the model's file.

    The layer sees the embedding of the next token and the hidden state before it. With random
    weights its drafts would almost never be right. The model's own answer depends mostly on the
    embedding. So the layer passes the embedding on almost unchanged, and some drafts are accepted.
    """
    hidden_size = config.hidden_size
    block = copy.deepcopy(config)
    block.num_hidden_layers, block.layer_types = 1, ["full_attention"]
    with TemporaryDirectory() as scratch:
        # Save and reload the weights, because transformers renames experts in a file.
        _random_model(block, generator).save_pretrained(scratch)
        layer = {
            f"mtp.{name.removeprefix('model.')}": weight
            for name, weight in load_file(f"{scratch}/model.safetensors").items()
            if name.startswith("model.layers.")
        }
    for name, weight in layer.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.mul_(0.25)
    state_part = 0.1 * torch.randn(hidden_size, hidden_size, generator=generator)
    layer["mtp.fc.weight"] = torch.cat(
        [torch.eye(hidden_size), state_part / math.sqrt(hidden_size)], dim=1
    )
    for norm in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"):
        # These norms multiply by 1 + weight.
        layer[f"mtp.{norm}.weight"] = torch.zeros(hidden_size)
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights.update({name: weight.to(dtype) for name, weight in layer.items()})
    save_file(weights, file, metadata={"format": "pt"})


def _gated_delta_net(head_size: int, layers: int) -> dict[str, object]:
    return {
        "head_dim": head_size,
        "intermediate_size": 512,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "layer_types": [*["linear_attention"] * 3, "full_attention"] * (layers // 4),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
        },
    }


def _shared_pages(layers: int) -> dict[str, object]:
    return {
        **_common(layers),
        "tie_word_embeddings": True,
        "head_dim": HEAD_SIZE,
        "intermediate_size": 512,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "sliding_window": 96,
        "num_kv_shared_layers": SHARED_LAYERS,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": base}
            for kind, base in (("sliding_attention", 1e4), ("full_attention", 1e6))
        },
    }


def _common(layers: int) -> dict[str, object]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "num_hidden_layers": layers,
        "num_attention_heads": NUM_QUERY_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "bos_token_id": BOS_TOKEN_ID,
        "eos_token_id": EOS_TOKEN_ID,
        "pad_token_id": PAD_TOKEN_ID,
    }


def _initialise(
    name: str, parameter: nn.Parameter, config: PreTrainedConfig, generator: torch.Generator
) -> None:
    part = name.removesuffix(".weight").rsplit(".", 1)[-1]
    # Gemma and Qwen3-Next multiply by 1 + weight in all norms but Gated DeltaNet's own.
    one = 0.0 if config.model_type != "llama" and "linear_attn" not in name else 1.0
    normed_heads = config.model_type != "llama"
    if part == "k_norm":
        parameter.fill_(KEY_SIZE - 1 + one)
    elif part == "q_norm":
        parameter.fill_(SCORE_SIZE / KEY_SIZE - 1 + one)
    elif part == "A_log":
        # Each token multiplies a state by exp(-A softplus(dt)), about 0.999.
        parameter.fill_(math.log(0.001))
    elif part == "dt_bias":
        parameter.fill_(1.0)
    elif part.endswith(("norm", "layernorm")):
        parameter.fill_(one)
    elif part == "embed_tokens":
        parameter.normal_(generator=generator)
        if config.model_type == "gemma3_text":
            parameter.div_(math.sqrt(config.hidden_size))
    else:
        fan_in = parameter.shape[-1]
        parameter.normal_(generator=generator).mul_(_gain(name, normed_heads) / math.sqrt(fan_in))
        if part == "v_proj":
            _add_common_direction(parameter, generator)


def _gain(name: str, normed_heads: bool) -> float:
    gains = {
        "lm_head": LOGIT_SIZE,
        # The first expert dominates, so swapping the second and third hardly changes the output.
        ".gate": 4.0,
        # Rounding can route a token to another expert; a small gain keeps that jump small.
        "experts.down_proj": 0.25,
    }
    if not normed_heads:
        gains |= {".k_proj": KEY_SIZE, ".q_proj": SCORE_SIZE / KEY_SIZE}
    name = name.removesuffix(".weight")
    return next((gain for end, gain in gains.items() if name.endswith(end)), 1.0)


def _add_common_direction(weight: torch.Tensor, generator: torch.Generator) -> None:
    """Add a rank-one matrix, so that the values of all tokens share a direction."""
    out_dims, in_dims = weight.shape
    read = torch.randn(in_dims, generator=generator) / math.sqrt(in_dims)
    write = torch.randn(out_dims, generator=generator)
    weight.add_(VALUE_DIRECTION * torch.outer(write, read))


def _initialise_plainly(
    name: str, parameter: nn.Parameter, config: PreTrainedConfig, generator: torch.Generator
) -> None:
    if parameter.dim() > 1:
        size = 3.0 if "embed" in name or "lm_head" in name else 1.0
        parameter.normal_(generator=generator)
        parameter.mul_(size / math.sqrt(parameter.shape[-1]))
    elif name.endswith("q_norm.weight"):
        # Gemma 4 and 3n do not divide scores by the root of the head size, so this norm does.
        parameter.fill_(SCORE_SIZE / math.sqrt(parameter.numel()))
