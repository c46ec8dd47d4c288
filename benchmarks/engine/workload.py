# SPDX-License-Identifier: Apache-2.0
"""Define the models, the amount of work, and the prompts."""

from __future__ import annotations

import random
from dataclasses import dataclass

from transformers import PreTrainedConfig

from benchmarks.engine.configurations import HYBRIDS
from testing.models import CONFIGS, with_mtp_layer
from testing.output_comparison import Bounds
from testing.tokenizer import random_prompt, repeated_prompt

MODELS = ("llama", "gemma3", "qwen3-next", "qwen3.5")
"""Full attention; sliding windows; Gated DeltaNet with experts; Gated DeltaNet without experts."""


@dataclass(frozen=True)
class Sizes:
    """The amount of work.

    Attributes:
        pool: How many prompts to make. The prompts to compare are chosen from them.
        prompts: How many prompts to compare.
        longest: Tokens of the longest prompt.
        tokens: Tokens that each prompt generates.
        small_models: Time the same small models that are compared, not larger ones.
        cells: Batch sizes and context lengths to time.
        rounds: How often each engine is timed. Engines take turns.
        steps: Decode steps that are timed together.
        cache_share: Share of the device's memory for the cache of a timed engine.
    """

    pool: int
    prompts: int
    longest: int
    tokens: int
    small_models: bool
    cells: tuple[tuple[int, int], ...]
    rounds: int
    steps: int
    cache_share: float

    @property
    def decoded(self) -> int:
        """Upper bound of the decode steps that a request takes."""
        return (self.rounds + 1) * (self.steps + 1) + 8


FULL = Sizes(
    pool=256,
    prompts=32,
    longest=1600,
    tokens=24,
    small_models=False,
    cells=((1, 1024), (1, 8192), (1, 32768), (8, 1024), (8, 8192), (8, 32768), (32, 8192)),
    rounds=7,
    steps=16,
    cache_share=0.18,
)
SMALLEST = Sizes(
    pool=32,
    prompts=6,
    longest=300,
    tokens=12,
    small_models=True,
    cells=((1, 64), (2, 256)),
    rounds=3,
    steps=4,
    cache_share=0.01,
)


def config_of(model: str) -> PreTrainedConfig:
    """Return the configuration of the small model for comparing outputs. It builds in a second."""
    config = CONFIGS[model]()
    return with_mtp_layer(config) if model in HYBRIDS else config


def config_to_time(model: str, sizes: Sizes) -> PreTrainedConfig:
    """Return the configuration of the model to time, with attention as large as in real models."""
    config = config_of(model)
    room = max(length for _, length in sizes.cells) + 4 * sizes.decoded
    config.max_position_embeddings = max(config.max_position_embeddings, room)
    if sizes.small_models:
        return config
    heads, kv_heads, head_size = (16, 2, 256) if model in HYBRIDS else (32, 8, 128)
    config.num_attention_heads, config.num_key_value_heads = heads, kv_heads
    config.head_dim = head_size
    config.hidden_size = 1024
    config.intermediate_size = 2048
    # Of a dense model's 12 layers, the first two and the last two are not quantised.
    layers = 16 if model in HYBRIDS else 12
    config.num_hidden_layers = layers
    if model == "gemma3":
        config.query_pre_attn_scalar = head_size
        config.sliding_window = 1024
    if model != "llama":
        config.layer_types = (config.layer_types * layers)[:layers]
    if model in HYBRIDS:
        config.linear_num_key_heads, config.linear_num_value_heads = 16, 32
        config.linear_key_head_dim = config.linear_value_head_dim = 128
    return config


def bounds_of(model: str, dtype: str) -> Bounds:
    """Return how far rounding alone may move a log-probability, as measured on CPUs.

    `testing/model_cases.py` explains the numbers. In bfloat16, dense models get 0.25, because a
    compiled graph rounds differently from an eager engine.
    """
    if model in HYBRIDS:
        return Bounds(rounding=0.4, farthest=1.0)
    return Bounds(rounding=0.03) if dtype == "float32" else Bounds(rounding=0.25)


def dtype_of(model: str, device: str) -> str:
    """Return the most exact dtype in which vLLM runs the model on a device."""
    return "float32" if device == "cpu" and model not in HYBRIDS else "bfloat16"


def prompt_pool(sizes: Sizes) -> list[list[int]]:
    """Make prompts of 2 to `longest` tokens. A quarter of them repeat a short text."""
    draw = random.Random(0)
    pool = []
    for seed in range(sizes.pool):
        length = round(2 * (sizes.longest / 2) ** draw.random())
        repeated = seed % 4 == 0
        make = repeated_prompt if repeated else random_prompt
        pool.append(make(max(length, 8) if repeated else length, seed))
    return pool
