# SPDX-License-Identifier: Apache-2.0
"""`boundary_layers` says how many layers at each end stay unquantised, of k8v4 engines alone."""

import pytest
from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

from vllm_hybrid_kv import plugin

pytestmark = pytest.mark.usefixtures("unregistered")

K8V4 = "turboquant_k8v4"


@pytest.fixture
def unquantised(make_config):
    """Configures an engine of six layers and returns the layers that vLLM leaves unquantised."""

    def make(settings=None, **arguments):
        plugin.register()
        arguments.setdefault("kv_cache_dtype", K8V4)
        return make_config(settings, **arguments).cache_config.kv_cache_dtype_skip_layers

    return make


def test_by_default_as_many_as_vllm_leaves_out(unquantised, make_config):
    stock = make_config(kv_cache_dtype=K8V4).cache_config.kv_cache_dtype_skip_layers
    assert stock == ["0", "1", "4", "5"]
    assert unquantised() == stock


@pytest.mark.parametrize(
    ("number", "layers"), [(0, ""), (1, "05"), (2, "0145"), (3, "012345"), (9, "012345")]
)
def test_the_setting_says_how_many(number, layers, unquantised):
    assert unquantised({"boundary_layers": number}) == list(layers)


def test_a_variable_says_how_many(unquantised, monkeypatch):
    monkeypatch.setenv("VLLM_HYBRID_KV_BOUNDARY_LAYERS", "1")
    assert unquantised({"boundary_layers": 2}) == ["0", "5"]


def test_layers_to_skip_that_the_user_names_are_skipped_as_well(unquantised):
    named = ["2", "sliding_window"]
    layers = unquantised({"boundary_layers": 1}, kv_cache_dtype_skip_layers=named)
    assert layers == ["0", "2", "5", "sliding_window"]


@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_another_cache_leaves_out_none(dtype, unquantised):
    assert unquantised({"boundary_layers": 1}, kv_cache_dtype=dtype) == []


def test_vllms_coarser_presets_keep_vllms_number(unquantised):
    layers = unquantised({"boundary_layers": 0}, kv_cache_dtype="turboquant_4bit_nc")
    assert layers == ["0", "1", "4", "5"]


def test_outside_of_a_configuration_vllms_number_holds(make_config):
    plugin.register()
    config = make_config({"boundary_layers": 0}, kv_cache_dtype=K8V4)
    rule = TurboQuantConfig.get_boundary_skip_layers
    assert rule(config.model_config) == ["0", "1", "4", "5"]
    assert rule(config.model_config, 1) == ["0", "5"]


def test_a_value_that_is_not_valid_stops_start_up(make_config):
    plugin.register()
    with pytest.raises(ValueError, match=r"boundary_layers=-1 .* is not valid"):
        make_config({"boundary_layers": -1}, kv_cache_dtype=K8V4)
