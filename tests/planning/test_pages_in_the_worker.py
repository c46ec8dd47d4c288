# SPDX-License-Identifier: Apache-2.0
"""vLLM's worker can allocate the pages that `min_waste` plans, and view them as tensors.

The tests use vLLM's own backends and the functions that its model runner calls.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.attention.backends.turboquant_attn import TurboQuantAttentionBackend
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheLayout,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.worker.utils import (
    AttentionGroup,
    allocate_kv_cache,
    customize_attention_spec,
    prepare_kernel_block_sizes,
)

from tests.planning.layers import named, planning, state
from vllm_hybrid_kv.attention.backend import K8V4AttentionBackend
from vllm_hybrid_kv.planning.min_waste import unify_with_least_waste

BLOCKS = 3
CPU = torch.device("cpu")


def layer(backend, block_size, kv_heads=2, head_size=64, cls=FullAttentionSpec, **fields):
    """Return a layer's backend, and the spec that the model runner makes for it."""
    spec = cls(
        block_size=block_size,
        num_kv_heads=kv_heads,
        head_size=head_size,
        dtype=torch.bfloat16,
        **fields,
    )
    return backend, customize_attention_spec(backend, spec)


def allocated(config, backends, planned):
    """Allocate a small cache as the model runner does, and return each layer's view."""
    groups = planning._get_kv_cache_groups_uniform_page_size(planned)
    page = groups[0].kv_cache_spec.page_size_bytes
    memory = BLOCKS * page * max(len(group.layer_names) for group in groups)
    cache = planning.get_kv_cache_config_from_groups(config, groups, memory)
    assert cache.num_blocks == BLOCKS
    attention_groups = [
        [AttentionGroup(backends[group.layer_names[0]], group.layer_names, group.kv_cache_spec, i)]
        for i, group in enumerate(groups)
    ]
    sizes = prepare_kernel_block_sizes(cache, attention_groups)
    return allocate_kv_cache(cache, CPU, KVCacheLayout.LBHNC, sizes)


def some(backends, block_sizes, kv_heads=(2,), head_sizes=(64,), **fields):
    """A hypothesis strategy: layers with these backends and sizes."""
    choices = map(st.sampled_from, (backends, block_sizes, kv_heads, head_sizes))
    return st.builds(layer, *choices, **{name: st.just(value) for name, value in fields.items()})


PLAIN = [CPUAttentionBackend, TritonAttentionBackend, K8V4AttentionBackend]
TRITON = [TritonAttentionBackend], [16, 48]
mixes = st.lists(
    st.one_of(
        some(PLAIN, [32, 64, 96], [1, 2, 3], [64, 80, 128]),
        some(*TRITON, cls=SlidingWindowSpec, sliding_window=64),
        some(*TRITON, [3], cls=ChunkedLocalAttentionSpec, attention_chunk_size=64),
        some([TurboQuantAttentionBackend], [16, 128, 256, 2_768], head_sizes=[64, 72]),
        some([CPUMLABackend], [16, 64], [1], [576], cls=MLAAttentionSpec),
        st.integers(1, 50_000).map(lambda n: (None, state(4 * n, dtype=torch.float32))),
    ),
    min_size=2,
    max_size=5,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mix=mixes)
def test_every_plan_can_be_allocated_and_viewed(mix, make_config):
    global _config
    if _config is None:
        _config = make_config()
    backends = dict(zip(named(mix), (backend for backend, _ in mix), strict=True))
    specs = named([spec for _, spec in mix])
    planned = unify_with_least_waste(specs)
    views = allocated(_config, backends, planned)
    for name, spec in planned.items():
        view = views[name]
        if isinstance(spec, MambaSpec):
            pages = view.squeeze(dim=(1, 2))[:, : spec.state_content_size_bytes]
            assert pages.view(torch.float32).shape[0] == BLOCKS
            continue
        kernel_blocks, heads, tokens, _ = view.shape
        assert kernel_blocks * tokens == BLOCKS * spec.block_size
        assert heads == spec.num_heads
        view.fill_(0)


_config = None


def test_the_worker_refuses_a_padded_page_that_is_split_into_kernel_blocks(make_config):
    # vLLM itself would plan this padding for a TurboQuant layer next to a layer with larger pages.
    backend, spec = layer(TurboQuantAttentionBackend, 256, head_size=72)
    padded = replace(spec, page_size_padded=spec.page_size_bytes + 64)
    with pytest.raises(ValueError, match="cannot be split into 2 kernel blocks of 128 tokens"):
        allocated(make_config(), {"layer": backend}, {"layer": padded})
