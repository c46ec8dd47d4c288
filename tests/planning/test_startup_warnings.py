# SPDX-License-Identifier: Apache-2.0
"""Start-up logs the capacity of the KV cache, and warns of every setting that has no effect."""

import logging
from dataclasses import replace

import pytest
import torch
import vllm
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVQuantMode,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from tests.planning.layers import MINOR, plan, planning
from tests.planning.layers import state as state_spec
from vllm_hybrid_kv import plugin
from vllm_hybrid_kv.planning.warnings import padding_share, startup_warnings
from vllm_hybrid_kv.settings import Settings
from vllm_hybrid_kv.state import current_settings

BLOCK = 256
PLAIN = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
K8V4 = replace(
    PLAIN, dtype=torch.uint8, state_content_bytes=100, kv_quant_mode=KVQuantMode.TURBOQUANT_K8V4
)
WINDOW = SlidingWindowSpec(
    block_size=BLOCK, num_kv_heads=2, head_size=64, dtype=torch.bfloat16, sliding_window=512
)


def state(page, content=None):
    """Make the spec of a state with `content` bytes, padded to a page; None fills the page."""
    padded = None if content is None else page
    return state_spec(content or page, BLOCK, mamba_cache_mode="align", page_size_padded=padded)


def lines(config, kv_cache_config, settings=None, layers=None):
    sizes = kv_cache_utils.resolve_kv_cache_block_sizes(kv_cache_config, config)
    return startup_warnings(config, kv_cache_config, *sizes, settings or Settings(), layers)


@pytest.fixture
def config(make_config):
    # Let hits end at whole blocks, whether or not the plugin is active in this process.
    whole = {"prefix_match_unit": "stock"}
    config = make_config(whole, enable_prefix_caching=True)
    config.cache_config.block_size = BLOCK
    # vLLM resets `mamba_cache_mode` for a model without states.
    config.cache_config.mamba_cache_mode = "align"
    return config


@pytest.mark.parametrize("others", [[], [WINDOW], [state(PLAIN.page_size_bytes)]])
def test_a_good_plan_causes_no_warning(config, others):
    assert lines(config, plan(PLAIN, *others)) == []


def test_a_prefix_cache_that_no_prompt_can_hit_causes_a_warning(config):
    groups = plan(PLAIN, state(PLAIN.page_size_bytes))
    config.model_config.max_model_len = BLOCK + 1
    (line,) = lines(config, groups, Settings(prefix_match_unit="stock"))
    assert line == (
        "prefix caching is on but can never hit: the shortest prompt that can hit has 257 tokens, "
        "and with one token of answer it exceeds --max-model-len 257; set prefix_match_unit=auto, "
        "raise --max-model-len above 257, or pass --no-enable-prefix-caching"
    )
    # The warning does not advise a match unit that is active already.
    (line,) = lines(config, groups)
    assert "prefix_match_unit" not in line
    config.model_config.max_model_len = BLOCK + 2
    assert lines(config, groups) == []
    config.model_config.max_model_len = BLOCK
    config.cache_config.enable_prefix_caching = False
    assert lines(config, groups) == []


@pytest.mark.parametrize("dtype", ["turboquant_k8v4", "fp8"])
def test_a_cache_dtype_that_no_layer_uses_causes_a_warning(config, dtype):
    config.cache_config.cache_dtype = dtype
    (line,) = lines(config, plan(PLAIN, WINDOW))
    assert line == (
        f"--kv-cache-dtype {dtype} has no effect: none of the 2 attention layers with a KV cache "
        "uses it; pass --kv-cache-dtype auto, which stores the same"
    )
    config.cache_config.kv_cache_dtype_skip_layers = ["0", "sliding_window"]
    remove = "remove --kv-cache-dtype-skip-layers to quantise all layers"
    fewer = "set boundary_layers=0 to quantise the outermost layers, too"
    with_boundary = fewer if dtype == "turboquant_k8v4" else remove
    for number, advice in ((0, remove), (2, with_boundary)):
        (line,) = lines(config, plan(PLAIN, WINDOW), Settings(boundary_layers=number))
        assert line.endswith(f"; layers 0 sliding_window are skipped: {advice}")


@pytest.mark.parametrize(
    ("dtype", "layers"),
    [
        ("turboquant_k8v4", [replace(PLAIN, block_size=100), K8V4]),
        ("fp8", [replace(PLAIN, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR)]),
        ("bfloat16", [PLAIN]),
    ],
)
def test_one_layer_with_the_cache_dtype_is_enough(config, dtype, layers):
    config.cache_config.cache_dtype = dtype
    assert lines(config, plan(*layers)) == []


def test_the_layers_specs_are_used_if_one_spec_represents_its_group(config):
    config.cache_config.cache_dtype = "turboquant_k8v4"
    specs = {"layer.0": PLAIN, "layer.1": K8V4}
    workers = plan(UniformTypeKVCacheSpecs(block_size=BLOCK, kv_cache_specs=specs))
    workers.kv_cache_groups[0].layer_names[:] = specs
    scheduler = kv_cache_utils.generate_scheduler_kv_cache_config([workers])
    assert lines(config, workers) == []
    assert lines(config, scheduler, layers=specs) == []
    (line,) = lines(config, scheduler)
    assert "none of the 2 attention layers" in line


def test_a_model_with_only_states_uses_no_cache_dtype(config):
    config.cache_config.cache_dtype = "fp8"
    (line,) = lines(config, plan(state(1000)))
    assert "this model has no attention layer with a KV cache; pass --kv-cache-dtype auto" in line


def test_padding_is_weighted_by_the_blocks_of_the_longest_request(config):
    config.model_config.max_model_len = 18 * BLOCK
    # A request has 18 attention blocks and 2 states. Half of a state's page is padding.
    page = PLAIN.page_size_bytes
    groups = plan(PLAIN, state(page, content=page // 2))
    assert padding_share(config, groups) == pytest.approx(0.05)
    assert lines(config, groups) == []
    config.model_config.max_model_len = 17 * BLOCK
    assert padding_share(config, groups) == pytest.approx(1 / 19)
    (line,) = lines(config, groups, layers={"layer.0": PLAIN, "layer.1": state(page)})
    assert line == (
        "5.3 % of the KV pool is padding, most of it in pages like that of layer layer.1 "
        f"({page // 2:,} of {page:,} bytes used); no setting reduces it, because no other page "
        "size leaves less padding for these layers"
    )
    (line,) = lines(
        config,
        groups,
        layers={"layer.0": PLAIN, "layer.1": state(page)},
        settings=Settings(unify_page_sizes="lcm"),
    )
    assert line.endswith("; set unify_page_sizes=min_waste")


def test_the_padding_warning_names_the_layer_whose_bytes_it_shows(config):
    full, padded = state(4096), state(4096, content=1024)
    specs = {"layer.0": full, "layer.1": padded}
    groups = plan(UniformTypeKVCacheSpecs(block_size=BLOCK, kv_cache_specs=specs))
    (line,) = lines(config, groups)
    assert "like that of layer layer.1 (1,024 of 4,096 bytes used)" in line


def test_states_that_vllm_itself_padded_need_another_block_size(config):
    padded = state(PLAIN.page_size_bytes, content=100)
    config.model_config.max_model_len = 4 * BLOCK
    groups, layers = plan(PLAIN, padded), {"layer.0": PLAIN, "layer.1": padded}
    (line,) = lines(config, groups, layers=layers)
    assert line.endswith("; pass --block-size 32, because vLLM pads states to a page of attention")
    config.cache_config.block_size = 32
    (line,) = lines(config, groups, layers=layers)
    assert line.endswith(
        "; no setting reduces it, because vLLM pads states to a page of attention and no other "
        "--block-size makes that page smaller"
    )
    config.cache_config.kv_cache_dtype_skip_layers = ["7"]
    (line,) = lines(config, groups, layers=layers)
    assert line.endswith(
        "; remove --kv-cache-dtype-skip-layers, because vLLM pads states to the largest page of "
        "attention"
    )


@pytest.fixture
def start_up(unregistered, log, caplog):
    """Return a function that plans as an engine core does and returns INFO and WARNING lines."""

    def start(config, kv_cache_config, specs):
        plugin.register()
        planning.get_kv_cache_groups(config, specs)
        caplog.clear()
        kv_cache_utils.update_kv_cache_capacity(config, kv_cache_config)
        kv_cache_utils.resolve_kv_cache_block_sizes(kv_cache_config, config)
        kv_cache_utils.resolve_kv_cache_block_sizes(kv_cache_config, config)
        return log(logging.INFO), log(logging.WARNING)

    return start


STOCK = {"coordinator": "stock", "prefix_match_unit": "stock"}


if MINOR >= (0, 33):

    class OwnBuilder(planning.DefaultKVCacheConfigBuilder):
        """Stands for a platform's builder that groups layers itself."""

        def get_kv_cache_groups(self, vllm_config, kv_cache_spec):
            return [KVCacheGroupSpec([name], spec) for name, spec in kv_cache_spec.items()]

    class SameGroups(planning.DefaultKVCacheConfigBuilder):
        """Stands for a platform's builder that leaves the grouping to vLLM."""

        def get_kv_cache_groups(self, vllm_config, kv_cache_spec):
            return super().get_kv_cache_groups(vllm_config, kv_cache_spec)

    class OwnGroups(torch.nn.Module):
        """Stands for a model whose class groups its layers itself."""

        get_kv_cache_groups = classmethod(OwnBuilder.get_kv_cache_groups)


@pytest.mark.skipif(MINOR < (0, 33), reason="vLLM 0.32 always groups layers itself")
@pytest.mark.parametrize("unify", ["min_waste", "stock"])
@pytest.mark.parametrize("who", ["OwnBuilder", "SameGroups", "OwnGroups", "nobody"])
def test_start_up_names_a_platform_or_model_that_groups_layers_itself(
    unregistered, log, make_config, monkeypatch, who, unify
):
    plugin.register()
    config = make_config({"unify_page_sizes": unify})
    if who == "OwnGroups":
        registry = config.model_config.registry
        monkeypatch.setattr(registry, "models", {**registry.models})
        registry.register_model("LlamaForCausalLM", OwnGroups)
        monkeypatch.setattr(
            config.model_config,
            "_model_info",
            registry.inspect_model_cls("LlamaForCausalLM", config.model_config)[0],
        )
    elif who != "nobody":
        name = f"{__name__}.{who}"
        monkeypatch.setattr(
            type(vllm.platforms.current_platform),
            "get_kv_cache_config_builder_cls",
            classmethod(lambda cls, vllm_config: name),
        )
    from vllm.v1.core.kv_cache_config_builder import get_kv_cache_config_builder

    builder = get_kv_cache_config_builder(config)
    specs = {"layer.0": PLAIN, "layer.1": state(PLAIN.page_size_bytes)}
    groups = planning.get_kv_cache_groups_from_builder(builder, config, specs)
    kv_cache_utils.update_kv_cache_capacity(config, KVCacheConfig(100, [], groups))
    named = [line for line in log(logging.WARNING) if "were made by" in line]
    expected = {
        "OwnBuilder": f"the platform's KV cache config builder {__name__}.OwnBuilder",
        "OwnGroups": "the model's class LlamaForCausalLM",
    }.get(who)
    if expected is None or unify == "stock":
        assert named == []
    else:
        (line,) = named
        assert f"by {expected}: unify_page_sizes=min_waste has no effect" in line


@pytest.mark.parametrize("settings", [None, STOCK], ids=["defaults", "all stock"])
def test_start_up_logs_each_line_once_with_any_strategies(start_up, make_config, settings):
    config = make_config(settings, enable_prefix_caching=True)
    config.cache_config.cache_dtype = "fp8"
    (info, short), (warning,) = start_up(config, plan(PLAIN), {"layer.0": PLAIN})
    # Requests can use 99 blocks of 256 tokens. The longest request (27,680 tokens) needs 109.
    assert info == (
        "KV cache of 100 blocks: 25,394 tokens in requests of max_model_len (27,680 tokens), 0.91 "
        "of them at once; 0 whole requests always fit next to vLLM's null block"
    )
    assert short == "Short requests (512 tokens): 49 always fit at once, 25,088 tokens"
    assert config.cache_config.kv_cache_size_tokens == 25_394
    assert "none of the 1 attention layers" in warning


def test_the_smallest_hit_follows_the_match_unit_of_the_strategy(start_up, make_config):
    config = make_config({"prefix_match_unit": "auto"})
    config.cache_config.enable_prefix_caching = True
    config.model_config.max_model_len = BLOCK
    specs = {"layer.0": PLAIN, "layer.1": state(PLAIN.page_size_bytes)}
    assert start_up(config, plan(*specs.values()), specs)[1] == []
    assert config.cache_config.prefix_match_unit is None
    assert current_settings().prefix_match_unit == "auto"


def test_specs_that_the_schedulers_plan_lacks_come_from_planning(start_up, make_config):
    config = make_config()
    config.cache_config.cache_dtype = "turboquant_k8v4"
    specs = {"layer.0": PLAIN, "layer.1": K8V4}
    workers = plan(UniformTypeKVCacheSpecs(block_size=BLOCK, kv_cache_specs=specs))
    scheduler = kv_cache_utils.generate_scheduler_kv_cache_config([workers])
    assert start_up(config, scheduler, specs)[1] == []


def test_a_match_unit_that_vllm_refuses_stops_start_up_as_without_the_plugin(start_up, make_config):
    config = make_config(enable_prefix_caching=True)
    config.cache_config.prefix_match_unit = 7
    specs = {"layer.0": PLAIN, "layer.1": state(PLAIN.page_size_bytes)}
    with pytest.raises(ValueError, match="Invalid prefix_match_unit=7"):
        start_up(config, plan(*specs.values()), specs)
    assert config.cache_config.kv_cache_size_tokens is not None
