# SPDX-License-Identifier: Apache-2.0
"""Map architectures to others that have the same configuration, so that one plan serves both."""

from __future__ import annotations

SAME_AS = {
    "ChatGLMForConditionalGeneration": "ChatGLMModel",
    "ExaoneMoEForCausalLM": "ExaoneMoeForCausalLM",
    "Kolibri1ForCausalLM": "Qwen3MoeForCausalLM",
    "MiMoV2FlashForCausalLM": "MiMoV2ForCausalLM",
    "NanbeigeForCausalLM": "LlamaForCausalLM",
}
"""For each alias in vLLM's registry, the architecture with the same configuration."""

_WRAPPERS = {
    "Qwen3MoeForCausalLM": "Qwen3OmniMoeForConditionalGeneration "
    "Qwen3VLMoeForConditionalGeneration InternS1ProForConditionalGeneration "
    "Ovis2_6_MoeForCausalLM",
    "Ernie4_5_MoeForCausalLM": "Ernie4_5_VLMoeForConditionalGeneration",
    "Glm4MoeForCausalLM": "Glm4vMoeForConditionalGeneration",
    "Lfm2ForCausalLM": "Lfm2VlForConditionalGeneration",
    "LlamaForCausalLM": "AriaForConditionalGeneration KananaVForConditionalGeneration "
    "Llama_Nemotron_Nano_VL OpenVLAForActionPrediction UltravoxModel",
    "InklingForCausalLM": "InklingForConditionalGeneration",
    "Qwen3ForCausalLM": "Alpamayo2Super BeeForConditionalGeneration "
    "Cosmos3ForConditionalGeneration FunASRForConditionalGeneration "
    "FunAudioChatForConditionalGeneration InternS1ForConditionalGeneration "
    "IsaacForConditionalGeneration KeyeForConditionalGeneration "
    "KeyeVL1_5ForConditionalGeneration MossTranscribeDiarizeForConditionalGeneration "
    "LightOnOCRForConditionalGeneration LlavaOnevision2ForConditionalGeneration "
    "MiniCPMOcrForConditionalGeneration Molmo2ForConditionalGeneration MossAudioModel Ovis2_5 "
    "Ovis2_6ForCausalLM Qwen3ASRRealtimeGeneration RForConditionalGeneration "
    "StepVLForConditionalGeneration",
    "Qwen2ForCausalLM": "BagelForConditionalGeneration DotsOCRForCausalLM "
    "Eagle2_5_VLForConditionalGeneration FireRedASR2ForConditionalGeneration InternVLChatModel "
    "MoonshotKimiaForCausalLM MiDashengLMModel MiniCPMO MiniCPMV MolmoForCausalLM NVLM_D "
    "OpenCUAForConditionalGeneration Ovis Qwen2_5OmniModel SkyworkR1VChatModel",
    "BailingMoeV3ForCausalLM": "BailingMoeV3VLForConditionalGeneration",
    "DeepseekV2ForCausalLM": "DeepseekVLV2ForCausalLM KimiVLForConditionalGeneration "
    "KimiK25ForConditionalGeneration",
    "DeepseekForCausalLM": "DeepseekOCRForCausalLM DeepseekOCR2ForCausalLM UnlimitedOCRForCausalLM",
    "DeepseekV4ForCausalLM": "DeepseekV4ForConditionalGeneration",
    "ChatGLMModel": "GLM4VForCausalLM",
    "Glm5NextForCausalLM": "Glm5NextForConditionalGeneration",
    "HyperCLOVAXForCausalLM": "HCXVisionV2ForCausalLM",
    "MistralForCausalLM": "H2OVLChatModel PixtralForConditionalGeneration "
    "VoxtralRealtimeGeneration",
    "Qwen3_5ForCausalLM": "InternS2MobiusForConditionalGeneration "
    "InternS2PreviewForConditionalGeneration",
    "KimiLinearForCausalLM": "KimiK3ForConditionalGeneration",
    "MiMoV2FlashForCausalLM": "MiMoV2OmniForCausalLM",
    "MiniMaxM3SparseForCausalLM": "MiniMaxM3SparseForConditionalGeneration",
    "Qwen2MoeForCausalLM": "Moondream3ForCausalLM HfMoondream",
    "MuseGlimmerForCausalLM": "MuseGlimmerForConditionalGeneration "
    "MuseSparkForConditionalGeneration",
    "NemotronHForCausalLM": "NemotronH_Nano_VL_V2 NemotronH_Nano_Omni_Reasoning_V3 "
    "NemotronH_Super_Omni_Reasoning_V3 NemotronH_Omni_Reasoning_V3",
    "PanguEmbeddedForCausalLM": "OpenPanguVLForConditionalGeneration",
    "Phi3ForCausalLM": "Phi3VForCausalLM Phi4ForCausalLMV Phi4MMForCausalLM",
    "Step3TextForCausalLM": "Step3VLForConditionalGeneration",
    "Step3p5ForCausalLM": "Step3p7ForConditionalGeneration",
    "Step5ForCausalLM": "Step5ForConditionalGeneration",
}
"""For each language model, the multimodal architectures that contain it.

If checkpoints of a multimodal architecture contain different language models, the newest counts.
"""

LANGUAGE_MODELS = {
    wrapper: language_model
    for language_model, names in _WRAPPERS.items()
    for wrapper in names.split()
}
"""The language model of each multimodal architecture."""
