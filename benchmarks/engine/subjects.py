# SPDX-License-Identifier: Apache-2.0
"""The models that are run, how large, and the prompts they get."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from transformers import PreTrainedConfig

from benchmarks.engine.comparing import Bounds
from benchmarks.engine.configurations import HYBRIDS
from testing.models import BOS_TOKEN_ID, CONFIGS, with_mtp_layer
from testing.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE

MODELS = ("llama", "gemma3", "qwen3-next", "qwen3.5")
"""Full attention; sliding windows; Gated DeltaNet with experts and, dense, without."""


@dataclass(frozen=True)
class Sizes:
    """How much is run.

    Attributes:
        pool: Prompts to choose from.
        prompts: Prompts that are compared.
        longest: Tokens of the longest of them.
        tokens: Tokens that each generates.
        small_models: Whether speed is measured with the models that outputs are compared with.
        cells: Batches and context lengths at which speed is measured.
        rounds: Times that each engine is measured, in turn.
        steps: Steps of each time.
        cache_share: Of the device's memory for the cache of an engine whose speed is measured.
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
    def longest_context(self) -> int:
        """Tokens of the longest context at which speed is measured."""
        return max(length for _, length in self.cells)

    @property
    def decoded(self) -> int:
        """Steps for which a request is decoded while its speed is measured, and some to spare."""
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


def to_compare(model: str) -> PreTrainedConfig:
    """Return the model whose outputs are compared: small, so that it is made in a second."""
    config = CONFIGS[model]()
    return with_mtp_layer(config) if model in HYBRIDS else config


def to_time(model: str, sizes: Sizes) -> PreTrainedConfig:
    """Return the model whose speed is measured: attention of the size that real ones have."""
    config = to_compare(model)
    room = sizes.longest_context + 4 * sizes.decoded
    config.max_position_embeddings = max(config.max_position_embeddings, room)
    if sizes.small_models:
        return config
    heads, kv_heads, head_size = (16, 2, 256) if model in HYBRIDS else (32, 8, 128)
    config.num_attention_heads, config.num_key_value_heads = heads, kv_heads
    config.head_dim = head_size
    config.hidden_size = 1024
    config.intermediate_size = 2048
    # Of a dense model the first two and the last two layers stay unquantised.
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
    """Return how far rounding alone may move a log-probability.

    Found with the end-to-end tests, on CPUs. float32 rounds at 1e-7, but a key or a value that
    it takes across a step of its code moves by a whole step. bfloat16 rounds logits of 8 to 16 to
    multiples of 1/16, and a compiled graph rounds elsewhere than an eager engine. With Gated
    DeltaNet the chunks that a prompt is cut into make its state.
    """
    if model in HYBRIDS:
        return Bounds(rounding=0.4, farthest=1.0)
    return Bounds(rounding=0.03) if dtype == "float32" else Bounds(rounding=0.25)


def dtype_of(model: str, device: str) -> str:
    """Return the dtype in which outputs are compared: the most exact one that vLLM runs."""
    return "float32" if device == "cpu" and model not in HYBRIDS else "bfloat16"


def random_prompt(length: int, seed: int) -> list[int]:
    """Return a prompt of random tokens."""
    draw = random.Random(seed)
    tokens = [draw.randrange(len(SPECIAL_TOKENS), VOCAB_SIZE) for _ in range(length - 1)]
    return [BOS_TOKEN_ID, *tokens]


def repeated_prompt(length: int, seed: int) -> list[int]:
    """Return a short text over and over: ngram speculation proposes how it goes on."""
    text = random_prompt(7 + seed % 5, seed)[1:]
    return (text * math.ceil(length / len(text)))[:length]


def prompt_pool(sizes: Sizes) -> list[list[int]]:
    """Return prompts of 2 tokens to the longest, a quarter of them repeated texts."""
    draw = random.Random(0)
    pool = []
    for seed in range(sizes.pool):
        length = round(2 * (sizes.longest / 2) ** draw.random())
        make = repeated_prompt if seed % 4 == 0 else random_prompt
        pool.append(make(max(length, 8) if seed % 4 == 0 else length, seed))
    return pool
