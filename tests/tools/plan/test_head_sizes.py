# SPDX-License-Identifier: Apache-2.0
"""Models with several head sizes get our backend and pages that fit; errors name the layer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma4TextConfig
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from tests.zoo.configurations import configuration_of
from vllm_hybrid_kv.attention.unsupported import UnsupportedLayerError
from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.tools.plan.engine import Model
from vllm_hybrid_kv.tools.plan.gpu_platform import described_gpu
from vllm_hybrid_kv.tools.plan.kv_cache_plan import Plan, plan_of

K8V4 = "turboquant_k8v4"
LAYERS, GLOBAL_LAYERS = 12, (5, 11)
LOCAL_SIZE, LOCAL_HEADS = 256, 4
GLOBAL_SIZE, GLOBAL_HEADS = 512, 1
MEMORY = 8 << 30


class BuiltModel(Model):
    """A model that records its layers' backends and head sizes, and the backend option."""

    def build(self, config: VllmConfig) -> torch.nn.Module:
        model = super().build(config)
        layers: dict[str, Any] = get_layers_from_vllm_config(config, AttentionLayerBase)
        self.backends = [layer.get_attn_backend().get_name() for layer in layers.values()]
        self.head_sizes = [layer.head_size for layer in layers.values()]
        self.chosen_backend = config.attention_config.backend
        return model


@pytest.fixture(scope="module")
def gemma_4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the configuration of a model like Gemma 4 31B, but with fewer and smaller layers."""
    config = Gemma4TextConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=1024, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=LOCAL_HEADS, head_dim=LOCAL_SIZE,
        num_global_key_value_heads=GLOBAL_HEADS, global_head_dim=GLOBAL_SIZE,
        attention_k_eq_v=True, sliding_window=1024, num_kv_shared_layers=0,
        hidden_size_per_layer_input=0,
        layer_types=[*["sliding_attention"] * 5, "full_attention"] * 2,
        architectures=["Gemma4ForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("gemma-4")
    config.save_pretrained(folder)
    return folder


@pytest.fixture(params=["FlashAttention 4", "no FlashAttention 4"])
def flash_attention_4(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[bool]:
    available = request.param == "FlashAttention 4"
    with described_gpu():
        from vllm.vllm_flash_attn import flash_attn_interface
    if not available:
        absent = (False, "it is not installed")
        monkeypatch.setattr(flash_attn_interface, "_is_fa4_supported", lambda: absent)
    return available


def build(folder: Path, dtype: str, device: str = "gpu", **more: Any) -> BuiltModel:
    settings = more.pop("settings", {})
    arguments = {"model": str(folder), "kv_cache_dtype": dtype, "max_model_len": 8192}
    return BuiltModel({**arguments, "max_num_seqs": 64, **more}, device, settings)


def test_vllm_forces_one_backend_on_a_gemma_4_without_flash_attention_4(
    gemma_4: Path, flash_attention_4: bool
) -> None:
    """If this fails, vLLM may no longer need the patch `gemma4_heads`."""
    built = build(gemma_4, "auto")
    expected = "FLASH_ATTN" if flash_attention_4 else "TRITON_ATTN"
    assert built.backends == [expected] * LAYERS
    assert (built.chosen_backend is None) == flash_attention_4


@pytest.mark.parametrize("boundary_layers", [0, 2])
@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_k8v4_layers_of_gemma_4_get_our_backend_and_others_one_that_fits(
    gemma_4: Path, flash_attention_4: bool, device: str, boundary_layers: int
) -> None:
    built = build(gemma_4, K8V4, device, settings={"boundary_layers": boundary_layers})
    quantised = range(boundary_layers, LAYERS - boundary_layers)
    sizes = [GLOBAL_SIZE if i in GLOBAL_LAYERS else LOCAL_SIZE for i in range(LAYERS)]
    assert built.head_sizes == sizes
    assert built.chosen_backend is None
    for layer, (size, backend) in enumerate(zip(sizes, built.backends, strict=True)):
        if layer in quantised:
            assert backend == "TURBOQUANT"
        elif device == "cpu":
            assert backend == "CPU_ATTN"
        elif flash_attention_4 or size == LOCAL_SIZE:
            assert backend == "FLASH_ATTN"
        else:
            # Older versions of FlashAttention take heads of up to 256.
            assert backend in ("FLASHINFER", "TRITON_ATTN")


def test_a_backend_that_the_user_chose_for_gemma_4_is_an_error(
    gemma_4: Path, flash_attention_4: bool
) -> None:
    with pytest.raises(
        UnsupportedLayerError,
        match=r"layers\.0\..*the chosen backend FLASHINFER cannot read k8v4 pages",
    ):
        build(gemma_4, K8V4, attention_backend="FLASHINFER")


def test_pages_of_gemma_4_hold_both_head_sizes_and_the_tokens_that_their_bytes_allow(
    gemma_4: Path,
) -> None:
    def plan(dtype: str) -> Plan:
        return plan_of(build(gemma_4, dtype, settings={"boundary_layers": 0}), MEMORY, {})

    bf16, ours = plan("auto"), plan(K8V4)
    assert sum(len(row.layers) for row in ours.pages) == LAYERS
    for row in ours.pages:
        full = row.kind == "full attention"
        assert {int(name.split(".")[2]) in GLOBAL_LAYERS for name in row.layers} == {full}
        assert row.stores == "k8v4"
        # Global layers store half as many bytes per token, so blocks of twice as many tokens fill
        # a page without padding.
        assert row.block_tokens == (32 if full else 16)
        heads, size = (GLOBAL_HEADS, GLOBAL_SIZE) if full else (LOCAL_HEADS, LOCAL_SIZE)
        content = row.block_tokens * heads * k8v4.slot_bytes(size)
        assert row.page_bytes - row.padding_bytes == content
        assert row.page_bytes == 16 * LOCAL_HEADS * k8v4.slot_bytes(LOCAL_SIZE)
    # A request needs as many blocks as with bf16, but each block has fewer bytes.
    ratio = 4 * LOCAL_SIZE / k8v4.slot_bytes(LOCAL_SIZE)
    tokens = ours.capacity.max_len_tokens / bf16.capacity.max_len_tokens
    assert tokens == pytest.approx(ratio, rel=1e-3)
    assert ours.smallest_hit == bf16.smallest_hit
    assert ours.warnings == ()


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_keys_and_values_of_different_sizes_are_refused_with_the_layer_and_the_sizes(
    tmp_path: Path, device: str
) -> None:
    fields, _ = configuration_of("MiMoV2ForCausalLM")
    (tmp_path / "config.json").write_text(json.dumps(fields, default=str))
    with pytest.raises(
        UnsupportedLayerError,
        match=r"^layer model\.layers\.0\.self_attn\.attn: .* its keys have 192 dims and its values "
        "128, but k8v4 pages need equal sizes. Serve the model with --kv-cache-dtype auto",
    ):
        build(tmp_path, K8V4, device, max_model_len=448)
