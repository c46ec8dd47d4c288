# SPDX-License-Identifier: Apache-2.0
"""On CPUs, layers with a k8v4 cache get our backend, and other layers get vLLM's.

A layer that k8v4 cannot serve is refused in one line, on CPUs and on GPUs.
"""

from contextlib import ExitStack

import pytest
import torch
import vllm.platforms
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_hybrid_kv import plugin
from vllm_hybrid_kv.attention.unsupported import UnsupportedLayerError
from vllm_hybrid_kv.errors import HybridKVError
from vllm_hybrid_kv.tools.plan.gpu_platform import described_gpu

pytestmark = pytest.mark.usefixtures("unregistered")


def wanted(dtype="turboquant_k8v4", **fields):
    return AttentionSelectorConfig(
        **{"head_size": 128, "dtype": torch.bfloat16, "block_size": 16, **fields},
        kv_cache_dtype=dtype,
    )


def select(dtype="turboquant_k8v4", backend=None):
    platform = vllm.platforms.current_platform
    return platform.get_attn_backend_cls(backend, wanted(dtype), num_heads=8)


@pytest.mark.parametrize("chosen", [None, AttentionBackendEnum.CPU_ATTN])
def test_a_k8v4_layer_gets_our_backend_whatever_is_chosen(chosen):
    plugin.register()
    assert select(backend=chosen) == "vllm_hybrid_kv.attention.backend.K8V4AttentionBackend"


@pytest.mark.parametrize("dtype", [None, "auto", "fp8", "int8_per_token_head"])
def test_other_layers_get_the_same_backend_as_without_the_plugin(dtype):
    def outcome():
        try:
            return select(dtype)
        except ValueError as error:
            return str(error)

    stock = outcome()
    plugin.register()
    assert outcome() == stock


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"use_mla": True}, "latent attention"),
        ({"attn_type": "encoder_only"}, "'encoder_only' is not decoder self-attention"),
        ({"head_size": 32}, "got 32"),
    ],
)
@pytest.mark.parametrize("device", ["here", "a GPU"])
def test_a_layer_that_cannot_be_served_is_refused_by_name(device, fields, reason):
    plugin.register()

    class Layer:
        def __init__(self, prefix):
            # vLLM passes these arguments by name.
            selector._cached_get_attn_backend(
                backend=None, attn_selector_config=wanted(**fields), num_heads=8
            )

    with ExitStack() as stack:
        if device == "a GPU":
            stack.enter_context(described_gpu())
        with pytest.raises(UnsupportedLayerError) as error:
            Layer(prefix="model.layers.7.self_attn.attn")
    message = str(error.value)
    assert message.startswith("layer model.layers.7.self_attn.attn: --kv-cache-dtype")
    assert reason in message
    assert "erve the model with --kv-cache-dtype auto" in message
    assert "AttentionSelectorConfig" not in message


def test_a_gpu_without_int8_products_is_refused_with_the_reason_and_advice(monkeypatch):
    plugin.register()
    with described_gpu():
        platform = type(vllm.platforms.current_platform)
        old = classmethod(lambda cls, device_id=0: DeviceCapability(7, 5))
        monkeypatch.setattr(platform, "get_device_capability", old)
        with pytest.raises(UnsupportedLayerError) as refused:
            selector._cached_get_attn_backend(None, wanted(), 8)
    assert str(refused.value) == (
        "an attention layer: --kv-cache-dtype turboquant_k8v4 cannot serve this layer: the k8v4 "
        "kernels run on NVIDIA GPUs of compute capability 8.0 and newer, and this one has 7.5: "
        "Triton cannot compile int8 tensor-core products for it. "
        "Serve the model with --kv-cache-dtype auto"
    )


def test_a_backend_that_cannot_read_k8v4_is_refused_by_its_name():
    plugin.register()
    with described_gpu(), pytest.raises(UnsupportedLayerError, match="FLASH_ATTN cannot read k8v4"):
        selector._cached_get_attn_backend(AttentionBackendEnum.FLASH_ATTN, wanted(), 8)


def test_another_dtype_keeps_vllms_error():
    plugin.register()
    with described_gpu(), pytest.raises(ValueError, match="No valid attention backend found"):
        selector._cached_get_attn_backend(None, wanted("fp8", use_sparse=True), 8)


@pytest.mark.parametrize("dtype", ["turboquant_4bit_nc", "turboquant_3bit_nc"])
def test_a_turboquant_dtype_without_cpu_kernels_is_refused(dtype, make_config):
    plugin.register()
    message = f"^--kv-cache-dtype {dtype} has no CPU kernels; use"
    with pytest.raises(HybridKVError, match=message):
        make_config(kv_cache_dtype=dtype)
    with pytest.raises(HybridKVError, match=message):
        select(dtype)
