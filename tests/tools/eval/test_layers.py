# SPDX-License-Identifier: Apache-2.0
"""An evaluation counts the same quantised and unquantised layers as vLLM's plan."""

import pytest

from testing.shapes import SHAPES
from vllm_hybrid_kv.tools.eval.engine import attention_layers
from vllm_hybrid_kv.tools.plan.engine import Model
from vllm_hybrid_kv.tools.plan.model_description import described


@pytest.mark.parametrize(
    ("shape", "dtype", "boundary", "quantised", "unquantised"),
    [
        ("llama-3.1-8b", "turboquant_k8v4", 1, 30, 2),
        ("llama-3.1-8b", "auto", 1, 0, 32),
        ("gemma-3-27b", "turboquant_k8v4", 2, 58, 4),
        # 30 of the model's 40 layers have states instead of keys and values.
        ("qwen3.6-35b-a3b", "turboquant_k8v4", 2, 10, 0),
    ],
)
def test_layer_counts_are_those_of_the_plan(shape, dtype, boundary, quantised, unquantised):
    with described(SHAPES[shape]) as description:
        arguments = {
            "model": description.folder,
            "kv_cache_dtype": dtype,
            "gpu_memory_utilization": 0.1,
        }
        planned = Model(arguments, settings={"boundary_layers": boundary}).engine(24 << 30, {})
    found = list(attention_layers(planned.worker_kv_cache_config).values())
    assert [found.count(True), found.count(False)] == [quantised, unquantised]
