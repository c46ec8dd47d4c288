# SPDX-License-Identifier: Apache-2.0
"""Shrink configurations to run on a CPU, but keep their pattern of layers."""

from __future__ import annotations

from typing import Any

from tests.zoo.configurations import configuration_of

LAYERS = 8
VOCABULARY = 1024
WINDOW = 96
HIDDEN = 512

COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")

SMALLER: dict[str, int] = {
    "hidden_size": HIDDEN, "n_embd": HIDDEN, "d_model": HIDDEN, "word_embed_proj_dim": HIDDEN,
    "n_inner": HIDDEN, "ffn_dim": HIDDEN, "ffn_hidden_size": HIDDEN, "intermediate_size": HIDDEN,
    "dense_intermediate_size": HIDDEN, "intermediate_size_mlp": HIDDEN,
    "moe_intermediate_size": 128, "expert_ffn_hidden_size": 128, "shared_intermediate_size": 256,
    "shared_expert_intermediate_size": 128, "moe_shared_expert_intermediate_size": 128,
    "share_expert_dim": 128, "share_q_dim": 256, "q_lora_rank": 128,
    "conv_dim": HIDDEN, "block_dim": HIDDEN, "block_ff_dim": HIDDEN,
    "num_attention_heads": 8, "n_head": 8, "n_heads": 8, "num_experts": 4, "n_routed_experts": 4,
    "num_local_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 4, "moe_top_k": 4,
    "moe_topk": 4, "moe_k": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "vocab_size": VOCABULARY, "padded_vocab_size": VOCABULARY, "max_position_embeddings": 2048,
    "n_positions": 2048, "seq_length": 2048, "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "attention_chunk_size": 128, "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 64, "num_kv_shared_layers": 3,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
"""Upper limits of fields. Each token uses all experts, because a choice among experts would depend
on rounding."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "GraniteMoeHybridForCausalLM": {"mamba_n_heads": 16, "attention_multiplier": 0.125},
    "GraniteSWAForCausalLM": {"attention_multiplier": 0.125},
    "Mamba2ForCausalLM": {"num_heads": 16},
}
"""Fields to set by architecture. Small sizes require them, or real checkpoints have them."""

STAND_INS: dict[str, tuple[str, dict[str, Any], str]] = {
    "OlmoHybridForCausalLM": (
        "Qwen3NextForCausalLM",
        {"mlp_only_layers": list(range(LAYERS - 1))},
        "Qwen3NextForCausalLM with experts in one layer",
    )
}
"""Replacements for architectures that vLLM cannot run on CPUs: another architecture, the fields
that give it the same kinds of layers, and a name for the result."""


def small_model(architecture: str) -> tuple[dict[str, Any], str]:
    """Return a small configuration with the architecture's pattern, and a name for the table."""
    stand_in, fields, name = STAND_INS.get(architecture, (architecture, {}, architecture))
    full, _ = configuration_of(stand_in)
    return {**shrink(stand_in, full), **fields}, name


def shrink(architecture: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Shrink the full configuration `fields` of an architecture."""
    count = next((fields[name] for name in COUNTS if isinstance(fields.get(name), int)), None)
    kept = _layers_to_keep(fields, count) if count else []
    small: dict[str, Any] = {}
    heads = fields.get("num_attention_heads")
    for name, value in fields.items():
        if name in COUNTS:
            small[name] = len(kept)
        elif isinstance(value, list) and count and len(value) == count:
            small[name] = [value[i] for i in kept]
        elif name in SMALLER and isinstance(value, int) and not isinstance(value, bool):
            small[name] = min(value, SMALLER[name])
        elif name in ("num_key_value_heads", "num_attention_groups") and isinstance(value, int):
            small[name] = 8 if value == heads else 1 if value == 1 else 2
        elif name.endswith("_token_id"):
            small[name] = 0
        else:
            small[name] = value
    if isinstance(small.get("head_dim"), int):
        small["head_dim"] = min(small["head_dim"], 128)
    return {**small, **OVERRIDES.get(architecture, {})}


def _layers_to_keep(fields: dict[str, Any], count: int) -> list[int]:
    """Return the first layers, the last of which make room for one layer of each missing kind."""
    kept = list(range(min(count, LAYERS)))
    types = fields.get("layer_types") or fields.get("hybrid_layer_pattern")
    if isinstance(types, list) and len(types) == count:
        missing = [
            kind
            for kind in dict.fromkeys(map(str, types))
            if kind not in {str(types[i]) for i in kept}
        ]
        firsts = [next(i for i, t in enumerate(types) if str(t) == kind) for kind in missing]
        kept = kept[: len(kept) - len(firsts)] + firsts
    return kept
