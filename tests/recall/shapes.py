# SPDX-License-Identifier: Apache-2.0
"""The configurations of the recall models, their tokenizer, and how to save a trained model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3TextConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3NextConfig,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from testing.recall_sequences import BOS, EOS, FIRST_SYMBOL, PAD, VOCAB_SIZE

WINDOW = 64

COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}


def gemma3_config() -> Gemma3TextConfig:
    """Return a config in which only the middle layer sees more than `WINDOW` tokens."""
    sliding = "sliding_attention"
    return Gemma3TextConfig(
        **COMMON,
        num_hidden_layers=5,
        head_dim=64,
        intermediate_size=768,
        query_pre_attn_scalar=64,
        sliding_window=WINDOW,
        layer_types=[sliding, sliding, "full_attention", sliding, sliding],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 10_000_000.0},
        },
        tie_word_embeddings=True,
    )


def qwen3_next_config() -> Qwen3NextConfig:
    """Return a config that alternates Gated DeltaNet and full attention, and has experts."""
    return Qwen3NextConfig(
        **COMMON,
        num_hidden_layers=4,
        head_dim=128,
        intermediate_size=256,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        layer_types=["linear_attention", "full_attention"] * 2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=256,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1_000_000.0,
            "partial_rotary_factor": 0.25,
        },
        tie_word_embeddings=False,
    )


def gated_deltanet_config() -> Qwen3NextConfig:
    """Return a config without attention: only the state of the second layer can hold pairs.

    The state of a layer is one head of 128 x 128, the size of Qwen3.6's heads.
    """
    return Qwen3NextConfig(
        **COMMON,
        num_hidden_layers=2,
        head_dim=128,
        intermediate_size=256,
        linear_num_key_heads=1,
        linear_num_value_heads=1,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        layer_types=["linear_attention"] * 2,
        num_experts=0,
        tie_word_embeddings=False,
    )


SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "gemma3": gemma3_config,
    "qwen3-next": qwen3_next_config,
    "gated-deltanet": gated_deltanet_config,
}


def save(model: PreTrainedModel, folder: Path, curve: list[dict[str, float]]) -> None:
    """Write a model in bfloat16, its tokenizer and its training curve."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    # `save_pretrained` renames the experts' weights as in the checkpoints of real models.
    model.save_pretrained(folder, state_dict=state)
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "model.safetensors").chmod(0o644)
    build_tokenizer().save_pretrained(folder)
    lines = ",\n".join(json.dumps(point) for point in curve)
    (folder / "curve.json").write_text(f"[\n{lines}\n]\n")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer that encodes each byte of a text as its own token."""
    alphabet = bytes_to_unicode()
    names = [f"<|{name}|>" for name in ("begin", "end", "pad", "copy", "4", "5", "6", "7")]
    names += [alphabet[byte] for byte in range(256)]
    names += [f"<|symbol {i}|>" for i in range(VOCAB_SIZE - FIRST_SYMBOL)]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=names[BOS],
        eos_token=names[EOS],
        pad_token=names[PAD],
        model_max_length=4096,
    )
