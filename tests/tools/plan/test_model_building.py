# SPDX-License-Identifier: Apache-2.0
"""Layers for GPUs and their tensors can be built without a GPU."""

import importlib
import sys

import pytest
import torch
from vllm.model_executor.layers.attention import attention
from vllm.platforms import current_platform

from vllm_hybrid_kv.tools.plan.engine import Model, check_device
from vllm_hybrid_kv.tools.plan.gpu_platform import described_gpu
from vllm_hybrid_kv.tools.plan.model_building import without_weights
from vllm_hybrid_kv.tools.plan.vllm_import import FakeModules


def test_only_a_vllm_for_cpus_can_plan_for_a_cpu(monkeypatch):
    check_device("cpu")
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    with pytest.raises(ValueError, match="plan with --device gpu"):
        check_device("cpu")
    check_device("gpu")


def test_every_module_sees_the_described_gpu_until_its_end():
    with described_gpu():
        assert attention.current_platform.is_cuda()
        assert current_platform.get_device_capability() == (9, 0)
    assert current_platform.is_cpu()
    assert not hasattr(torch.ops._C, "no_such_operator")


def test_fake_modules_have_any_name_and_any_attribute(monkeypatch):
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    fakes = FakeModules(lambda name: name.partition(".")[0] == "acme_images")
    monkeypatch.setattr(sys, "meta_path", [fakes, *sys.meta_path])
    functional = importlib.import_module("acme_images.transforms.functional")
    assert isinstance(functional.InterpolationMode.BICUBIC, type)
    # Python looks for dunder names to inspect objects, so the fakes must not have them.
    assert not hasattr(functional, "__wrapped__")
    assert not hasattr(functional.InterpolationMode, "__wrapped__")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("acme_images_extras")


def test_large_tensors_are_meta_and_small_ones_have_values():
    with without_weights():
        large, small = torch.zeros(1 << 20), torch.arange(4, device="cuda")
        mixed = large[:4] + small
        small.copy_(large[:4])
    assert large.is_meta
    assert mixed.is_meta
    assert small.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("bf16", [False, True])
def test_states_on_gpus_do_not_depend_on_the_cpu(monkeypatch, tmp_path, bf16):
    from testing.models import large_state_config

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    (tmp_path / "config.json").write_text(large_state_config().to_json_string())
    arguments = {"model": str(tmp_path)}
    on_gpu = Model({**arguments, "block_size": 16}, "gpu").specs["model.layers.0.linear_attn"]
    on_cpu = Model(arguments, "cpu").specs["model.layers.0.linear_attn"]
    assert on_gpu.dtypes == (torch.bfloat16, torch.bfloat16)
    assert on_cpu.dtypes == (torch.bfloat16, torch.float32 if bf16 else torch.bfloat16)
