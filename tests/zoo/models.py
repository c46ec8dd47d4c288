# SPDX-License-Identifier: Apache-2.0
"""Configurations of architectures, with the fields that decide their KV cache.

An architecture uses the configuration of another one if `tests.zoo.language_models` says so.
Architectures in `SIZES` have the fields of published checkpoints. The rest have the defaults of the
config class in transformers or vLLM.
"""

from __future__ import annotations

from typing import Any

ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def sizes(
    model_type: str,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    vocabulary: int,
    positions: int = 32768,
    **more: Any,
) -> dict[str, Any]:
    """Return a configuration with the field names that most models use."""
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "max_seq_len": positions,
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": dict(ROPE),
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        **more,
    }


def experts(count: int, each: int, width: int, shared: int = 0) -> dict[str, Any]:
    """Return the fields for `count` experts, of which each token uses `each`."""
    return {
        "num_experts": count,
        "n_routed_experts": count,
        "num_experts_per_tok": each,
        "moe_intermediate_size": width,
        "num_shared_experts": shared,
        "n_shared_experts": shared,
        "norm_topk_prob": True,
    }


def latent(q: int | None = None) -> dict[str, Any]:
    """Return the fields for multi-head latent attention with DeepSeek's sizes."""
    return {
        "q_lora_rank": q,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    }


def every(count: int, period: int, most: str, last: str) -> list[str]:
    """Return `count` layer types: each `period`-th layer has `last`, all others have `most`."""
    return [last if (i + 1) % period == 0 else most for i in range(count)]


_SLIDING, _FULL = "sliding_attention", "full_attention"


# fmt: off
def _nemotron_parse(**more: Any) -> dict[str, Any]:
    decoder = {
        "d_model": 1024, "decoder_layers": 10, "decoder_attention_heads": 16,
        "decoder_ffn_dim": 4096, "encoder_attention_heads": 16, "encoder_ffn_dim": 4096,
        "vocab_size": 52352, "activation_function": "gelu", "scale_embedding": True,
        "max_position_embeddings": 9000, "max_sequence_length": 9000, "pad_token_id": 1, **more,
    }
    return {
        **sizes("nemotron_parse", 1024, 10, 16, 16, 4096, 52352, 9000),
        "is_encoder_decoder": "add_cross_attention" not in more,
        "navit_packing": True, "image_size": [2048, 1664],
        "encoder": {"patch_size": 16, "args": {"model": "vit_huge_patch16_224"}},
        "decoder": decoder,
    }


_BAILING = {"use_bias": False, "use_qkv_bias": False, "norm_head": False, "embedding_dropout": 0.0,
    "num_nextn_predict_layers": 0}

_QWEN4 = {"output_gate_type": "sigmoid", "indexer_n_heads": 32, "indexer_kv_heads": 1,
    "indexer_head_dim": 128, "indexer_budget": 2048, "indexer_compress_ratio": 4,
    "rope_parameters": {**ROPE, "partial_rotary_factor": 0.25}}

_NEMOTRON_H = {"num_hidden_layers": 52, "layers_block_type": [{"M": "mamba", "-": "mlp",
    "*": "attention"}[kind] for kind in "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"]}

# deepseek-ai/DeepSeek-V4-Flash.
_DEEPSEEK_V4 = {"vocab_size": 129280, "hidden_size": 4096, "num_hidden_layers": 43,
    "num_attention_heads": 64, "num_key_value_heads": 1, "head_dim": 512, "qk_rope_head_dim": 64,
    "q_lora_rank": 1024, "o_lora_rank": 1024, "o_groups": 8, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 6, "moe_intermediate_size": 2048,
    "norm_topk_prob": True, "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc",
    "routed_scaling_factor": 1.5, "num_hash_layers": 3, "num_nextn_predict_layers": 1,
    "compress_ratios": [4 if i > 2 and i % 2 else 128 for i in range(43)] + [0],
    "compress_rope_theta": 160000.0, "sliding_window": 128, "index_n_heads": 64,
    "index_head_dim": 128, "index_topk": 512, "hc_mult": 4, "hc_eps": 1e-6,
    "hc_sinkhorn_iters": 20, "swiglu_limit": 10.0, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "rope_scaling": {"type": "yarn", "factor": 16,
    "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1}}

SIZES: dict[str, dict[str, Any]] = {
    # bigscience/bloom-7b1.
    "BloomForCausalLM": {"transformers": "bloom", "hidden_size": 4096, "n_layer": 30, "n_head": 32,
        "vocab_size": 250880},
    # inclusionAI/Ling-lite, Ling-mini-2.0 and Ring-2.5-1T.
    "BailingMoeForCausalLM": sizes("bailing_moe", 2048, 28, 16, 4, 5632, 126464, **_BAILING,
        **experts(64, 6, 1408, 2), moe_shared_expert_intermediate_size=1408,
        first_k_dense_replace=0),
    "BailingMoeV2ForCausalLM": sizes("bailing_moe_v2", 2048, 20, 16, 4, 5120, 157184, **_BAILING,
        **experts(256, 8, 512, 1), moe_shared_expert_intermediate_size=512,
        first_k_dense_replace=1, use_qk_norm=True, use_rmsnorm=True, n_group=8, topk_group=4,
        score_function="sigmoid", moe_router_enable_expert_bias=True, rotary_dim=64),
    "BailingMoeV2_5ForCausalLM": sizes("bailing_hybrid", 8192, 80, 64, 64, 18432, 157184,
        **_BAILING, **latent(1536), **experts(256, 8, 2048, 1),
        moe_shared_expert_intermediate_size=2048, first_k_dense_replace=4, layer_group_size=8,
        group_norm_size=8, linear_silu=False, n_group=8, topk_group=4, score_function="sigmoid",
        moe_router_enable_expert_bias=True, use_qk_norm=True, partial_rotary_factor=0.5),
    # inclusionAI/Ling-3.0-flash. vLLM registers the config class under the multimodal name.
    "BailingMoeV3ForCausalLM": {"vllm": "bailing_moe_v3_vl", "text_config": {"no_kda_lora": True}},
    # Like nvidia/Llama-3_1-Nemotron-51B-Instruct, where some layers have no attention.
    "DeciLMForCausalLM": sizes("nemotron-nas", 8192, 80, 64, 8, 28672, 128256, 131072,
        block_configs=[{"attention": {"n_heads_in_group": None if i % 10 == 9 else 8, "no_op": i %
        10 == 9, "replace_with_linear": False}, "ffn": {"ffn_mult": 5.25, "no_op": False,
        "replace_with_linear": False}} for i in range(80)]),
    # deepseek-ai/deepseek-moe-16b-chat.
    "DeepseekForCausalLM": sizes("deepseek", 2048, 28, 16, 16, 10944, 102400, 4096,
        **experts(64, 6, 1408, 2), first_k_dense_replace=1, moe_layer_freq=1,
        scoring_func="softmax"),
    # LGAI-EXAONE/EXAONE-3.0-7.8B-Instruct.
    "ExaoneForCausalLM": sizes("exaone", 4096, 32, 32, 8, 14336, 102400, 4096,
        activation_function="silu", layer_norm_epsilon=1e-5),
    # Like EssentialAI/rnj-1-instruct, but with the chunked attention that vLLM's class adds.
    "Rnj1ForCausalLM": sizes("rnj1", 4096, 32, 32, 8, 16384, 128256, attention_bias=False,
        hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=128,
        final_logit_softcapping=30.0, sliding_window=8192,
        layer_types=every(32, 4, "chunked_attention", _FULL)),
    "Glm5NextForCausalLM": {**sizes("glm5_next_text", 4096, 48, 32, 32, 12288, 151552, 131072,
        **latent(1536)), **experts(128, 8, 1536, 1), "head_dim": 192,
        "layer_types": every(48, 4, "linear_attention", "deepseek_sparse_attention"),
        "mlp_layer_types": ["dense"] + ["sparse"] * 47, "linear_num_heads": 32,
        "linear_head_dim": 128, "linear_conv_kernel_dim": 4, "linear_lower_bound": -5.0,
        "mla_use_nope": True, "qk_rope_head_dim": 0, "index_head_dim": 128, "index_n_heads": 32,
        "index_topk": 2048, "index_kpool": 4, "index_kpool_always_select_tail": True,
        "indexer_rope_interleave": True, "mhc": False, "hc_mult": 4, "hc_eps": 1e-6,
        "hc_sinkhorn_iters": 20, "n_group": 1, "topk_group": 1, "scoring_func": "sigmoid",
        "topk_method": "noaux_tc", "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 0,
        "swiglu_limit": 0.0},
    # internlm/internlm2_5-7b-chat and internlm3-8b-instruct.
    "InternLM2ForCausalLM": sizes("internlm2", 4096, 32, 32, 8, 14336, 92544),
    "InternLM3ForCausalLM": sizes("internlm3", 4096, 48, 32, 2, 10240, 128512, qkv_bias=False,
        bias=False),
    # IQuestLab/IQuest-Coder-V1-40B-Instruct and its looped variant.
    "IQuestCoderForCausalLM": sizes("iquestcoder", 5120, 80, 40, 8, 27648, 76800, 131072),
    "IQuestLoopCoderForCausalLM": sizes("iquestloopcoder", 5120, 80, 40, 8, 27648, 76800, 131072,
        loop_num=2, loop_window_size=64, sliding_window=None, max_window_layers=80),
    "K2HorizonForCausalLM": sizes("k2_horizon", 4096, 36, 32, 8, 12288, 250112, 131072,
        **experts(128, 8, 1024, 1), attention_bias=False, attention_gate_func=None,
        decoder_sparse_step=1, mlp_only_layers=[], layernorm_num_groups=1, moe_gate_bias=False,
        mova_num_experts=0, mova_num_experts_per_tok=0, query_key_norm=True, rope_head_dim=64,
        router_scaling_factor=1.0, router_score_func="sigmoid"),
    # meituan-longcat/LongCat-Flash-Lite.
    "LongcatFlashNgramForCausalLM": {"transformers": "longcat_flash", "hidden_size": 3072,
        "num_layers": 14, "num_attention_heads": 32, "vocab_size": 131072, "ffn_hidden_size": 6144,
        "expert_ffn_hidden_size": 1024, "n_routed_experts": 256, "moe_topk": 12,
        "zero_expert_num": 128, "zero_expert_type": "identity", "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True, "emb_neighbor_num": 4, "emb_split_num": 4,
        "ngram_vocab_size_ratio": 78, "eos_token_id": 2, "pad_token_id": 3},
    # openbmb/MiniCPM-2B-sft-bf16.
    "MiniCPMForCausalLM": sizes("minicpm", 2304, 40, 36, 36, 5760, 122753, 4096, scale_emb=12,
        dim_model_base=256, scale_depth=1.4),
    "MiniMaxM3SparseForCausalLM": {"vllm": "minimax_m3_vl"},
    # mistralai/Mistral-Large-3-675B-Instruct-2512 has DeepSeek V3's layers with other sizes.
    "MistralLarge3ForCausalLM": {**sizes("deepseek_v3", 7168, 61, 128, 128, 16384, 131072, 131072,
        **latent(1536)), **experts(128, 4, 4096, 1), "first_k_dense_replace": 3, "n_group": 1,
        "topk_group": 1, "head_dim": 64, "scoring_func": "softmax", "topk_method": "greedy",
        "routed_scaling_factor": 1.0},
    # XiaomiMiMo/MiMo-7B-RL and MiMo-V2-Flash.
    "MiMoForCausalLM": sizes("mimo", 4096, 36, 32, 8, 11008, 151680, num_nextn_predict_layers=1,
        sliding_window=None, attention_bias=True),
    "MiMoV2ForCausalLM": sizes("mimo_v2", 4096, 48, 64, 4, 16384, 152576, 262144,
        **experts(256, 8, 2048), swa_head_dim=192, v_head_dim=128, swa_v_head_dim=128,
        swa_num_attention_heads=64, swa_num_key_value_heads=8, sliding_window=128,
        sliding_window_size=128, hybrid_layer_pattern=[int(i % 6 != 0) for i in range(48)],
        moe_layer_freq=[0] + [1] * 47, n_group=1, topk_group=1, attention_bias=False,
        add_swa_attention_sink_bias=True, add_full_attention_sink_bias=False,
        layernorm_epsilon=1e-5, scoring_func="sigmoid", topk_method="noaux_tc",
        partial_rotary_factor=0.334, swa_rope_theta=10000, attention_value_scale=0.707) |
        {"head_dim": 192},
    # OrionStarAI/Orion-14B-Chat.
    "OrionForCausalLM": sizes("orion", 5120, 40, 40, 40, 15360, 84608, 4096),
    # FreedomIntelligence/openPangu-Embedded-7B, and the MoE models of its family.
    "PanguEmbeddedForCausalLM": sizes("PanguEmbedded", 4096, 34, 32, 8, 12800, 153376, bias=True),
    "PanguUltraMoEForCausalLM": sizes("pangu_ultra_moe", 7680, 61, 128, 128, 18432, 153600, 131072,
        **latent(1536), **experts(256, 8, 2048, 1), first_k_dense_replace=3, sandwich_norm=True,
        routed_scaling_factor=2.5, router_enable_expert_bias=True, num_nextn_predict_layers=0,
        num_dense_layers=3),
    "PanguProMoEV2ForCausalLM": sizes("PanguProMoE", 4608, 50, 64, 4, 16384, 153600, 131072,
        **experts(80, 8, 1344, 4), first_k_dense_replace=4, sandwich_norm=True,
        router_enable_expert_bias=True, routed_scaling_factor=2.5, num_nextn_predict_layers=0,
        qkv_bias=False, attention_bias=False, param_sink_number=128, param_sink_with_value=True,
        v_channels=128, qk_nope_dim=64, qk_rope_dim=64) | {"head_dim": 128},
    # bharatgenai/Param2-17B-A2.4B-Thinking.
    "Param2MoEForCausalLM": sizes("param2moe", 2048, 21, 32, 8, 8192, 128008, 4096,
        **experts(64, 6, 1408, 2), moe_shared_expert_intermediate_size=1408,
        first_k_dense_replace=1, score_function="sigmoid", rope_scaling=None),
    "PhiMoEForCausalLM": {"transformers": "phimoe"},
    # pfnet/plamo-3-nict-8b-base.
    "Plamo3ForCausalLM": sizes("plamo3", 4096, 32, 32, 4, 16384, 107520,
        interleaved_sliding_window=[None if i % 8 == 7 else 2048 for i in range(32)],
        sliding_window=2048, layer_types=every(32, 8, _SLIDING, _FULL), rope_local_theta=10000,
        window_size=2048, sliding_window_pattern=8),
    # sarvamai/sarvam-30b and sarvam-105b.
    "SarvamMoEForCausalLM": sizes("sarvam_moe", 4096, 19, 64, 4, 8192, 262144, 131072,
        **experts(128, 6, 1024, 1), moe_shared_expert_intermediate_size=1024,
        first_k_dense_replace=1, use_qk_norm=True, use_bias=False, use_qkv_bias=False,
        moe_router_enable_expert_bias=True, score_function="sigmoid", embedding_dropout=0.0),
    "SarvamMLAForCausalLM": sizes("sarvam_mla", 4096, 32, 64, 64, 16384, 262144, 131072,
        **latent(), **experts(128, 8, 2048, 1), moe_shared_expert_intermediate_size=2048,
        first_k_dense_replace=1),
    # A relative of stepfun-ai/Step-Audio-2-mini that uses ALiBi.
    "Step1ForCausalLM": sizes("step1", 3072, 32, 48, 4, 8192, 74752),
    "Step3TextForCausalLM": {"vllm": "step3_text", "moe_layers_enum": ",".join(map(str,
        range(4, 60)))},
    # stepfun-ai/Step-3.5-Flash.
    "Step3p5ForCausalLM": sizes("step3p5", 4096, 45, 64, 8, 11264, 128896, 262144,
        num_attention_groups=8, moe_intermediate_size=1280, moe_num_experts=288, moe_top_k=8,
        share_expert_dim=1280, moe_layers_enum=",".join(map(str, range(3, 45))),
        sliding_window=512, layer_types=[_FULL if i % 4 == 0 else _SLIDING for i in range(45)],
        attention_other_setting={"attention_type": _SLIDING, "num_attention_heads": 96,
        "num_attention_groups": 8, "head_dim": 128, "true_head_dim": 128},
        use_head_wise_attn_gate=True, moe_router_activation="sigmoid", use_moe_router_bias=True,
        need_fp32_gate=True, moe_router_scaling_factor=3.0,
        partial_rotary_factors=[0.5 if i % 4 == 0 else 1.0 for i in range(45)]) |
        {"head_dim": 128},
    # upstage/solar-pro-preview-instruct.
    "SolarForCausalLM": sizes("solar", 5120, 64, 40, 10, 17920, 32128, 4096,
        bskcn_1=[12, 20, 32, 44], bskcn_2=[20, 32], bskcn_3=[16, 24, 36, 48], bskcn_4=[28, 40],
        bskcn_tv=[0.9, 0.8], sliding_window=2047),
    # Tele-AI/TeleChat2-7B, TeleChat3-36B-Thinking and CofeAI/Tele-FLM.
    "TeleChat2ForCausalLM": sizes("telechat", 3072, 30, 24, 24, 12288, 160256, n_head=24,
        mlp_bias=True, bias=False, n_layer=30, ffn_hidden_size=12288, layer_norm_epsilon=1e-5),
    "TeleChat3ForCausalLM": sizes("telechat3", 6144, 64, 48, 8, 24576, 131072),
    "TeleFLMForCausalLM": sizes("TeleFLM", 8192, 64, 64, 64, 21824, 80000, 4096, use_mup=True,
        mup_scale_factor=16.0, output_mult=16.0, input_mult=1.0),
    "LLaMAForCausalLM": {"transformers": "llama"},
    # nvidia/Nemotron-H-8B-Base-8K and ibm-granite/granite-4.0-h-small.
    "NemotronHForCausalLM": {"transformers": "nemotron_h", **_NEMOTRON_H},
    "NemotronHPuzzleForCausalLM": {"transformers": "nemotron_h", **_NEMOTRON_H},
    "GraniteMoeHybridForCausalLM": {"transformers": "granitemoehybrid", "num_hidden_layers": 40,
        "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
        "num_local_experts": 72, "num_experts_per_tok": 10, "mamba_n_heads": 128,
        "mamba_d_head": 64,
        "layer_types": ["attention" if i % 10 == 5 else "mamba" for i in range(40)]},
    "MuseGlimmerForCausalLM": {"vllm": "muse_glimmer_text"},
    # vLLM reads fields of these models for which the config class has no default.
    "AfmoeForCausalLM": {"transformers": "afmoe", "score_func": "sigmoid", "rope_scaling": None,
        "route_norm": True, "n_group": 1, "topk_group": 1, "route_scale": 1.0},
    "Glm4MoeForCausalLM": {"transformers": "glm4_moe", "head_dim": 128},
    "Glm4MoeLiteForCausalLM": {"transformers": "glm4_moe_lite", "first_k_dense_replace": 1},
    "HYV3ForCausalLM": {"transformers": "hy_v3", "expert_hidden_dim": 1536, "route_norm": True,
        "qk_norm": True, "first_k_dense_replace": 1},
    "HunYuanDenseV1ForCausalLM": sizes("hunyuan_v1_dense", 4096, 32, 32, 8, 14336, 128167,
        attention_bias=False),
    "HunYuanMoEV1ForCausalLM":
        {**sizes("hunyuan_v1_moe", 4096, 32, 32, 8, 3072, 128167, attention_bias=False),
        "num_experts": 64, "moe_topk": 8, "moe_intermediate_size": 3072, "num_shared_expert": 1},
    "Lfm2ForCausalLM": {"transformers": "lfm2", "block_dim": 2560, "conv_dim": 2560,
        "block_ff_dim": 12288, "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True, "conv_L_cache": 3, "conv_bias": False,
        "block_norm_eps": 1e-5, "layer_types": every(32, 4, "conv", _FULL)},
    "Lfm2MoeForCausalLM": {"transformers": "lfm2_moe", "layer_types": every(32, 4, "conv", _FULL)},
    "LongcatFlashForCausalLM": {"transformers": "longcat_flash", "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True, "zero_expert_type": "identity"},
    "MiniMaxM2ForCausalLM": {"transformers": "minimax_m2", "rotary_dim": 64,
        "scoring_func": "sigmoid"},
    "NemotronForCausalLM": {"transformers": "nemotron", "num_key_value_heads": 8},
    "Qwen4ExpForCausalLM": {"transformers": "qwen4_exp_text", **_QWEN4},
    "Qwen4ExpForConditionalGeneration": {"transformers": "qwen4_exp", "text_config": _QWEN4},
    "ChatGLMModel": {"vllm": "chatglm", "original_rope": True, "tie_word_embeddings": False},
    "DeepseekV2ForCausalLM": {"transformers": "deepseek_v2", "n_group": 8, "topk_group": 3},
    "DeepseekV4ForCausalLM": {"vllm": "deepseek_v4", **_DEEPSEEK_V4},
    # moonshotai/Kimi-Linear-48B-A3B-Instruct counts its layers from one.
    "KimiLinearForCausalLM": {"transformers": "kimi_linear", "mla_use_nope": True,
        "moe_layer_freq": 1, "first_k_dense_replace": 1, "moe_router_activation_func": "sigmoid",
        "use_grouped_topk": True, "linear_attn_config":
        {"full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "kda_layers": [i for i in range(1, 27) if i % 4], "head_dim": 128, "num_heads": 32,
        "short_conv_kernel_size": 4}},
    # databricks/dbrx-instruct.
    "DbrxForCausalLM": {"transformers": "dbrx", "d_model": 6144, "n_heads": 48, "n_layers": 40,
        "vocab_size": 100352, "max_seq_len": 32768, "attn_config": {"kv_n_heads": 8,
        "rope_theta": 500000, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 10752,
        "moe_num_experts": 16, "moe_top_k": 4}},
    "DeepseekV41ForCausalLM": {"vllm": "deepseek_v41", "text_config": {**_DEEPSEEK_V4,
        "max_position_embeddings": 1048576, "compress_ratios": [0, 0] +
        [1 + i % 2 for i in range(41)], "kv_source_layer_ids": list(range(2, 43)),
        "index_source_layer_ids": list(range(2, 43))}},
    "Dots3NoteForCausalLM": {"vllm": "dots3_note", "layer_types": every(61, 4, _SLIDING, _FULL),
        "sliding_window_size": 512, "swa_num_attention_heads": 64, "swa_qk_nope_head_dim": 128,
        "swa_qk_rope_head_dim": 64, "swa_v_head_dim": 128, "swa_q_lora_rank": 1536,
        "swa_kv_lora_rank": 512, "swa_rope_theta": 10000.0, "swa_attention_gate_type": "headwise",
        "attention_gate_type": "headwise", "apply_mla_qkv_lora_rescale": False, "index_topk": 2048,
        "index_n_heads": 64, "index_head_dim": 128},
    "HunYuanVLForConditionalGeneration": {"transformers": "hunyuan_vl", "text_config":
        {"head_dim": 128}},
    "CohereCompassForConditionalGeneration": {"transformers": "cohere_compass", "text_config":
        {"layer_types": every(40, 4, _SLIDING, _FULL), "rope_parameters": {_SLIDING: ROPE, _FULL:
        ROPE}}},
    # nvidia/NVIDIA-Nemotron-Parse has a C-RADIO vision tower and an mBART decoder.
    "NemotronParseForConditionalGeneration": _nemotron_parse(),
    "RadioMBartPrefixForCausalLM":
        _nemotron_parse(causal_vision_prefix=True, add_cross_attention=False),
    # CohereLabs/cohere-transcribe uses NeMo's names for the fields of a Conformer and its decoder.
    "CohereAsrForConditionalGeneration": {"transformers": "cohere_asr", "transf_decoder":
        {"config_dict": {"hidden_size": 1024, "inner_size": 4096, "hidden_act": "relu",
        "num_attention_heads": 8, "num_layers": 8, "max_sequence_length": 1024}}, "head":
        {"num_classes": 16384, "hidden_size": 1024, "num_layers": 1}, "encoder": {"n_layers": 48,
        "n_heads": 8, "d_model": 1280, "feat_in": 128, "feat_out": -1,
        "causal_downsampling": False, "subsampling": "dw_striding", "subsampling_factor": 8,
        "subsampling_conv_channels": 256, "ff_expansion_factor": 4,
        "self_attention_model": "rel_pos", "att_context_size": [-1, -1], "xscaling": False,
        "untie_biases": True, "pos_emb_max_len": 5000, "conv_kernel_size": 9,
        "conv_norm_type": "batch_norm", "conv_context_size": None}, "preprocessor":
        {"sample_rate": 16000, "window_size": 0.025, "window_stride": 0.01}},
    # thinkingmachines/Inkling.
    "InklingForCausalLM": {"vllm": "inkling_model", "hidden_size": 6144, "num_hidden_layers": 66,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128,
        "swa_num_key_value_heads": 16, "local_layer_ids": [i for i in range(66) if i % 6 != 5],
        "dense_intermediate_size": 24576, "intermediate_size": 3072, "n_routed_experts": 256,
        "n_shared_experts": 2, "num_experts_per_tok": 6, "shared_expert_sink": True,
        "route_scale": 8.0, "use_sconv": True},
    # Only vLLM 0.33 has these models; it brings config classes for some of them.
    "BeamForCausalLM": {"vllm": "beam", "layer_types": every(24, 4, _SLIDING, _FULL),
        "head_dim": 128, "mlp_layer_types": ["dense"] + ["sparse"] * 23},
    "DoryForCausalLM": {"vllm": "dory", "rope_parameters": {kind: {"rope_type": "default",
        "rope_theta": 10000.0, "partial_rotary_factor": 1.0} for kind in (_SLIDING, _FULL)}},
    "Step5ForCausalLM": {"vllm": "step5", "num_attention_heads": 32, "num_attention_groups": 4,
        "head_dim": 192, "use_head_wise_attn_gate": True, "use_moe_router_bias": True,
        "need_fp32_gate": True, "sparse_config": {"enabled": True}},
    "AliceAIForCausalLM": sizes("alice_ai", 2048, 48, 16, 2, 5120, 151936, 262144,
        **experts(512, 10, 512), shared_expert_intermediate_size=512,
        layer_types=every(48, 4, "linear_attention", _FULL), linear_num_key_heads=32,
        linear_num_value_heads=32, linear_key_head_dim=128, linear_value_head_dim=128,
        linear_conv_kernel_dim=4, attention_bias=False, partial_rotary_factor=0.25,
        attn_output_gate=True, kda_allow_negative_eigenvalues=False,
        router_score_function="sigmoid", router_bias_correction=True, block_attn_res_block_size=4,
        decoder_sparse_step=1, mlp_only_layers=[]) | {"head_dim": 256},
    "DomynEdgeForCausalLM": sizes("domyn_edge", 2560, 32, 20, 4, 10240, 128256,
        per_layer_config={str(i): {"head_dim": 128} for i in range(32)},
        position_layers=["nope" if i % 4 == 3 else "rope" for i in range(32)],
        window_sizes=[[-1, -1] if i % 4 == 3 else [4095, 0] for i in range(32)]),
    "FlintForCausalLM": {"vllm": "flint", "layer_types": every(49, 4, _SLIDING, _FULL),
        "no_rope_layer_indices": list(range(3, 49, 4))},
}
# fmt: on

FILES = {"Dots3NoteForCausalLM": {"added_tokens.json": '{"<|imgpad|>": 151665}'}}
"""Files next to config.json that vLLM's model class reads, by architecture and name."""

ARGUMENTS: dict[str, dict[str, Any]] = {
    "Rnj1ForCausalLM": {"attention_backend": "TRITON_ATTN"},
    "Step1ForCausalLM": {"attention_backend": "TRITON_ATTN"},
}
"""Engine arguments for architectures that vLLM's default attention backend does not support."""
