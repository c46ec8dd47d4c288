# SPDX-License-Identifier: Apache-2.0
"""Test which coordinator the strategy makes from the arguments of vLLM's factory."""

import inspect

import pytest
from vllm.v1.core.kv_cache_coordinator import (
    HybridKVCacheCoordinator,
    KVCacheCoordinatorNoPrefixCache,
    UnitaryKVCacheCoordinator,
    get_kv_cache_coordinator,
)
from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.kv_cache_interface import KVCacheConfig

from testing.coordinator.contents import NUM_BLOCKS, full, layout_of, mamba
from vllm_hybrid_kv.coordinator.longest_hit import FixedPointCoordinator
from vllm_hybrid_kv.coordinator.lookup import LOOKUPS
from vllm_hybrid_kv.coordinator.strategies import FixedPoint

# The tests pass vLLM's own factory to the strategies, so the plugin must not be registered.
pytestmark = pytest.mark.usefixtures("unregistered")


def factory_args(layout, **more):
    """Bind the arguments of vLLM's factory as the plugin's patch does for a strategy."""
    bound = inspect.signature(get_kv_cache_coordinator).bind(
        kv_cache_config=KVCacheConfig(NUM_BLOCKS, [], list(layout.groups)),
        max_model_len=4096,
        max_in_flight_tokens=4096,
        use_eagle=False,
        enable_kv_cache_events=False,
        dcp_world_size=1,
        pcp_world_size=1,
        scheduler_block_size=layout.scheduler_block_size,
        hash_block_size=layout.hash_unit,
        **{"enable_caching": True, **more},
    )
    bound.apply_defaults()
    return dict(bound.arguments)


def made(layout, **more):
    return FixedPoint().hybrid_kv_make_coordinator(
        factory_args=factory_args(layout, **more), stock=get_kv_cache_coordinator
    )


def test_several_groups_get_a_fixed_point_coordinator():
    coordinator = made(layout_of(full(64), mamba(64), unit=16))
    assert type(coordinator) is FixedPointCoordinator
    assert isinstance(coordinator, HybridKVCacheCoordinator)
    assert coordinator.enable_partial_hash_hits
    assert coordinator.full_attention_group_id == 0


def test_arguments_of_the_factory_reach_the_coordinator():
    layout = layout_of(full(64), mamba(64), unit=16)
    assert not made(layout, allow_partial_hash_hits=False).enable_partial_hash_hits
    assert made(layout, num_prefill_lookahead=3).num_reprefillable_tokens == 2
    new_in_0_33 = "num_hash_lookahead_tokens"
    if new_in_0_33 in inspect.signature(get_kv_cache_coordinator).parameters:
        assert made(layout, **{new_in_0_33: 2}).block_pool.num_hash_lookahead_tokens == 2


@pytest.mark.parametrize(
    ("layout", "more", "kind"),
    [
        (layout_of(full(16)), {}, UnitaryKVCacheCoordinator),
        (
            layout_of(full(16), mamba(16)),
            {"enable_caching": False},
            KVCacheCoordinatorNoPrefixCache,
        ),
    ],
    ids=["one group", "no prefix caching"],
)
def test_one_group_or_no_prefix_caching_gets_vllms_own_coordinator(layout, more, kind):
    assert type(made(layout, **more)) is kind


def test_a_group_with_a_lookup_of_its_own_gets_vllms_own_coordinator(monkeypatch):
    monkeypatch.delitem(LOOKUPS, MambaManager.find_longest_cache_hit.__func__)
    assert type(made(layout_of(full(16), mamba(16)))) is HybridKVCacheCoordinator
