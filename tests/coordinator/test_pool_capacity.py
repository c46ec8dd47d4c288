# SPDX-License-Identifier: Apache-2.0
"""Compare `Capacity` with how many requests vLLM's KV cache manager admits until it is full."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

from hypothesis import example, given, settings
from hypothesis import strategies as st
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheSpec, MambaSpec
from vllm.v1.request import Request

from testing.coordinator.contents import chunked, full, mamba, ring, window
from tests.coordinator.soak.engine import configure
from tests.coordinator.test_smallest_hit import plan_of
from vllm_hybrid_kv.planning.capacity import Capacity, capacity


@cache
def _config() -> VllmConfig:
    return configure(plan_of([mamba(16), full(16)], "stock"))


@dataclass(frozen=True)
class Pool:
    """A KV cache of `num_blocks` blocks, including the null block, and the limits of an engine."""

    specs: tuple[KVCacheSpec, ...]
    num_blocks: int
    max_model_len: int
    budget: int

    @property
    def kv_cache_config(self) -> KVCacheConfig:
        groups = [KVCacheGroupSpec([f"layer {i}"], spec) for i, spec in enumerate(self.specs)]
        return KVCacheConfig(self.num_blocks, [], groups)

    @property
    def config(self) -> VllmConfig:
        config = _config()
        modes = [spec.mamba_cache_mode for spec in self.specs if isinstance(spec, MambaSpec)]
        config.cache_config.mamba_cache_mode = modes[0] if modes else "none"
        config.model_config.max_model_len = self.max_model_len
        config.scheduler_config.max_num_batched_tokens = self.budget
        config.scheduler_config.async_scheduling = False
        return config

    @property
    def capacity(self) -> Capacity:
        return capacity(self.config, self.kv_cache_config)

    def fit(self, tokens: int) -> int:
        """Admit requests of `tokens` tokens until the pool is full. Returns how many it holds."""
        sizes = math.lcm(*(spec.block_size for spec in self.specs))
        manager = KVCacheManager(
            self.kv_cache_config,
            max_model_len=self.max_model_len,
            scheduler_block_size=sizes,
            hash_block_size=sizes,
            max_in_flight_tokens=self.config.max_in_flight_tokens,
            enable_caching=False,
        )
        for number in range(self.num_blocks + 1):
            request = Request(
                request_id=str(number),
                prompt_token_ids=[0] * tokens,
                sampling_params=SamplingParams(max_tokens=1),
                pooling_params=None,
            )
            while request.num_computed_tokens < tokens:
                chunk = min(self.budget, tokens - request.num_computed_tokens)
                # The scheduler admits a request only if the whole request fits.
                begins = request.num_computed_tokens == 0
                slots = manager.allocate_slots(request, chunk, full_sequence_must_fit=begins)
                if slots is None:
                    return number
                request.num_computed_tokens += chunk
        raise AssertionError("more requests than blocks")


def states_of(mode: str, max_model_len: int, block: int, drafts: int) -> KVCacheSpec:
    spec = mamba(max_model_len if mode == "none" else block, mode=mode)
    return replace(spec, num_speculative_blocks=drafts)


@st.composite
def pools(draw: st.DrawFn, bounded: bool) -> Pool:
    """Draw pools with or without bounded groups (windows, chunks, aligned states)."""
    unit = draw(st.sampled_from([2, 4, 16]))
    max_model_len = draw(st.integers(2 * unit, 24 * unit))
    mode = draw(st.sampled_from(["none", "all", "align"] if bounded else ["none", "all"]))
    sizes = st.sampled_from([unit, unit, 2 * unit, 3 * unit])
    drafts = draw(st.sampled_from([0, 0, 1, 2]))
    kinds = [st.builds(full, sizes), st.just(states_of(mode, max_model_len, unit, drafts))]
    kinds.append(st.builds(ring, st.just(4)))
    if bounded:
        reach = st.integers(2, 8 * unit)
        kinds += [st.builds(window, sizes, reach), st.builds(chunked, sizes, reach)]
    specs = draw(st.lists(st.one_of(kinds), min_size=1, max_size=5))
    if all(isinstance(spec, type(ring(4))) for spec in specs):
        specs.append(full(unit))
    return Pool(
        tuple(specs),
        num_blocks=draw(st.integers(2, 150)),
        max_model_len=max_model_len,
        budget=max_model_len if not bounded else draw(st.integers(unit, 12 * unit)),
    )


@settings(max_examples=120, deadline=None)
@given(pools(bounded=False))
def test_without_bounded_groups_the_capacity_is_exact(pool):
    expected = pool.capacity
    assert pool.fit(expected.short_request) == expected.short_requests
    assert pool.fit(pool.max_model_len) == expected.max_len_requests


@settings(max_examples=120, deadline=None)
@given(pools(bounded=True))
@example(Pool((chunked(32, 2),), num_blocks=2, max_model_len=33, budget=17))
def test_with_any_groups_at_least_the_capacity_fits(pool):
    expected = pool.capacity
    assert pool.fit(expected.short_request) >= expected.short_requests
    assert pool.fit(pool.max_model_len) >= expected.max_len_requests
