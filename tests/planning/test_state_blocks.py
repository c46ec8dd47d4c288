# SPDX-License-Identifier: Apache-2.0
"""Start-up stops if more requests may run than the KV cache has blocks for their states."""

import pytest
import torch
from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec

from tests.planning.layers import plan
from vllm_hybrid_kv import plugin
from vllm_hybrid_kv.errors import HybridKVError
from vllm_hybrid_kv.state import STATE

STATES = MambaSpec(block_size=256, shapes=((64,),), dtypes=(torch.uint8,))
ATTENTION = FullAttentionSpec(block_size=256, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)


@pytest.fixture
def resolve(unregistered):
    """Return a function that runs the check that vLLM makes before it captures CUDA graphs."""
    plugin.register()

    def call(requests, spec=STATES, mode=CUDAGraphMode.FULL_AND_PIECEWISE, **arguments):
        config = CompilationConfig(cudagraph_mode=mode)
        return config.resolve_cudagraph_mode_and_sizes(
            arguments.pop("support", AttentionCGSupport.UNIFORM_BATCH),
            "backend",
            kv_cache_config=plan(spec),
            max_num_reqs=requests,
            **arguments,
        )

    return call


def test_the_message_names_the_option_and_a_value_that_works(resolve):
    with pytest.raises(HybridKVError) as stopped:
        resolve(101)
    message = str(stopped.value)
    assert message.startswith("max_num_seqs (101) exceeds available Mamba cache blocks (100): ")
    assert "Pass --max-num-seqs 100," in message
    assert resolve(100) == CUDAGraphMode.FULL_AND_PIECEWISE


@pytest.mark.parametrize(
    "arguments",
    [
        {"requests": 100},
        {"spec": ATTENTION},
        {"mode": CUDAGraphMode.PIECEWISE},
        {"mode": CUDAGraphMode.NONE},
        {"is_profiling": True},
        # vLLM lowers the CUDA graph mode if the backend cannot be captured.
        {"support": AttentionCGSupport.NEVER},
    ],
)
def test_every_configuration_that_vllm_accepts_is_accepted(resolve, arguments):
    resolve(**{"requests": 101, **arguments})
    STATE.active_patches.undo()
    STATE.active_patches = None
    resolve(**{"requests": 101, **arguments})
    with pytest.raises(ValueError, match="exceeds available Mamba cache blocks") as stopped:
        resolve(101)
    assert not isinstance(stopped.value, HybridKVError)
