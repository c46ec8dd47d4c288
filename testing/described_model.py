# SPDX-License-Identifier: Apache-2.0
"""A hybrid model that tests describe and never run."""

from transformers import Qwen3NextConfig

from testing.models import qwen3_next_config


def hybrid_config() -> Qwen3NextConfig:
    """Return the demo's hybrid model with states so large that a block has over 1,000 tokens."""
    config = qwen3_next_config()
    config.architectures = ["Qwen3NextForCausalLM"]
    config.dtype = "bfloat16"
    config.max_position_embeddings = 16384
    config.linear_num_key_heads, config.linear_num_value_heads = 4, 16
    config.linear_key_head_dim = config.linear_value_head_dim = 128
    return config
