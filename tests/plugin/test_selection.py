# SPDX-License-Identifier: Apache-2.0
"""On CPUs a layer with a k8v4 cache gets our backend; every other layer gets what it got."""

import pytest
import torch
import vllm
import vllm.platforms
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_hybrid_kv import plugin
from vllm_hybrid_kv.attention.refusal import UnsupportedLayerError
from vllm_hybrid_kv.errors import HybridKVError

pytestmark = pytest.mark.usefixtures("unregistered")

MINOR = tuple(vllm.__version_tuple__[:2])


def select(dtype="turboquant_k8v4", backend=None, **fields):
    config = AttentionSelectorConfig(
        head_size=128, dtype=torch.bfloat16, kv_cache_dtype=dtype, block_size=16, **fields
    )
    return vllm.platforms.current_platform.get_attn_backend_cls(backend, config, num_heads=8)


def test_a_k8v4_layer_gets_our_backend():
    plugin.register()
    assert select() == "vllm_hybrid_kv.attention.backend.K8V4AttentionBackend"


def test_an_option_for_another_backend_does_not_change_that():
    plugin.register()
    assert select(backend=AttentionBackendEnum.CPU_ATTN) == select()


@pytest.mark.parametrize("dtype", [None, "auto", "fp8", "int8_per_token_head"])
def test_other_layers_get_what_they_got(dtype):
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
        ({"use_sparse": True}, "sparse attention"),
        ({"attn_type": "encoder_only"}, "'encoder_only' is not decoder self-attention"),
        ({"attn_type": "encoder_decoder"}, "'encoder_decoder' is not decoder self-attention"),
    ],
)
def test_a_layer_that_cannot_be_served_is_refused_by_name(fields, reason):
    plugin.register()

    class Layer:
        def __init__(self, prefix):
            select(**fields)

    with pytest.raises(UnsupportedLayerError) as error:
        Layer(prefix="model.layers.7.self_attn.attn")
    assert "layer model.layers.7.self_attn.attn: " in str(error.value)
    assert reason in str(error.value)


@pytest.mark.parametrize("dtype", ["turboquant_4bit_nc", "turboquant_3bit_nc"])
def test_a_turboquant_dtype_without_cpu_kernels_stops_before_an_engine(dtype, make_config):
    plugin.register()
    with pytest.raises(HybridKVError, match=f"^--kv-cache-dtype {dtype} has no CPU kernels; use"):
        make_config(kv_cache_dtype=dtype)


@pytest.mark.parametrize("dtype", ["turboquant_4bit_nc", "turboquant_3bit_nc"])
def test_a_turboquant_dtype_without_cpu_kernels_is_refused(dtype):
    plugin.register()
    with pytest.raises(ValueError, match=f"--kv-cache-dtype {dtype}"):
        select(dtype)
