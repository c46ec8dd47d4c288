# SPDX-License-Identifier: Apache-2.0
"""Initialise the recall models so that they learn to recall in few steps.

transformers initialises weights with a standard deviation of 0.02. In models this small, linear
maps then shrink signals fourfold, Gated DeltaNet forgets within a token, and models guess for
thousands of steps. Here all maps start with unit gain, and two layers start close to their purpose.
The first layer writes the previous token. The first layer of full attention looks for a token whose
previous token is the query's token ("induction"). Training still has to separate signal from noise
over 2,000 tokens, and to learn when to recall.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tests.recall.shapes import SHAPES

KEY_SIZE = 2.5
"""The initial standard deviation of keys, which is large in real models too."""
QUERY_SIZE = 1.0
RECALLED_SIZE = 2.5
"""How large the recalled value is, relative to an embedding."""


def new_model(name: str) -> PreTrainedModel:
    """Make a float32 model whose weights are drawn from torch's global generator."""
    config = SHAPES[name]()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            _initialise(parameter_name, parameter, config)
        # A direction that all embeddings share replaces biases, which these models lack.
        shared = torch.randn(config.hidden_size)
        shared *= math.sqrt(config.hidden_size) / shared.norm()
        rotation = _orthogonal(config.hidden_size)
        if name != "gemma3":
            model.lm_head.weight.copy_(model.model.embed_tokens.weight)
            model.lm_head.weight.div_(math.sqrt(config.hidden_size))
            model.model.embed_tokens.weight.add_(shared)
            for layer in model.model.layers:
                if hasattr(layer, "linear_attn"):
                    _start_as_convolution(layer.linear_attn, shared)
            _write_the_token_before_by_convolution(
                model.model.layers[0].linear_attn, shared, rotation
            )
        else:
            model.model.embed_tokens.weight.add_(shared / math.sqrt(config.hidden_size))
            _write_the_token_before_by_attention(model.model.layers[0], config, shared, rotation)
        if name == "gated-deltanet":
            _recall_behind_the_same_token(model.model.layers[1].linear_attn, shared, rotation)
            return model
        full = model.model.layers[config.layer_types.index("full_attention")]
        _look_behind_the_same_token(full.self_attn, config, shared, rotation)
        if name == "gemma3":
            full.post_attention_layernorm.weight.fill_(RECALLED_SIZE - 1)
    return model


def _orthogonal(size: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size)).Q


def _without(direction: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Remove from each row its component along `direction`."""
    return rows - (rows @ direction)[..., None] * direction / direction.square().sum()


def _initialise(name: str, parameter: nn.Parameter, config: PreTrainedConfig) -> None:
    part = name.removesuffix(".weight").rsplit(".", 1)[-1]
    # All norms multiply by 1 + weight, except the norm inside Gated DeltaNet.
    if part == "k_norm":
        parameter.fill_(KEY_SIZE - 1)
    elif part == "q_norm":
        parameter.fill_(QUERY_SIZE - 1)
    elif part.startswith("post_") and config.model_type == "gemma3_text":
        # These norms scale what attention and MLP add to the residual stream.
        parameter.fill_(-0.7)
    elif part.endswith(("norm", "layernorm")):
        parameter.fill_(1.0 if "linear_attn" in name else 0.0)
    elif part == "A_log":
        # Per token, exp(-A softplus(a + dt_bias)) of the state remains: 0.3 (first head) to 0.9.
        parameter.copy_(torch.linspace(math.log(10.0), 0.0, len(parameter)))
    elif part == "dt_bias":
        parameter.fill_(-2.0)
    elif part == "conv1d":
        parameter.normal_(std=0.5)
    elif part == "embed_tokens":
        # Gemma multiplies embeddings by the square root of the hidden size, so divide here.
        parameter.normal_()
        if config.model_type == "gemma3_text":
            parameter.div_(math.sqrt(config.hidden_size))
    else:
        gain = 0.3 if part in ("down_proj", "out_proj", "o_proj") else 1.0
        parameter.normal_(std=gain / math.sqrt(parameter.shape[-1]))


def _start_as_convolution(mixer: nn.Module, shared: torch.Tensor) -> None:
    """Make queries equal to keys and open the gate, so that a token reads what it just wrote."""
    key, value = mixer.head_k_dim, mixer.head_v_dim * mixer.num_v_heads // mixer.num_k_heads
    heads = mixer.in_proj_qkvz.weight.view(mixer.num_k_heads, 2 * key + 2 * value, -1)
    heads[:, :key] = heads[:, key : 2 * key]
    # The gate is silu(z); z is about 2.
    heads[:, 2 * key + value :].mul_(0.3).add_(2 * shared / shared.square().sum())
    taps = mixer.conv1d.weight
    taps[: mixer.key_dim] = taps[mixer.key_dim : 2 * mixer.key_dim]
    mixer.in_proj_ba.weight.mul_(0.3)


def _write_the_token_before_by_convolution(
    mixer: nn.Module, shared: torch.Tensor, rotation: torch.Tensor
) -> None:
    """Take values from the previous token, so that the layer writes that token, rotated."""
    key, value = mixer.head_k_dim, mixer.head_v_dim * mixer.num_v_heads // mixer.num_k_heads
    reads = _without(shared, _orthogonal(mixer.hidden_size)[: mixer.value_dim])
    heads = mixer.in_proj_qkvz.weight.view(mixer.num_k_heads, 2 * key + 2 * value, -1)
    heads[:, 2 * key : 2 * key + value] = reads.view(mixer.num_k_heads, value, -1)
    taps = mixer.conv1d.weight[2 * mixer.key_dim :]
    taps.mul_(0.2)[..., -2] += 1
    mixer.out_proj.weight.copy_(rotation @ reads.T * 0.6)


def _recall_behind_the_same_token(
    mixer: nn.Module, shared: torch.Tensor, rotation: torch.Tensor
) -> None:
    """Store each token under the token before it, and read what is stored under the current one."""
    size = mixer.head_k_dim
    rows, reads = (_without(shared, _orthogonal(size)) for _ in range(2))
    # silu is nearly linear on small numbers; keys, queries and outputs are normalised afterwards.
    maps = 0.2 * torch.cat([rows, rows @ rotation.T, reads])
    mixer.in_proj_qkvz.weight[: 3 * size] = maps
    mixer.conv1d.weight.normal_(std=0.02)[..., -1] += 1
    mixer.out_proj.weight.copy_(1.2 * reads.T)
    # Write strongly. Per token, exp(-softplus(dt_bias)) of the state remains: 0.9994.
    mixer.in_proj_ba.weight[0] += 2 * shared / shared.square().sum()
    mixer.A_log.fill_(0.0)
    mixer.dt_bias.fill_(-7.5)


def _write_the_token_before_by_attention(
    layer: nn.Module, config: PreTrainedConfig, shared: torch.Tensor, rotation: torch.Tensor
) -> None:
    """Make all heads of a layer attend to the previous token and write it, rotated."""
    size, attention = config.head_dim, layer.self_attn
    theta = config.rope_parameters[config.layer_types[0]]["rope_theta"]
    # Rotary embeddings turn only these pairs of dims fast enough to tell neighbours apart.
    fast = torch.arange(4)
    angle = theta ** (-2 * fast / size)
    constant = shared / shared.square().sum()
    key, query = torch.zeros(size), torch.zeros(size)
    key[fast] = 1
    query[fast], query[fast + size // 2] = angle.cos(), -angle.sin()
    for projection, row in ((attention.k_proj, key), (attention.q_proj, query)):
        rows = row.repeat(len(projection.weight) // size) * math.sqrt(size / len(fast))
        projection.weight.mul_(0.1).add_(torch.outer(rows, constant))
    attention.q_norm.weight.fill_(1.0)
    reads = _orthogonal(config.hidden_size)[: len(attention.v_proj.weight)]
    reads = _without(shared, reads)
    attention.v_proj.weight.copy_(reads)
    group = config.num_attention_heads // config.num_key_value_heads
    writes = (rotation @ reads.T).view(config.hidden_size, -1, 1, size)
    attention.o_proj.weight.copy_(
        writes.expand(-1, -1, group, -1).reshape(config.hidden_size, -1) / group
    )
    layer.post_attention_layernorm.weight.fill_(0.0)


def _look_behind_the_same_token(
    attention: nn.Module, config: PreTrainedConfig, shared: torch.Tensor, rotation: torch.Tensor
) -> None:
    """Attend to tokens that follow earlier copies of the query's token, and write these tokens."""
    hidden, size = config.hidden_size, config.head_dim
    groups = config.num_key_value_heads
    group = config.num_attention_heads // groups
    gated = len(attention.q_proj.weight) > config.num_attention_heads * size
    rows = _without(shared, torch.randn(groups, size, hidden) / math.sqrt(hidden))
    # Shrink the dims that rotary embeddings turn too fast to match tokens thousands away.
    if gated:
        rows[:, : size // 4] *= 0.3
    else:
        rows.view(groups, 2, size // 2, hidden)[:, :, : size // 4] *= 0.2
    queries = attention.q_proj.weight.view(groups, group, -1, hidden)
    queries[:, :, :size] = rows[:, None]
    attention.k_proj.weight.copy_((rows @ rotation.T).reshape(groups * size, hidden))
    reads = _without(shared, torch.randn(groups * size, hidden) / math.sqrt(hidden))
    attention.v_proj.weight.copy_(reads)
    writes = reads.T.reshape(hidden, groups, 1, size).expand(-1, -1, group, -1)
    gain = RECALLED_SIZE * (2 if gated else 1) * hidden / (groups * size) / group
    attention.o_proj.weight.copy_(gain * writes.reshape(hidden, -1))
