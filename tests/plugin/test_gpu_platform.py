# SPDX-License-Identifier: Apache-2.0
"""On GPUs, engines with a k8v4 cache get our backend. Other TurboQuant presets get vLLM's own."""

import importlib
import logging

import pytest
import vllm
from vllm.model_executor.models.registry import ModelRegistry
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.worker_base import WorkerBase

from vllm_hybrid_kv import plugin
from vllm_hybrid_kv.state import STATE

pytestmark = pytest.mark.usefixtures("unregistered")

OURS = "vllm_hybrid_kv.attention.backend.K8V4AttentionBackend"


@pytest.fixture
def gpu(monkeypatch):
    """Make vLLM's platform answer as on a GPU of compute capability 9.0. No GPU is used."""
    # These would need CUDA or Triton if the platform were CUDA, so load them before it is.
    importlib.import_module("vllm.v1.worker.utils")
    ModelRegistry.models["LlamaForCausalLM"].inspect_model_cls()
    platform = type(current_platform)
    monkeypatch.setattr(platform, "is_cpu", lambda self: False)
    monkeypatch.setattr(platform, "is_cuda", lambda self: True)
    monkeypatch.setattr(platform, "is_cuda_alike", lambda self: True)
    capability = classmethod(lambda cls, device_id=0: DeviceCapability(9, 0))
    monkeypatch.setattr(platform, "get_device_capability", capability)


def activate(config, dtype):
    config.cache_config.cache_dtype = dtype
    WorkerBase(config, local_rank=0, rank=0, distributed_init_method="")


def test_the_backend_is_registered_and_selection_is_not_patched(gpu):
    plugin.register()
    assert AttentionBackendEnum.TURBOQUANT.get_path() == OURS
    names = {patch.name for patch in STATE.active_patches.patches}
    assert "attention_backend" in names
    assert "backend_selection" not in names


def test_an_engine_with_another_preset_gets_vllms_backend(gpu, make_config):
    stock = AttentionBackendEnum.TURBOQUANT.get_path()
    config = make_config()
    plugin.register()
    activate(config, "turboquant_4bit_nc")
    assert AttentionBackendEnum.TURBOQUANT.get_path() == stock != OURS
    plugin.register()  # verifies the active patches
    activate(config, "turboquant_k8v4")
    assert AttentionBackendEnum.TURBOQUANT.get_path() == OURS
    activate(config, "auto")
    assert AttentionBackendEnum.TURBOQUANT.get_path() == OURS


def test_one_line_names_the_origin_of_the_tile_sizes(gpu, make_config, log):
    config = make_config()
    plugin.register()
    activate(config, "turboquant_k8v4")
    (line,) = log(logging.INFO)
    assert line.startswith(f"hybrid_kv {plugin.__version__} active on vLLM {vllm.__version__}")
    assert line.endswith("kernels=triton, tile sizes derived")


@pytest.mark.parametrize("version", [None, 2, 3, 4])
def test_unquantised_layers_keep_the_flash_attention_that_the_user_chose(version, make_config):
    arguments = {"attention_config": {"flash_attn_version": version}}
    stock = make_config(kv_cache_dtype="turboquant_k8v4", **arguments)
    assert stock.attention_config.flash_attn_version == 2
    plugin.register()
    config = make_config(kv_cache_dtype="turboquant_k8v4", **arguments)
    assert config.attention_config.flash_attn_version == version
