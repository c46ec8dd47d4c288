# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's KV cache scales load as without the plugin, and the log says they are unused."""

import logging

import pytest
import torch
from torch import nn
from vllm import logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.model_loader import utils
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from vllm_hybrid_kv import plugin

K8V4 = "turboquant_k8v4"
KV_HEADS = 2


def compressed(strategy):
    """Return the config of a checkpoint in which llm-compressor quantised only the KV cache."""
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    config = compressed_tensors.CompressedTensorsConfig.from_config(
        {"format": "dense", "config_groups": {}, "kv_cache_scheme": scheme}
    )
    config.total_num_kv_heads = KV_HEADS
    return config


def fp8():
    return Fp8Config(is_checkpoint_fp8_serialized=True)


CHECKPOINTS = {
    "fp8": (fp8, 1),
    "compressed-tensors": (lambda: compressed("tensor"), 1),
    "compressed-tensors, per head": (lambda: compressed("attn_head"), KV_HEADS),
}


@pytest.fixture
def build(unregistered, make_config, monkeypatch):
    """Return a function that builds a layer with vLLM's `initialize_model`, in one process."""
    monkeypatch.setattr(compressed_tensors, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(compressed_tensors, "get_tensor_model_parallel_world_size", lambda: 1)
    # The first engine config sets up vLLM's loggers, which would remove the handler of `log`.
    make_config()

    def run(quantisation, dtype=K8V4):
        class Model(nn.Module):
            def __init__(self, vllm_config, prefix):
                super().__init__()
                self.attn = Attention(
                    4, 64, 0.125, KV_HEADS,
                    cache_config=vllm_config.cache_config,
                    quant_config=quantisation,
                    prefix="layers.3.attn",
                )  # fmt: skip

        # Forget which lines were logged, because vLLM logs each line once per process.
        logger._print_info_once.cache_clear()
        plugin.register()
        config = make_config(kv_cache_dtype=dtype)
        return utils.initialize_model(config, prefix="", model_class=Model).attn

    return run


def load(layer, scales):
    for name in ("k_scale", "v_scale"):
        parameter = getattr(layer, name)
        loader = getattr(parameter, "weight_loader", default_weight_loader)
        loader(parameter, torch.full((scales,), 0.25))


def reports(log):
    return [line for line in log(logging.INFO) if "scales" in line]


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_one_line_says_that_scales_of_the_checkpoint_are_not_used(checkpoint, build, log):
    quantisation, scales = CHECKPOINTS[checkpoint]
    layer = build(quantisation())
    assert not reports(log)
    load(layer, scales)
    assert reports(log) == [
        "The checkpoint's KV cache scales (k_scale, v_scale) are not needed and not used: k8v4 "
        "computes a scale for each token and head"
    ]
    assert layer.k_scale.flatten().tolist() == [0.25] * scales
    assert layer.v_scale.flatten().tolist() == [0.25] * scales


def test_scales_of_another_cache_are_not_reported(build, log):
    load(build(fp8(), "fp8"), 1)
    assert not reports(log)
