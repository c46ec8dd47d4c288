# SPDX-License-Identifier: Apache-2.0
"""Small models with random weights whose answers hang on every page of the KV cache.

transformers' own initialisation gives a random model nearly uniform attention over keys near
zero: what stands in one page of the cache then hardly moves the output, and a wrong page would
go unseen. Here the scales are chosen instead: scores have a standard deviation of
`SCORE_SIZE`, so that a query looks at a handful of tokens wherever they stand; keys are of the
size of real models' keys (`KEY_SIZE`, peaks beyond 30); values have a strong common direction,
so that their range, and with it the k8v4 scale, differs from token to token; and logits are
spread by `LOGIT_SIZE`, so that greedy choices are seldom close.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)

from testing.tokenizer import VOCAB_SIZE, build_tokenizer, word_tokens

SCORE_SIZE = 2.0
"""Standard deviation of attention scores over the tokens of a prompt."""

KEY_SIZE = 8.0
"""Standard deviation of a key's elements."""

VALUE_DIRECTION = 2.0
"""Size of the values' common direction beside the rest, which has size 1."""

LOGIT_SIZE = 4.0
"""Standard deviation of logits over the vocabulary."""

HIDDEN_SIZE = 256
NUM_QUERY_HEADS, NUM_KV_HEADS = 8, 2
BOS_TOKEN_ID, EOS_TOKEN_ID, PAD_TOKEN_ID = 0, 1, 2


def llama_config(head_size: int = 64, layers: int = 8) -> LlamaConfig:
    """Return a dense model of full attention: 4 query heads for each KV head."""
    return LlamaConfig(
        **_common(layers),
        head_dim=head_size,
        intermediate_size=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


def gemma3_config(head_size: int = 64, layers: int = 8, window: int = 96) -> Gemma3TextConfig:
    """Return a dense model whose layers attend to a sliding window and to everything in turn."""
    return Gemma3TextConfig(
        **_common(layers),
        head_dim=head_size,
        intermediate_size=512,
        query_pre_attn_scalar=head_size,
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention"] * (layers // 2),
    )


def qwen3_next_config(head_size: int = 128, layers: int = 8) -> Qwen3NextConfig:
    """Return a hybrid model: three Gated DeltaNet layers to one of full attention, and experts."""
    return Qwen3NextConfig(
        **_common(layers),
        **_gated_delta_net(head_size, layers),
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=256,
    )


def qwen3_5_config(head_size: int = 128, layers: int = 8) -> Qwen3_5TextConfig:
    """Return a hybrid model as `qwen3_next_config` does, but dense: no experts."""
    return Qwen3_5TextConfig(**_common(layers), **_gated_delta_net(head_size, layers))


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": llama_config,
    "gemma3": gemma3_config,
    "qwen3-next": qwen3_next_config,
    "qwen3.5": qwen3_5_config,
}
"""The models by name."""

MTP_LAYERS = {
    "qwen3_next": "num_nextn_predict_layers",
    "qwen3_5_text": "mtp_num_hidden_layers",
}
"""Where vLLM reads, by type of model, how many layers predict further tokens."""


def with_mtp_layer(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration of the same model with a layer for multi-token prediction.

    Raises:
        ValueError: vLLM knows no such layer for this type of model.
    """
    if config.model_type not in MTP_LAYERS:
        raise ValueError(f"a model of type {config.model_type} has no layer that predicts tokens")
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
        config: One of `CONFIGS`, or a variant of it, such as one of `with_mtp_layer`.
        folder: Where to write; made if it is not there.
        dtype: Of the weights in the file; they are drawn in float32.
        words_only: Make greedy answers consist of whole words. Without, every token is as likely
            as any other, and none ends an answer more often than others do.
        seed: Of the weights.

    Returns:
        `folder`, which `vllm serve` and `transformers` take as a model.
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
    """Return a model in float32 with weights drawn as this module says."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _initialise(name, parameter, config, generator)
    return model


def _add_mtp_layer(
    config: PreTrainedConfig, folder: Path, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Write the weights of a layer that predicts the token after the next one beside the model's.

    It sees the embedding of the next token and the hidden state before that. With random weights
    alone it would hardly ever be right. The model's own answer depends on that embedding more
    than on anything else, so the layer passes it on and adds little to it: some drafts are then
    accepted and most are not.
    """
    hidden_size = config.hidden_size
    block = copy.deepcopy(config)
    block.num_hidden_layers, block.layer_types = 1, ["full_attention"]
    with TemporaryDirectory() as scratch:
        # Through a file, because transformers writes experts under other names than it runs them.
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
        # These multiply by 1 + weight, too.
        layer[f"mtp.{norm}.weight"] = torch.zeros(hidden_size)
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights.update({name: weight.to(dtype) for name, weight in layer.items()})
    save_file(weights, file, metadata={"format": "pt"})


def _gated_delta_net(head_size: int, layers: int) -> dict[str, object]:
    """Return what hybrid models of three Gated DeltaNet layers to one of attention share."""
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
    """Fill one parameter in place with what its place in the model asks for."""
    part = name.removesuffix(".weight").rsplit(".", 1)[-1]
    # Gemma and Qwen3-Next multiply by 1 + weight in all norms but Gated DeltaNet's own.
    one = 0.0 if config.model_type != "llama" and "linear_attn" not in name else 1.0
    normed_heads = config.model_type != "llama"
    if part == "k_norm":
        parameter.fill_(KEY_SIZE - 1 + one)
    elif part == "q_norm":
        parameter.fill_(SCORE_SIZE / KEY_SIZE - 1 + one)
    elif part == "A_log":
        # exp(-A softplus(dt)) is the factor by which a state fades each token: about 1/1000.
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
    """Return the factor of a matrix of unit gain."""
    part = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if part == "lm_head":
        return LOGIT_SIZE
    if part == "k_proj" and not normed_heads:
        return KEY_SIZE
    if part == "q_proj" and not normed_heads:
        return SCORE_SIZE / KEY_SIZE
    if part == "gate":
        # A clear first expert: where the second and the third change places, little changes.
        return 4.0
    if name.endswith("experts.down_proj"):
        # Rounding makes routed experts change places, which is a step and no cache's fault.
        return 0.25
    if name.endswith("linear_attn.out_proj"):
        # Gated DeltaNet's own rounding depends on how a prompt is cut into chunks.
        return 0.5
    return 1.0


def _add_common_direction(weight: torch.Tensor, generator: torch.Generator) -> None:
    """Add a rank-one part, so that all dims of a token's value share a factor of its own."""
    out_dims, in_dims = weight.shape
    read = torch.randn(in_dims, generator=generator) / math.sqrt(in_dims)
    write = torch.randn(out_dims, generator=generator)
    weight.add_(VALUE_DIRECTION * torch.outer(write, read))
