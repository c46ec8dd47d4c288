# SPDX-License-Identifier: Apache-2.0
"""Plans for GPUs can be made without a GPU, and leave the process unchanged."""

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

from tests.zoo.configurations import configuration_of
from tests.zoo.refusals import unfit
from vllm_hybrid_kv import plugin
from vllm_hybrid_kv.tools.options import one_line
from vllm_hybrid_kv.tools.plan.engine import Model
from vllm_hybrid_kv.tools.plan.kv_cache_plan import plan_of
from vllm_hybrid_kv.tools.plan.model_description import described
from vllm_hybrid_kv.tools.plan.vllm_import import PLACEHOLDERS

K8V4 = "turboquant_k8v4"
DTYPES = ("auto", "fp8", K8V4)
MEMORY = 64 << 30

BERT = {"model_type": "bert", "architectures": ["BertModel"]}

MLA = {K8V4: "MLA"}
CROSS = {K8V4: "'encoder_decoder' is not decoder self-attention"}

OUTCOMES: dict[str, dict[str, str]] = {
    "NemotronHForCausalLM": {},
    "DeepseekV32ForCausalLM": MLA,
    "KimiLinearForCausalLM": MLA,
    "OlmoHybridForCausalLM": {},
    "Gemma3nForConditionalGeneration": {},
    "BloomForCausalLM": {K8V4: "ALiBi", "fp8": "FlashAttention does not support fp8"},
    "BertModel": {"auto": "no KV cache", "fp8": "no KV cache", K8V4: "'encoder_only'"},
    "Gemma4ForConditionalGeneration": {},
    # In this model the layers of one KV group have several page sizes.
    "Glm5NextForCausalLM": MLA,
    # vLLM's config class of this model does not say that it has MLA.
    "SarvamMLAForCausalLM": MLA,
    "WhisperForConditionalGeneration": CROSS,
    "MiMoV2ForCausalLM": {K8V4: "its keys have 192 dims and its values 128"},
    "PanguProMoEV2ForCausalLM": {K8V4: "FLASH_ATTN_DIFFKV, which cannot read k8v4 pages"},
    "MiniMaxM3SparseForCausalLM": {K8V4: "sparse attention (MINIMAX_M3_SPARSE)"},
    # The layers of this model, some of them unquantised, attend in both directions in prompts.
    "HrmTextForCausalLM": {},
    # This model needs the model runner that servers on GPUs have by default.
    "LongcatFlashNgramForCausalLM": MLA,
}
"""For each architecture, part of the reason for each refused dtype. Other dtypes get a plan."""

SETTINGS = {"HrmTextForCausalLM": {"boundary_layers": 2}}


def outcome_of(path: Path, dtype: str) -> dict[str, Any] | str:
    arguments = {"kv_cache_dtype": dtype, "max_num_seqs": 256, "max_model_len": 448}
    with described(path) as description:
        arguments["model"] = description.folder
        try:
            model = Model(arguments, settings=SETTINGS.get(path.stem, {}))
            return plan_of(model, MEMORY, {}).to_json()
        except Exception as error:
            return description.in_words(one_line(error))


def traces() -> dict[str, Any]:
    """Return everything in this process that a plan for GPUs could change and must not."""
    return {
        "platform": (vllm.platforms.current_platform, type(vllm.platforms.current_platform)),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "modes": len(_get_current_function_mode_stack()),
        "environment": {
            name: value
            for name, value in os.environ.items()
            # The plugin sets its own variable for the processes of an engine.
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
    for name in OUTCOMES:
        own = BERT if name == "BertModel" else configuration_of(name)[0]
        fields = {"dtype": "bfloat16", **own}
        (folder / f"{name}.json").write_text(json.dumps(fields, default=str))
    return lambda: {
        (name, dtype): outcome_of(folder / f"{name}.json", dtype)
        for name in OUTCOMES
        for dtype in DTYPES
    }


@pytest.fixture(scope="module")
def first(plan_all: Callable[[], dict[Any, Any]]) -> tuple[dict[str, Any], dict[Any, Any]]:
    """The process's `traces` before any plan was made, and the first plans."""
    plugin.register()
    return traces(), plan_all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OUTCOMES)
def test_a_model_is_planned_for_gpus_or_refused_with_a_reason_about_gpus(
    first: tuple[dict[str, Any], dict[Any, Any]], name: str, dtype: str
):
    outcome = first[1][name, dtype]
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
    first: tuple[dict[str, Any], dict[Any, Any]], plan_all: Callable[[], dict[Any, Any]]
):
    before, plans = first
    assert traces() == before
    assert plan_all() == plans
    assert traces() == before
