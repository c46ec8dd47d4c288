# SPDX-License-Identifier: Apache-2.0
"""The layers that an evaluation counts are those of vLLM's plan, over all ranks."""

from types import SimpleNamespace

import pytest

from testing.shapes import SHAPES
from vllm_hybrid_kv.tools.eval.engine import over_ranks
from vllm_hybrid_kv.tools.eval.recorder import Recorder
from vllm_hybrid_kv.tools.plan.engine import Model
from vllm_hybrid_kv.tools.plan.model_description import described


@pytest.mark.parametrize(
    ("shape", "dtype", "boundary", "quantised", "unquantised"),
    [
        ("llama-3.1-8b", "turboquant_k8v4", 1, 30, 2),
        ("llama-3.1-8b", "auto", 1, 0, 32),
        ("gemma-3-27b", "turboquant_k8v4", 2, 58, 4),
        # 30 of its 40 layers have states, not keys and values.
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
    recorder = Recorder()
    recorder.model_runner = SimpleNamespace(kv_cache_config=planned.worker_kv_cache_config)
    found = over_ranks([recorder.hybrid_kv_layers()])
    assert [len(names) for names in found] == [quantised, unquantised]
    assert not found[0] & found[1]


def test_tensor_parallel_ranks_share_layers_and_pipeline_ranks_do_not():
    first, last = [["a", "b"], ["c"]], [["d"], []]
    assert over_ranks([first, first, last, last]) == [{"a", "b", "d"}, {"c"}]
