# SPDX-License-Identifier: Apache-2.0
"""The recall models: their shapes, and how they are written."""

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

from tests.recall.sequences import BOS, EOS, FIRST_BYTE, FIRST_SYMBOL, PAD, VOCAB_SIZE

WINDOW = 64


def gemma3_config() -> Gemma3TextConfig:
    """Return a shape in which all that is further back than some windows goes by one layer.

    vLLM leaves the first two and the last two attention layers of a dense model unquantised.
    Here those see `WINDOW` tokens, so that what is recalled from afar comes from a k8v4 page.
    """
    head_size, sliding = 64, "sliding_attention"
    return Gemma3TextConfig(
        **_common(128, 5),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_size,
        intermediate_size=768,
        query_pre_attn_scalar=head_size,
        sliding_window=WINDOW,
        layer_types=[sliding, sliding, "full_attention", sliding, sliding],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 10_000_000.0},
        },
        tie_word_embeddings=True,
    )


def qwen3_next_config() -> Qwen3NextConfig:
    """Return a shape of Gated DeltaNet and full attention in turn, with experts."""
    return Qwen3NextConfig(
        **_common(128, 4),
        num_attention_heads=4,
        num_key_value_heads=2,
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


SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "gemma3": gemma3_config,
    "qwen3-next": qwen3_next_config,
}


def _common(hidden_size: int, layers: int) -> dict[str, object]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "max_position_embeddings": 4096,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }


def save(model: PreTrainedModel, folder: Path, curve: list[dict[str, float]]) -> None:
    """Write a model in bfloat16, its tokenizer and its training curve."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    # Names of experts' weights are those of the real models only if transformers writes them.
    model.save_pretrained(folder, state_dict=state)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "dtype": "bfloat16"}, indent=2) + "\n"
    )
    (folder / "model.safetensors").chmod(0o644)
    build_tokenizer(folder)
    lines = ",\n".join(json.dumps(point) for point in curve)
    (folder / "curve.json").write_text(f"[\n{lines}\n]\n")


def build_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Write a tokenizer that makes each byte of a text a token; symbols cannot be written."""
    alphabet = _bytes_to_letters()
    names = [f"<|{name}|>" for name in ("begin", "end", "pad", "copy", "4", "5", "6", "7")]
    names += [alphabet[byte] for byte in range(256)]
    names += [f"<|symbol {i}|>" for i in range(VOCAB_SIZE - FIRST_SYMBOL)]
    assert len(names) == VOCAB_SIZE
    assert names[FIRST_BYTE] == alphabet[0]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=names[BOS],
        eos_token=names[EOS],
        pad_token=names[PAD],
        model_max_length=4096,
    )
    fast.save_pretrained(folder)
    return fast


def _bytes_to_letters() -> dict[int, str]:
    """Return the letters in which byte-level tokenizers write bytes, as GPT-2 chose them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}
