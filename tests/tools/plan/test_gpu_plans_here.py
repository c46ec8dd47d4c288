# SPDX-License-Identifier: Apache-2.0
"""Plans for GPUs are right on any machine and leave this process unchanged.

The configurations have the public fields that decide the KV cache.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm.config.vllm
import vllm.platforms
from torch.overrides import _get_current_function_mode_stack
from vllm.utils import flashinfer
from vllm.v1.attention import selector

from testing.shapes import SHAPES
from tests.zoo.configurations import configuration_of
from tests.zoo.models import every
from tests.zoo.refusals import unfit
from vllm_hybrid_kv import plugin
from vllm_hybrid_kv.tools.plan.engine import Model
from vllm_hybrid_kv.tools.plan.kv_cache_plan import plan_of
from vllm_hybrid_kv.tools.plan.model_description import described
from vllm_hybrid_kv.tools.plan.vllm_import import PLACEHOLDERS
from vllm_hybrid_kv.tools.serve_options import one_line

K8V4 = "turboquant_k8v4"
DTYPES = ("auto", "fp8", K8V4)
MEMORY = 64 << 30
SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"


def gemma4(layers: int, full: list[int], wide: dict[str, int], **fields: Any) -> dict[str, Any]:
    return {
        "model_type": "gemma4",
        "architectures": ["Gemma4ForConditionalGeneration"],
        "dtype": "bfloat16",
        "text_config": {
            "model_type": "gemma4_text",
            "num_hidden_layers": layers,
            "head_dim": 256,
            "layer_types": [FULL if i in full else SLIDING for i in range(layers)],
            "per_layer_config": {str(i): wide for i in full},
            **fields,
        },
    }


# fmt: off
PUBLIC: dict[str, dict[str, Any]] = {
    "nemotron-3-nano": {
        "model_type": "nemotron_h", "architectures": ["NemotronHForCausalLM"], "hidden_size": 2688,
        "layers_block_type": [
            {"M": LINEAR, "E": "moe", "*": FULL}[kind]
            for kind in "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
        ],
        "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
        "ssm_state_size": 128, "mamba_num_heads": 64, "mamba_head_dim": 64, "n_groups": 8,
        "mamba_ssm_cache_dtype": "float32", "n_routed_experts": 128, "num_experts_per_tok": 6,
        "moe_intermediate_size": 1856,
    },
    "deepseek-v3.2": {
        "model_type": "deepseek_v32", "architectures": ["DeepseekV32ForCausalLM"],
        "kv_lora_rank": 512, "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048,
    },
    "olmo-hybrid": {
        "model_type": "olmo_hybrid", "architectures": ["OlmoHybridForCausalLM"],
        "hidden_size": 3840, "num_attention_heads": 30, "linear_key_head_dim": 96,
        "linear_value_head_dim": 192, "layer_types": every(32, 4, LINEAR, FULL),
    },
    "bert": {"model_type": "bert", "architectures": ["BertModel"]},
    "gemma4-31b": gemma4(
        60, list(range(5, 60, 6)), {"head_dim": 512, "num_key_value_heads": 4}, hidden_size=5376,
        num_attention_heads=32, num_key_value_heads=16, sliding_window=1024,
        attention_k_eq_v=True, hidden_size_per_layer_input=0,
    ),
    "gemma4-e2b": gemma4(
        35, [5, 11, 17, 23, 29, 34], {"head_dim": 512}, hidden_size=1536, num_attention_heads=8,
        num_key_value_heads=1, sliding_window=512, num_kv_shared_layers=20,
        hidden_size_per_layer_input=256,
    ),
    "heads-of-32": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 1024,
        "num_attention_heads": 32,
    },
}
# fmt: on

MLA = {K8V4: "MLA"}
CROSS = {K8V4: "'encoder_decoder' is not decoder self-attention"}

OUTCOMES: dict[str, dict[str, str]] = {
    "nemotron-3-nano": {},
    "deepseek-v3.2": MLA,
    "KimiLinearForCausalLM": MLA,
    "olmo-hybrid": {},
    "Gemma3nForConditionalGeneration": {},
    "BloomForCausalLM": {K8V4: "ALiBi", "fp8": "FlashAttention does not support fp8"},
    "bert": {"auto": "no KV cache", "fp8": "no KV cache", K8V4: "'encoder_only'"},
    "gemma4-31b": {},
    "gemma4-e2b": {},
    "heads-of-32": {K8V4: "got 32"},
    # Its groups have layers with several page sizes.
    "Glm5NextForCausalLM": MLA,
    # vLLM's own configs do not say that this one has MLA.
    "SarvamMLAForCausalLM": MLA,
    "WhisperForConditionalGeneration": CROSS,
    "MiMoV2ForCausalLM": {K8V4: "its keys have 192 dims and its values 128"},
    "PanguProMoEV2ForCausalLM": {K8V4: "FLASH_ATTN_DIFFKV, which cannot read k8v4 pages"},
    "MiniMaxM3SparseForCausalLM": {K8V4: "sparse attention (MINIMAX_M3_SPARSE)"},
    # Its layers attend in both directions within prompts; its boundary layers are unquantised.
    "HrmTextForCausalLM": {},
    # Needs the model runner that servers on GPUs have by default.
    "LongcatFlashNgramForCausalLM": MLA,
}
"""Part of the reason for each refused dtype; all others are planned."""


def write_config(name: str, folder: Path) -> Path:
    if name in SHAPES:
        return SHAPES[name]
    fields = PUBLIC.get(name) or configuration_of(name).fields
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"dtype": "bfloat16", **fields}, default=str))
    return path


def outcome_of(path: Path, dtype: str) -> dict[str, Any] | str:
    arguments = {"kv_cache_dtype": dtype, "max_num_seqs": 256, "max_model_len": 448}
    with described(path) as description:
        arguments["model"] = description.folder
        try:
            return plan_of(Model(arguments), MEMORY, {}).to_json()
        except Exception as error:
            return description.in_words(one_line(error))


def traces() -> dict[str, Any]:
    """Return the state of the process that a plan for GPUs must not change."""
    return {
        "platform": (vllm.platforms.current_platform, type(vllm.platforms.current_platform)),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "modes": len(_get_current_function_mode_stack()),
        "environment": {
            name: value
            for name, value in os.environ.items()
            # The plugin's own variable for the processes of an engine.
            if name not in ("PYTEST_CURRENT_TEST", "HYBRID_KV_METRICS_DIR")
        },
        "operators": torch._ops._OpNamespace.__getattr__,
        "CUDA": (torch.cuda.get_device_capability, torch.cuda.Stream, torch.cuda.current_stream),
        "Triton": vllm.config.vllm.HAS_TRITON,
        "FlashInfer": (flashinfer.has_flashinfer(), "flashinfer" in sys.modules),
        "selected backends": selector._cached_get_attn_backend.cache_info().currsize,
        "finders": [finder for finder in sys.meta_path if finder is not PLACEHOLDERS],
    }


@pytest.fixture(scope="module")
def plan_all(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("models")
    paths = {name: write_config(name, folder) for name in OUTCOMES}
    return lambda: {
        (name, dtype): outcome_of(path, dtype) for name, path in paths.items() for dtype in DTYPES
    }


@pytest.fixture(scope="module")
def before() -> dict[str, Any]:
    plugin.register()
    return traces()


@pytest.fixture(scope="module")
def first(before: dict[str, Any], plan_all: Callable[[], dict[Any, Any]]) -> dict[Any, Any]:
    return plan_all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OUTCOMES)
def test_a_model_is_planned_for_gpus_or_refused_with_a_reason_about_gpus(
    first: dict[Any, Any], name: str, dtype: str
):
    outcome = first[name, dtype]
    reason = OUTCOMES[name].get(dtype)
    if reason is None:
        assert isinstance(outcome, dict), outcome
        assert outcome["reported_tokens"] > 0
        return
    assert isinstance(outcome, str)
    assert reason in outcome
    assert not unfit(outcome)
    if dtype == K8V4:
        assert outcome.startswith(("layer ", "model "))
        assert "cannot serve this" in outcome
        assert "erve the model with --kv-cache-dtype auto" in outcome


def test_planning_again_gives_the_same_and_leaves_the_process_unchanged(
    before: dict[str, Any], first: dict[Any, Any], plan_all: Callable[[], dict[Any, Any]]
):
    assert traces() == before
    assert plan_all() == first
    assert traces() == before
