# SPDX-License-Identifier: Apache-2.0
"""In k8v4 engines, `boundary_layers` sets how many layers at each end stay unquantised."""

import logging
from types import SimpleNamespace

import pytest
from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

from vllm_hybrid_kv import plugin
from vllm_hybrid_kv.attention.unsupported import UnsupportedModelError
from vllm_hybrid_kv.patches import configuration
from vllm_hybrid_kv.patches.layers import cache_owners
from vllm_hybrid_kv.state import STATE

pytestmark = pytest.mark.usefixtures("unregistered")

K8V4 = "turboquant_k8v4"


@pytest.fixture
def unquantised(make_config):
    """Return a function that says which of an engine's six layers vLLM leaves unquantised."""

    def make(settings=None, **arguments):
        plugin.register()
        arguments.setdefault("kv_cache_dtype", K8V4)
        return make_config(settings, **arguments).cache_config.kv_cache_dtype_skip_layers

    return make


def test_two_boundary_layers_are_those_of_vllms_rule(unquantised, make_config):
    stock = make_config(kv_cache_dtype=K8V4).cache_config.kv_cache_dtype_skip_layers
    assert unquantised({"boundary_layers": 2}) == stock == list("0145")


@pytest.mark.parametrize(
    ("number", "arguments", "layers"),
    [
        (0, {}, []),
        (1, {}, [*"05"]),
        (3, {}, [*"012345"]),
        (9, {}, [*"012345"]),
        # Layers that the user skips are added.
        (1, {"kv_cache_dtype_skip_layers": ["2", "swa"]}, ["0", "2", "5", "swa"]),
        # Another cache dtype has no boundary layers.
        (1, {"kv_cache_dtype": "auto"}, []),
        (1, {"kv_cache_dtype": "fp8"}, []),
    ],
)
def test_the_setting_chooses_the_number(number, arguments, layers, unquantised):
    assert unquantised({"boundary_layers": number}, **arguments) == layers


def test_vllms_coarser_presets_keep_vllms_number(unquantised, monkeypatch):
    # These presets have no CPU kernels, so disable the plugin's refusal.
    monkeypatch.setattr(configuration, "refuse_without_cpu_kernels", lambda _: None)
    assert unquantised(kv_cache_dtype="turboquant_4bit_nc") == list("0145")


def test_vllms_number_applies_outside_of_an_engine_configuration(make_config):
    plugin.register()
    config = make_config(kv_cache_dtype=K8V4)
    rule = TurboQuantConfig.get_boundary_skip_layers
    assert rule(config.model_config) == ["0", "1", "4", "5"]
    assert rule(config.model_config, 1) == ["0", "5"]


def rule(config, number=2, hybrid=False, mla=False):
    """Ask vLLM's patched rule for boundary layers, as vLLM does when it configures an engine."""
    plugin.register()
    model = SimpleNamespace(
        model="some/model", hf_text_config=config, is_hybrid=hybrid, use_mla=mla, hf_config=config
    )
    STATE.boundary_layers = number
    try:
        return TurboQuantConfig.get_boundary_skip_layers(model)
    finally:
        STATE.boundary_layers = None


@pytest.mark.parametrize(
    ("shared", "number", "layers"),
    [(4, 2, "0145"), (4, 1, "05"), (4, 0, ""), (4, 9, "012345"), (0, 2, "0189"), (None, 1, "09")],
)
def test_boundary_layers_are_counted_among_layers_that_own_a_cache(shared, number, layers):
    config = SimpleNamespace(num_hidden_layers=10, num_kv_shared_layers=shared)
    assert rule(config, number) == list(layers)


def test_only_layers_that_stay_unquantised_are_logged(log):
    config = SimpleNamespace(num_hidden_layers=7)
    rule(config, 0)
    assert log(logging.INFO) == []
    rule(config, 1)
    assert log(logging.INFO) == [
        "boundary_layers=1: 2 of 7 attention layers stay unquantised (0, 6)"
    ]


@pytest.mark.parametrize("as_dict", [True, False])
def test_layers_without_attention_are_not_counted(as_dict):
    make = dict if as_dict else SimpleNamespace
    kinds = [{"no_op": True}, {}, {"replace_with_linear": True}, {"no_op": False}, {}, {}]
    blocks = [make(attention=make(**kind)) for kind in kinds]
    config = SimpleNamespace(num_hidden_layers=6, block_configs=blocks)
    if not as_dict:
        assert cache_owners(config) == [1, 3, 4, 5]
    assert rule(config, 1) == ["1", "5"]


def test_a_hybrid_model_whose_config_does_not_list_its_attention_layers_is_served():
    config = SimpleNamespace(num_hidden_layers=6)
    assert rule(config, hybrid=True) == []
    # vLLM's own rule refuses such a model.
    with pytest.raises(NotImplementedError, match="identifiable full-attention layers"):
        rule(config, number=None, hybrid=True)


@pytest.mark.parametrize("hybrid", [True, False])
def test_a_model_with_latent_attention_is_refused_by_name(hybrid):
    with pytest.raises(UnsupportedModelError) as caught:
        rule(SimpleNamespace(num_hidden_layers=6), hybrid=hybrid, mla=True)
    assert str(caught.value) == (
        "model some/model: --kv-cache-dtype turboquant_k8v4 cannot serve this model: multi-head "
        "latent attention (MLA) has its own latent cache. Serve the model with "
        "--kv-cache-dtype auto"
    )
