# SPDX-License-Identifier: Apache-2.0
"""vLLM plans its cache with the strategies that are set, and the plugin checks their results."""

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
from vllm.v1.kv_cache_interface import MLAAttentionSpec, SlidingWindowSpec
from vllm.v1.worker.worker_base import WorkerBase

from tests.planning.layers import BLOCK, MINOR, attention, hybrid, planning, state
from vllm_hybrid_kv import plugin
from vllm_hybrid_kv.errors import HybridKVSettingsError, HybridKVStrategyError
from vllm_hybrid_kv.hooks import BUILT_IN_NAMES, HOOK_OF_SETTING
from vllm_hybrid_kv.state import STATE, current_settings

pytestmark = pytest.mark.usefixtures("unregistered")

ATTENTION, MAMBA = "model.layers.3.self_attn.attn", "model.layers.0.linear_attn"
PRELUDE = (
    "from dataclasses import replace\nfrom vllm_hybrid_kv import hookimpl\ncalls = []\n@hookimpl\n"
)


def specs():
    """Return the specs of a hybrid model whose pages do not divide each other."""
    return {MAMBA: state(12_648_448), ATTENTION: attention()}


def plan(config, memory=1 << 36):
    """Run vLLM's planning as the engine core does."""
    if MINOR == (0, 32):
        return planning.get_kv_cache_configs(config, [specs()], [memory])
    groups = planning.get_global_kv_cache_groups(config, [specs()])
    return planning.get_kv_cache_configs(config, [specs()], [memory], groups)


def manager(config, kv_cache_config):
    scheduler_size, hash_size = kv_cache_utils.resolve_kv_cache_block_sizes(kv_cache_config, config)
    return KVCacheManager(
        kv_cache_config,
        max_model_len=config.model_config.max_model_len,
        scheduler_block_size=scheduler_size,
        hash_block_size=hash_size,
    )


def test_with_stock_rules_everything_is_vllms(make_config):
    config, groups = make_config(dict.fromkeys(HOOK_OF_SETTING, "stock")), hybrid()

    def results():
        return [
            plan(config),
            kv_cache_utils.get_kv_cache_capacity(config, groups),
            kv_cache_utils.resolve_kv_cache_block_sizes(groups, config),
        ]

    alone = results()
    plugin.register()
    assert results() == alone
    assert {group.kv_cache_spec.page_size_bytes for group in alone[0][0].kv_cache_groups} == {
        12_648_448
    }
    assert type(manager(config, groups).coordinator) is HybridKVCacheCoordinator


@pytest.mark.parametrize(
    ("strategy", "longest", "page", "block"),
    [
        ("lcm", None, 12_651_904, 16_304),
        ("min_waste", None, 12_651_904, 16_304),
        ("min_waste", 4_096, 12_648_448, 4_096),
    ],
)
def test_vllm_plans_with_the_pages_of_a_strategy(strategy, longest, page, block, make_config, log):
    plugin.register()
    config = make_config({"unify_page_sizes": strategy})
    if longest is not None:
        config.model_config.max_model_len = longest
    (planned,) = plan(config)
    by_layer = {group.layer_names[0]: group.kv_cache_spec for group in planned.kv_cache_groups}
    assert {spec.page_size_bytes for spec in by_layer.values()} == {page}
    assert by_layer[ATTENTION].block_size == block
    assert planned.num_blocks == (1 << 36) // page
    line = "min_waste: pages of 12,648,448 bytes, 37.44 % of the pool is padding"
    assert (line in log(logging.INFO)) is (longest is not None)


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


def test_a_strategy_of_another_package_gets_the_engine_and_vllms_rule(package, make_config):
    package(
        "acme",
        PRELUDE + "def hybrid_kv_unify_page_sizes(vllm_config, kv_cache_spec, stock):\n"
        "    calls.append((vllm_config, stock(kv_cache_spec)))\n"
        "    return {n: replace(s, page_size_padded=1 << 24) for n, s in kv_cache_spec.items()}\n",
    )
    plugin.register()
    config = make_config({"unify_page_sizes": "acme"})
    (planned,) = plan(config)
    assert {group.kv_cache_spec.page_size_bytes for group in planned.kv_cache_groups} == {1 << 24}
    ((got_config, stock_pages),) = importlib.import_module("acme_kv").calls
    assert got_config is config
    assert stock_pages[MAMBA].page_size_bytes == 12_648_448


def test_a_strategy_that_returns_none_gets_vllms_pages(package, make_config):
    package("acme", PRELUDE + "def hybrid_kv_unify_page_sizes(): calls.append(1)\n")
    config = make_config({"unify_page_sizes": "acme"})
    alone = plan(config)
    plugin.register()
    assert plan(config) == alone
    assert importlib.import_module("acme_kv").calls == [1]


def test_growing_counts_the_groups_that_grow_and_keeps_the_concurrency(make_config):
    # vLLM's #40384 has these numbers: 262 blocks of 2768 tokens; two of five groups grow.
    groups = hybrid()
    _, concurrency = kv_cache_utils.get_kv_cache_capacity(make_config(), groups)
    plugin.register()
    config = make_config({"token_capacity_groups": "growing"})
    assert kv_cache_utils.get_kv_cache_capacity(config, groups) == (362_608, concurrency)


def make_manager(config):
    return manager(config, hybrid())


def resolve_sizes(config):
    return kv_cache_utils.resolve_kv_cache_block_sizes(hybrid(), config)


@pytest.mark.parametrize(
    ("setting", "answer", "use", "messages"),
    [
        (
            "unify_page_sizes",
            f"{{**kv_cache_spec, {MAMBA!r}: "
            f"replace(kv_cache_spec[{MAMBA!r}], page_size_padded=20_000_000)}}",
            plan,
            [
                "unify_page_sizes strategy 'acme' (from acme-kv 1.5) must make all pages equal",
                f"layer {MAMBA} has 20,000,000 bytes",
                f"layer {ATTENTION} has 12,416 bytes",
            ],
        ),
        # The result is checked even if the strategy has changed its argument.
        (
            "unify_page_sizes",
            f"kv_cache_spec.pop({MAMBA!r}) and kv_cache_spec",
            plan,
            [f"{MAMBA} is missing"],
        ),
        (
            "token_capacity_groups",
            "['layer.0']",
            lambda config: kv_cache_utils.update_kv_cache_capacity(config, hybrid()),
            ["'acme' (from acme-kv 1.5) must choose among"],
        ),
        ("coordinator", "'mine'", make_manager, ["(from acme-kv 1.5) must return a KVCache"]),
        (
            "prefix_match_unit",
            "100",
            resolve_sizes,
            [
                "'acme' (from acme-kv 1.5) returned a match unit of 100 tokens, which vLLM rejects",
                f"layer.0: {BLOCK}",
            ],
        ),
        *(
            ("prefix_match_unit", unit, resolve_sizes, ["a positive number of tokens, got"])
            for unit in ("0", "-16", "True", "'16'", "16.0")
        ),
    ],
)
def test_an_invalid_answer_of_a_strategy_stops_start_up(
    setting, answer, use, messages, package, make_config
):
    argument = "kv_cache_spec" if "kv_cache_spec" in answer else ""
    package("acme", PRELUDE + f"def {HOOK_OF_SETTING[setting]}({argument}): return {answer}\n")
    plugin.register()
    config = make_config({setting: "acme"}, enable_prefix_caching=True)
    with pytest.raises(HybridKVStrategyError) as error:
        use(config)
    for message in messages:
        assert message in str(error.value)
    assert config.cache_config.prefix_match_unit is None


def test_a_coordinator_of_another_package_manages_the_cache(package, make_config):
    package(
        "acme",
        PRELUDE + "def hybrid_kv_make_coordinator(kv_cache_config, factory_args, stock):\n"
        "    calls.append((factory_args, stock(**factory_args)))\n"
        "    return calls[0][1]\n",
    )
    plugin.register()
    groups = hybrid()
    settings = {"coordinator": "acme", "prefix_match_unit": "stock"}
    made = manager(make_config(settings), groups).coordinator
    ((arguments, coordinator),) = importlib.import_module("acme_kv").calls
    assert made is coordinator
    assert arguments["kv_cache_config"] is groups
    assert arguments["hash_block_size"] == BLOCK
    assert arguments["allow_partial_hash_hits"] is True
    assert ("num_hash_lookahead_tokens" in arguments) == (MINOR >= (0, 33))


@pytest.mark.parametrize(("by_user", "unit"), [(None, 173), (16, 16)])
def test_prefixes_are_hashed_by_the_unit_of_the_strategy_or_the_user(
    by_user, unit, package, make_config
):
    package("acme", PRELUDE + "def hybrid_kv_prefix_match_unit(): return 173\n")
    plugin.register()
    config = make_config(
        {"prefix_match_unit": "acme"}, enable_prefix_caching=True, prefix_match_unit=by_user
    )
    assert resolve_sizes(config) == (BLOCK, unit)
    assert config.cache_config.prefix_match_unit == by_user


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
    with pytest.raises(HybridKVSettingsError, match=r"available: lcm, min_waste, stock$"):
        arguments.create_engine_config()


def start_worker(config):
    WorkerBase(config, local_rank=0, rank=0, distributed_init_method="")


@pytest.mark.parametrize("use", [start_worker, plan])
def test_workers_and_planning_activate_the_settings_of_their_engine(use, make_config):
    config = make_config({"debug": True})
    plugin.register()
    assert current_settings().debug is False
    use(config)
    assert current_settings().debug is True


def test_one_line_names_the_strategies_and_kernels(make_config, log, monkeypatch):
    monkeypatch.setenv("VLLM_HYBRID_KV_CPU_ISA", "portable")
    plugin.register()
    assert log(logging.INFO) == []
    config = make_config({"unify_page_sizes": "lcm"}, kv_cache_dtype="turboquant_k8v4")
    start_worker(config)
    kv_cache_utils.update_kv_cache_capacity(config, hybrid())
    lines = log(logging.INFO)
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
    (line,) = log(logging.INFO)
    assert line.endswith(f"kernels=none for cache dtype {config.cache_config.cache_dtype}")


def test_the_listed_names_are_those_of_the_built_in_strategies():
    strategies = plugin.built_in_strategies()
    for setting in HOOK_OF_SETTING:
        assert list(BUILT_IN_NAMES[setting]) == strategies.available(setting)
