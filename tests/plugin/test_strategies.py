# SPDX-License-Identifier: Apache-2.0
"""Strategies are called by vLLM's own planning and coordination, and their results checked."""

import importlib
import logging

import pytest
import torch
import vllm
import vllm.plugins
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.worker.worker_base import WorkerBase

from vllm_hybrid_kv import plugin
from vllm_hybrid_kv.errors import HybridKVSettingsError, HybridKVStrategyError
from vllm_hybrid_kv.hooks import BUILT_IN_NAMES, HOOK_OF_SETTING
from vllm_hybrid_kv.state import STATE, current_settings

pytestmark = pytest.mark.usefixtures("unregistered")

MINOR = tuple(vllm.__version_tuple__[:2])
if MINOR == (0, 32):
    planning = kv_cache_utils
else:
    from vllm.v1.core import kv_cache_planning as planning

BLOCK = 2_768
ATTENTION, MAMBA = "model.layers.3.self_attn.attn", "model.layers.0.linear_attn"
PRELUDE = "from dataclasses import replace\nfrom vllm_hybrid_kv import hookimpl\ncalls = []\n"


def attention(block_size=16):
    return FullAttentionSpec(
        block_size=block_size,
        num_kv_heads=2,
        head_size=256,
        dtype=torch.uint8,
        state_content_bytes=388,
    )


def state(page=12_648_448, block_size=16, **fields):
    return MambaSpec(block_size=block_size, shapes=((page,),), dtypes=(torch.uint8,), **fields)


def specs():
    """A hybrid model whose pages do not divide each other."""
    return {MAMBA: state(), ATTENTION: attention()}


def plan(config, memory=1 << 36):
    """Run vLLM's planning as the engine core does."""
    if MINOR == (0, 32):
        return planning.get_kv_cache_configs(config, [specs()], [memory])
    groups = planning.get_global_kv_cache_groups(config, [specs()])
    return planning.get_kv_cache_configs(config, [specs()], [memory], groups)


def hybrid(num_blocks=262, full=2, states=3):
    """A plan with pages of equal size in several groups."""
    page = BLOCK * 776
    layers = [attention(BLOCK)] * full + [
        state(page, BLOCK, mamba_cache_mode="align", page_size_padded=page)
    ] * states
    groups = [KVCacheGroupSpec([f"layer.{index}"], spec) for index, spec in enumerate(layers)]
    return KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups)


def manager(config, kv_cache_config):
    scheduler_size, hash_size = kv_cache_utils.resolve_kv_cache_block_sizes(kv_cache_config, config)
    return KVCacheManager(
        kv_cache_config,
        max_model_len=config.model_config.max_model_len,
        scheduler_block_size=scheduler_size,
        hash_block_size=hash_size,
    )


def test_with_stock_rules_the_plan_is_vllms(make_config):
    config = make_config({"unify_page_sizes": "stock"})
    alone = plan(config)
    plugin.register()
    assert plan(config) == alone
    assert {group.kv_cache_spec.page_size_bytes for group in alone[0].kv_cache_groups} == {
        12_648_448
    }


def test_with_stock_rules_capacity_and_block_sizes_are_vllms(make_config):
    stock = {
        "token_capacity_groups": "stock",
        "coordinator": "stock",
        "prefix_match_unit": "stock",
    }
    config, groups = make_config(stock), hybrid()
    capacity = kv_cache_utils.get_kv_cache_capacity(config, groups)
    sizes = kv_cache_utils.resolve_kv_cache_block_sizes(groups, config)
    plugin.register()
    assert kv_cache_utils.get_kv_cache_capacity(config, groups) == capacity
    assert kv_cache_utils.resolve_kv_cache_block_sizes(groups, config) == sizes
    assert type(manager(config, groups).coordinator) is HybridKVCacheCoordinator


def test_lcm_plans_pages_without_waste(make_config):
    plugin.register()
    (planned,) = plan(make_config({"unify_page_sizes": "lcm"}))
    by_layer = {group.layer_names[0]: group.kv_cache_spec for group in planned.kv_cache_groups}
    assert {spec.page_size_bytes for spec in by_layer.values()} == {12_651_904}
    assert by_layer[ATTENTION].block_size == 16_304
    assert planned.num_blocks == (1 << 36) // 12_651_904


def test_min_waste_plans_for_the_longest_sequence(make_config, log):
    plugin.register()
    config = make_config({"unify_page_sizes": "min_waste"})
    (planned,) = plan(config)
    by_layer = {group.layer_names[0]: group.kv_cache_spec for group in planned.kv_cache_groups}
    assert {spec.page_size_bytes for spec in by_layer.values()} == {12_651_904}
    assert by_layer[ATTENTION].block_size == 16_304
    config.model_config.max_model_len = 4_096
    (planned,) = plan(config)
    by_layer = {group.layer_names[0]: group.kv_cache_spec for group in planned.kv_cache_groups}
    assert {spec.page_size_bytes for spec in by_layer.values()} == {12_648_448}
    assert by_layer[ATTENTION].block_size == 4_096
    assert planned.num_blocks == (1 << 36) // 12_648_448
    assert "min_waste: pages of 12,648,448 bytes, 37.44 % of the pool is padding" in log.lines(
        logging.INFO
    )


def test_layers_that_min_waste_cannot_unify_get_vllms_fallback(make_config):
    mla = MLAAttentionSpec(block_size=64, num_kv_heads=1, head_size=577, dtype=torch.bfloat16)
    draft = MLAAttentionSpec(block_size=64, num_kv_heads=1, head_size=575, dtype=torch.bfloat16)
    window = SlidingWindowSpec(
        block_size=64, num_kv_heads=1, head_size=64, dtype=torch.bfloat16, sliding_window=128
    )
    plugin.register()
    layers = {"mla": mla, "draft": draft, "window": window}
    config = make_config({"unify_page_sizes": "min_waste"})
    config.model_config.max_model_len = 4_096
    (group,) = planning.get_kv_cache_groups(config, dict(layers))
    assert set(group.layer_names) == set(layers)
    with pytest.raises(NotImplementedError, match=r"min_waste: .* layer mla .*; layer draft "):
        planning.get_kv_cache_groups(config, {"mla": mla, "draft": draft, MAMBA: state(4_000)})


def test_unequal_pages_of_a_third_party_stop_planning_with_layer_and_numbers(package, make_config):
    package(
        "acme",
        PRELUDE + "@hookimpl\n"
        "def hybrid_kv_unify_page_sizes(kv_cache_spec):\n"
        "    def grown(spec): return replace(spec, page_size_padded=20_000_000)\n"
        f"    return {{**kv_cache_spec, {MAMBA!r}: grown(kv_cache_spec[{MAMBA!r}])}}\n",
    )
    plugin.register()
    with pytest.raises(HybridKVStrategyError) as error:
        plan(make_config({"unify_page_sizes": "acme"}))
    message = str(error.value)
    assert (
        "unify_page_sizes strategy 'acme' (from acme-kv 1.5) must make all pages equal" in message
    )
    assert f"layer {MAMBA} has 20,000,000 bytes" in message
    assert f"layer {ATTENTION} has 12,416 bytes" in message


def test_vllm_plans_with_the_pages_of_a_third_party(package, make_config):
    package(
        "acme",
        PRELUDE + "@hookimpl\n"
        "def hybrid_kv_unify_page_sizes(vllm_config, kv_cache_spec, stock):\n"
        "    calls.append((vllm_config, stock(kv_cache_spec)))\n"
        "    return {n: replace(s, page_size_padded=1 << 24) for n, s in kv_cache_spec.items()}\n",
    )
    plugin.register()
    config = make_config({"unify_page_sizes": "acme"})
    (planned,) = plan(config)
    assert {group.kv_cache_spec.page_size_bytes for group in planned.kv_cache_groups} == {1 << 24}
    ((told, stock_answer),) = importlib.import_module("acme_kv").calls
    assert told is config
    assert stock_answer[MAMBA].page_size_bytes == 12_648_448


def test_a_third_party_that_changes_its_argument_is_still_checked(package, make_config):
    package(
        "acme",
        PRELUDE + "@hookimpl\n"
        "def hybrid_kv_unify_page_sizes(kv_cache_spec):\n"
        f"    del kv_cache_spec[{MAMBA!r}]\n"
        "    return kv_cache_spec\n",
    )
    plugin.register()
    with pytest.raises(HybridKVStrategyError, match=f"left out layer {MAMBA}"):
        plan(make_config({"unify_page_sizes": "acme"}))


def test_a_third_party_that_returns_none_gets_vllms_pages(package, make_config):
    package(
        "acme",
        PRELUDE + "@hookimpl\ndef hybrid_kv_unify_page_sizes(): calls.append(1)\n",
    )
    config = make_config({"unify_page_sizes": "acme"})
    alone = plan(config)
    plugin.register()
    assert plan(config) == alone
    assert importlib.import_module("acme_kv").calls == [1]


def test_growing_counts_the_groups_that_grow(make_config):
    # The numbers of vLLM's #40384: 262 blocks of 2768 tokens, five groups of which two grow.
    plugin.register()
    config = make_config({"token_capacity_groups": "growing"})
    kv_cache_utils.update_kv_cache_capacity(config, hybrid())
    assert config.cache_config.kv_cache_size_tokens == 362_608


def test_growing_does_not_change_the_concurrency(make_config):
    config, groups = make_config(), hybrid()
    tokens, concurrency = kv_cache_utils.get_kv_cache_capacity(config, groups)
    plugin.register()
    growing = make_config({"token_capacity_groups": "growing"})
    more, same = kv_cache_utils.get_kv_cache_capacity(growing, groups)
    assert more > tokens
    assert same == concurrency


def test_an_unknown_group_of_a_third_party_stops_start_up(package, make_config):
    package(
        "acme",
        PRELUDE + "@hookimpl\ndef hybrid_kv_token_capacity_groups(): return ['layer.0']\n",
    )
    plugin.register()
    config = make_config({"token_capacity_groups": "acme"})
    with pytest.raises(
        HybridKVStrategyError, match=r"'acme' \(from acme-kv 1.5\) chose a KV group"
    ):
        kv_cache_utils.update_kv_cache_capacity(config, hybrid())


COORDINATOR = (
    PRELUDE + "from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator\n"
    "class Coordinator(HybridKVCacheCoordinator): pass\n"
    "@hookimpl\n"
    "def hybrid_kv_make_coordinator(kv_cache_config, factory_args, stock):\n"
    "    calls.append(factory_args)\n"
    "    made = stock(**factory_args)\n"
    "    made.__class__ = Coordinator\n"
    "    return made\n"
)


def test_a_coordinator_of_a_third_party_manages_the_cache(package, make_config):
    package("acme", COORDINATOR)
    plugin.register()
    groups = hybrid()
    settings = {"coordinator": "acme", "prefix_match_unit": "stock"}
    made = manager(make_config(settings), groups).coordinator
    acme = importlib.import_module("acme_kv")
    assert type(made) is acme.Coordinator
    (arguments,) = acme.calls
    assert arguments["kv_cache_config"] is groups
    assert arguments["hash_block_size"] == BLOCK
    assert arguments["allow_partial_hash_hits"] is True
    assert ("num_hash_lookahead_tokens" in arguments) == (MINOR >= (0, 33))


def test_a_coordinator_of_another_type_stops_start_up(package, make_config):
    package("acme", PRELUDE + "@hookimpl\ndef hybrid_kv_make_coordinator(): return 'mine'\n")
    plugin.register()
    with pytest.raises(HybridKVStrategyError, match=r"acme-kv 1\.5\) must return a KVCache"):
        manager(make_config({"coordinator": "acme"}), hybrid())


def unit(answer):
    return PRELUDE + f"@hookimpl\ndef hybrid_kv_prefix_match_unit(): return {answer}\n"


def test_prefixes_are_hashed_by_the_unit_of_a_third_party(package, make_config):
    package("acme", unit(173))
    plugin.register()
    config = make_config({"prefix_match_unit": "acme"}, enable_prefix_caching=True)
    sizes = kv_cache_utils.resolve_kv_cache_block_sizes(hybrid(), config)
    assert sizes == (BLOCK, 173)
    assert config.cache_config.prefix_match_unit is None


def test_the_users_own_unit_wins_over_a_strategy(package, make_config):
    package("acme", unit(173))
    plugin.register()
    config = make_config(
        {"prefix_match_unit": "acme"}, enable_prefix_caching=True, prefix_match_unit=16
    )
    assert kv_cache_utils.resolve_kv_cache_block_sizes(hybrid(), config) == (BLOCK, 16)
    assert config.cache_config.prefix_match_unit == 16


def test_a_unit_that_does_not_divide_the_blocks_stops_start_up(package, make_config):
    package("acme", unit(100))
    plugin.register()
    config = make_config({"prefix_match_unit": "acme"}, enable_prefix_caching=True)
    with pytest.raises(HybridKVStrategyError) as error:
        kv_cache_utils.resolve_kv_cache_block_sizes(hybrid(), config)
    assert (
        "'acme' (from acme-kv 1.5) returned a match unit of 100 tokens, which vLLM rejects"
        in str(error.value)
    )
    assert f"layer.0: {BLOCK}" in str(error.value)
    assert config.cache_config.prefix_match_unit is None


@pytest.mark.parametrize("answer", [0, -16, "True", "'16'", 16.0])
def test_a_unit_that_is_not_a_positive_number_stops_start_up(answer, package, make_config):
    package("acme", unit(answer))
    plugin.register()
    config = make_config({"prefix_match_unit": "acme"}, enable_prefix_caching=True)
    with pytest.raises(HybridKVStrategyError, match="a positive number of tokens, got"):
        kv_cache_utils.resolve_kv_cache_block_sizes(hybrid(), config)


def test_a_package_without_hooks_stops_registration(package):
    package("acme", "nothing = 1\n")
    with pytest.raises(HybridKVStrategyError, match=r"'acme' \(from acme-kv 1.5\) implements no"):
        plugin.register()
    assert STATE.active_patches is None


def test_invalid_settings_stop_before_the_model_is_read(tmp_path):
    plugin.register()
    arguments = EngineArgs(
        model=str(tmp_path), additional_config={"hybrid_kv": {"unify_page_sizes": "nonsense"}}
    )
    with pytest.raises(HybridKVSettingsError) as error:
        arguments.create_engine_config()
    assert str(error.value) == (
        "unify_page_sizes='nonsense' (from --additional-config) is not valid: no such strategy; "
        "available: lcm, min_waste, stock"
    )


def test_a_worker_activates_the_settings_of_its_engine(make_config):
    config = make_config({"debug": True})
    plugin.register()
    assert current_settings().debug is False
    WorkerBase(config, local_rank=0, rank=0, distributed_init_method="")
    assert current_settings().debug is True


def test_planning_activates_the_settings_of_the_engine(make_config):
    config = make_config({"debug": True})
    plugin.register()
    plan(config)
    assert current_settings().debug is True


def test_one_line_names_the_strategies_and_kernels(make_config, log, monkeypatch):
    monkeypatch.setenv("VLLM_HYBRID_KV_CPU_ISA", "portable")
    plugin.register()
    assert log.lines(logging.INFO) == []
    config = make_config({"unify_page_sizes": "lcm"}, kv_cache_dtype="turboquant_k8v4")
    WorkerBase(config, local_rank=0, rank=0, distributed_init_method="")
    kv_cache_utils.update_kv_cache_capacity(config, hybrid())
    lines = log.lines(logging.INFO)
    others = ("boundary_layers=", "KV cache of ", "Short requests ")
    assert [line for line in lines if not line.startswith(others)] == [
        f"hybrid_kv {plugin.__version__} active on vLLM {vllm.__version__} (cpu): "
        "unify_page_sizes=lcm, token_capacity_groups=stock, coordinator=hybrid_aware, "
        "prefix_match_unit=auto, kernels=cpu:portable"
    ]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_line_names_no_kernels_without_a_k8v4_cache(dtype, make_config, log):
    plugin.register()
    config = make_config(kv_cache_dtype=dtype)
    (line,) = log.lines(logging.INFO)
    assert line.endswith(f"kernels=none for cache dtype {config.cache_config.cache_dtype}")


def test_the_listed_names_are_those_of_the_built_in_strategies():
    strategies = plugin.built_in_strategies()
    for setting in HOOK_OF_SETTING:
        assert list(BUILT_IN_NAMES[setting]) == strategies.available(setting)
