# SPDX-License-Identifier: Apache-2.0
"""Settings come from the command line and the environment; invalid ones stop start-up."""

import pytest

from vllm_hybrid_kv.errors import HybridKVSettingsError
from vllm_hybrid_kv.kernels.cpu import isa
from vllm_hybrid_kv.settings import resolve
from vllm_hybrid_kv.state import current_settings


def section(**settings):
    return {"hybrid_kv": settings, "another_plugin": {"debug": "maybe"}}


def test_by_default_planning_and_prefix_caching_are_ours():
    settings = resolve({}, {})
    assert settings.unify_page_sizes == "min_waste"
    assert settings.token_capacity_groups == "stock"
    assert settings.coordinator == "hybrid_aware"
    assert settings.prefix_match_unit == "auto"
    assert settings.boundary_layers == 2
    assert settings.debug is False
    assert settings.cpu_isa == "auto"


def test_the_command_line_sets_a_field():
    settings = resolve(section(unify_page_sizes="lcm", debug=True), {})
    assert (settings.unify_page_sizes, settings.debug) == ("lcm", True)
    assert settings.token_capacity_groups == "stock"


def test_the_environment_wins_over_the_command_line():
    environment = {"VLLM_HYBRID_KV_UNIFY_PAGE_SIZES": "from_env", "VLLM_HYBRID_KV_DEBUG": "0"}
    settings = resolve(section(unify_page_sizes="from_line", debug=True), environment)
    assert (settings.unify_page_sizes, settings.debug) == ("from_env", False)


def test_every_value_has_a_source():
    settings = resolve(section(debug=True), {"VLLM_HYBRID_KV_CPU_ISA": "portable"})
    assert settings.source("debug") == "--additional-config"
    assert settings.source("cpu_isa") == "VLLM_HYBRID_KV_CPU_ISA"
    assert settings.source("coordinator") == "default"


@pytest.mark.parametrize(("written", "meant"), [("1", True), ("true", True), ("0", False)])
def test_a_boolean_variable_may_be_a_word_or_a_number(written, meant):
    assert resolve({}, {"VLLM_HYBRID_KV_DEBUG": written}).debug is meant


def test_an_empty_variable_counts_as_unset():
    assert resolve(section(debug=True), {"VLLM_HYBRID_KV_DEBUG": ""}).debug is True


def test_an_unknown_field_is_refused_with_the_valid_ones():
    with pytest.raises(HybridKVSettingsError) as error:
        resolve(section(unify_page_size="lcm"), {})
    assert "unknown setting 'unify_page_size' in --additional-config" in str(error.value)
    assert "unify_page_sizes, token_capacity_groups, coordinator" in str(error.value)


def test_an_unknown_variable_is_refused_with_the_valid_ones():
    with pytest.raises(HybridKVSettingsError) as error:
        resolve({}, {"VLLM_HYBRID_KV_DEBUGGING": "1", "VLLM_HYBRID": "not ours"})
    assert "unknown environment variable VLLM_HYBRID_KV_DEBUGGING; valid: " in str(error.value)
    assert "VLLM_HYBRID_KV_DEBUG," in str(error.value)


@pytest.mark.parametrize(
    ("settings", "environment", "message"),
    [
        ({"debug": "perhaps"}, {}, "debug='perhaps' (from --additional-config) is not valid"),
        (
            {},
            {"VLLM_HYBRID_KV_CPU_ISA": "sse2"},
            "cpu_isa='sse2' (from VLLM_HYBRID_KV_CPU_ISA) is not valid: input should be 'auto', "
            "'amx', 'avx512_bf16', 'portable' or 'interpreter'",
        ),
        (
            {"boundary_layers": -1},
            {},
            "boundary_layers=-1 (from --additional-config) is not valid: input should be greater "
            "than or equal to 0",
        ),
        (
            {},
            {"VLLM_HYBRID_KV_BOUNDARY_LAYERS": "few"},
            "boundary_layers='few' (from VLLM_HYBRID_KV_BOUNDARY_LAYERS) is not valid",
        ),
        ({"coordinator": 3}, {}, "coordinator=3 (from --additional-config) is not valid"),
        ({"coordinator": ""}, {}, "coordinator='' (from --additional-config) is not valid"),
    ],
)
def test_an_invalid_value_is_refused_with_its_source(settings, environment, message):
    with pytest.raises(HybridKVSettingsError) as error:
        resolve(section(**settings), environment)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("config", "environment", "meant"),
    [
        ({"hybrid_kvs": {"coordinator": "stock"}}, {}, "'hybrid_kv'"),
        ({"hybrid-kv": {}}, {}, "'hybrid_kv'"),
        ({"HybridKV": {}}, {}, "'hybrid_kv'"),
        ({"hybird_kv": {}}, {}, "'hybrid_kv'"),
        ({"hybrid_kv": {}, "hybrid_kvs": {}}, {}, "'hybrid_kv'"),
        (section(unify_page_size="lcm"), {}, "'unify_page_sizes'"),
        (section(cpu_isa="portabel"), {}, "'portable'"),
        ({}, {"VLLM_HYBRID_KV_COORDINATR": "stock"}, "'VLLM_HYBRID_KV_COORDINATOR'"),
        ({}, {"VLLM_HYBRIDKV_DEBUG": "1"}, "'VLLM_HYBRID_KV_DEBUG'"),
        ({}, {"VLLM_HYBIRD_KV_CPU_ISA": "portable"}, "'VLLM_HYBRID_KV_CPU_ISA'"),
    ],
)
def test_a_misspelt_name_is_refused_with_a_suggestion(config, environment, meant):
    with pytest.raises(HybridKVSettingsError) as error:
        resolve(config, environment)
    assert f"did you mean {meant}?" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unrelated_name_is_refused_without_a_suggestion():
    with pytest.raises(HybridKVSettingsError) as error:
        resolve(section(colour="red"), {})
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["hybrid", "kv", "hybrid_kv_offload", "hybrid_attention", "lmcache"]
)
def test_a_section_of_another_plugin_is_ignored(name):
    assert resolve({name: {"debug": "maybe"}}, {}) == resolve({}, {})


def test_variables_of_vllm_are_ignored(unregistered):
    from vllm import envs

    assert resolve({}, dict.fromkeys(envs.environment_variables, "1")) == resolve({}, {})


def test_all_mistakes_are_in_one_message():
    with pytest.raises(HybridKVSettingsError) as error:
        resolve(section(colour="red", cpu_isa="mmx"), {"VLLM_HYBRID_KV_DEBUG": "perhaps"})
    for mistake in ("'colour'", "cpu_isa='mmx'", "debug='perhaps'"):
        assert mistake in str(error.value)


def test_a_section_that_is_not_an_object_is_refused():
    with pytest.raises(HybridKVSettingsError, match="must be an object of settings, got 'lcm'"):
        resolve({"hybrid_kv": "lcm"}, {})


def test_a_configuration_object_of_another_platform_holds_no_settings():
    assert resolve(object(), {}).unify_page_sizes == "min_waste"


def test_before_any_engine_the_settings_are_those_of_the_environment(monkeypatch):
    monkeypatch.setenv("VLLM_HYBRID_KV_DEBUG", "1")
    assert current_settings().debug is True


def test_the_kernels_use_the_fastest_instructions_by_default():
    assert resolve({}, {}).kernel_isa() == isa.available()[-1]
    assert resolve(section(cpu_isa="portable"), {}).kernel_isa() == "portable"


def test_instructions_that_the_cpu_lacks_are_refused(monkeypatch):
    monkeypatch.setattr(isa, "available", lambda: ("portable",))
    with pytest.raises(HybridKVSettingsError) as error:
        resolve({}, {"VLLM_HYBRID_KV_CPU_ISA": "amx"}).kernel_isa()
    assert "cpu_isa='amx' (from VLLM_HYBRID_KV_CPU_ISA)" in str(error.value)
    assert "choose auto or one of portable" in str(error.value)


def test_the_interpreter_is_refused_if_triton_would_compile(monkeypatch):
    settings = resolve({}, {"VLLM_HYBRID_KV_CPU_ISA": "interpreter"})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(HybridKVSettingsError, match="needs TRITON_INTERPRET=1"):
        settings.kernel_isa()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert settings.kernel_isa() == "interpreter"
