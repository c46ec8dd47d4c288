# SPDX-License-Identifier: Apache-2.0
"""Tiny models with random weights of architectures that `testing.models` does not build."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from testing.models import HIDDEN_SIZE, SCORE_SIZE
from testing.tokenizer import VOCAB_SIZE, build_tokenizer

HEAD_SIZE = 64
SHARED_LAYERS = 4
"""Of `gemma4` and `gemma3n`: the last layers use the KV pages of the two before them."""


def gemma4() -> Any:
    """Gemma 4 E2B's kind: windows and full attention in turn, shared KV pages."""
    from transformers import Gemma4TextConfig

    return Gemma4TextConfig(
        **_common(10), **_gemma(10), global_head_dim=HEAD_SIZE, hidden_size_per_layer_input=0
    )


def gemma3n() -> Any:
    """Gemma 3n's kind: the same, with AltUp and per-layer inputs."""
    from transformers import Gemma3nTextConfig

    return Gemma3nTextConfig(
        **_common(10),
        **_gemma(10),
        hidden_size_per_layer_input=32,
        vocab_size_per_layer_input=VOCAB_SIZE,
        laurel_rank=16,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 10,
    )


def llama4() -> Any:
    """Llama 4's kind: three layers of chunked local attention to one of full attention."""
    from transformers import Llama4TextConfig

    return Llama4TextConfig(
        **_common(8),
        intermediate_size=512,
        intermediate_size_mlp=512,
        attention_chunk_size=256,
        num_local_experts=2,
        interleave_moe_layer_step=8,
        attn_temperature_tuning=False,
        tie_word_embeddings=False,
    )


MODELS: dict[str, Callable[[], Any]] = {"gemma4": gemma4, "gemma3n": gemma3n, "llama4": llama4}
"""The models by name."""


def build(name: str, folder: Path, **fields: Any) -> Path:
    """Write one of `MODELS` in bfloat16, with weights that keep activations at unit size.

    Args:
        name: A key of `MODELS`.
        folder: Where to write it.
        fields: Fields of its configuration to change.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer(folder)
    generator = torch.Generator().manual_seed(0)
    config = MODELS[name]()
    config.update(fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                size = 3.0 if "embed" in parameter_name or "lm_head" in parameter_name else 1.0
                parameter.normal_(generator=generator)
                parameter.mul_(size / math.sqrt(parameter.shape[-1]))
            elif parameter_name.endswith("q_norm.weight"):
                # Gemma 4 and 3n do not divide scores by the root of the head size.
                parameter.fill_(SCORE_SIZE / math.sqrt(parameter.numel()))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def _common(layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": 8192,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }


def _gemma(layers: int) -> dict[str, Any]:
    return {
        "intermediate_size": 512,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "sliding_window": 96,
        "num_kv_shared_layers": SHARED_LAYERS,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": base}
            for kind, base in (("sliding_attention", 1e4), ("full_attention", 1e6))
        },
    }
