# SPDX-License-Identifier: Apache-2.0
"""Settings come from the command line and the environment; invalid ones stop start-up."""

import pytest

from vllm_hybrid_kv.errors import HybridKVSettingsError
from vllm_hybrid_kv.kernels.cpu import isa
from vllm_hybrid_kv.settings import resolve
from vllm_hybrid_kv.state import current_settings


def section(**settings):
    return {"hybrid_kv": settings, "another_plugin": {"debug": "maybe"}}


def refusal(config, environment):
    with pytest.raises(HybridKVSettingsError) as error:
        resolve(config, environment)
    assert "\n" not in str(error.value)
    return str(error.value)


# Another platform may pass an object instead of a dict. It holds no settings.
@pytest.mark.parametrize("config", [{}, object()])
def test_the_defaults_are_the_documented_ones(config):
    assert resolve(config, {}).model_dump() == {
        "unify_page_sizes": "min_waste",
        "token_capacity_groups": "stock",
        "coordinator": "hybrid_aware",
        "prefix_match_unit": "auto",
        "boundary_layers": 0,
        "allow_unsafe_drafts": False,
        "debug": False,
        "cpu_isa": "auto",
    }


def test_the_environment_overrides_the_command_line():
    environment = {"VLLM_HYBRID_KV_UNIFY_PAGE_SIZES": "from_env", "VLLM_HYBRID_KV_DEBUG": ""}
    settings = resolve(section(unify_page_sizes="from_line", debug=True), environment)
    # An empty variable counts as unset.
    assert (settings.unify_page_sizes, settings.debug) == ("from_env", True)
    assert settings.source("unify_page_sizes") == "VLLM_HYBRID_KV_UNIFY_PAGE_SIZES"
    assert settings.source("debug") == "--additional-config"
    assert settings.source("coordinator") == "default"


@pytest.mark.parametrize(("written", "meant"), [("1", True), ("true", True), ("0", False)])
def test_a_boolean_variable_may_be_a_word_or_a_number(written, meant):
    assert resolve({}, {"VLLM_HYBRID_KV_DEBUG": written}).debug is meant


@pytest.mark.parametrize(("config", "environment", "message"), [
    (section(unify_page_size="lcm"), {},
        "unknown setting 'unify_page_size' in --additional-config 'hybrid_kv'; valid: "
        "unify_page_sizes, token_capacity_groups, coordinator"),
    ({}, {"VLLM_HYBRID_KV_DEBUGGING": "1", "VLLM_HYBRID": "not ours"},
        "unknown environment variable VLLM_HYBRID_KV_DEBUGGING; valid: VLLM_HYBRID_KV_UNIFY"),
    ({"hybrid_kv": "lcm"}, {}, "must be an object of settings, got 'lcm'; valid: unify"),
    (section(debug="perhaps"), {}, "debug='perhaps' (from --additional-config) is not valid"),
    ({}, {"VLLM_HYBRID_KV_CPU_ISA": "sse2"},
        "cpu_isa='sse2' (from VLLM_HYBRID_KV_CPU_ISA) is not valid: input should be 'auto', 'amx', "
        "'avx512_vnni', 'portable' or 'interpreter'"),
    (section(boundary_layers=-1), {},
        "boundary_layers=-1 (from --additional-config) is not valid: input should be greater than "
        "or equal to 0"),
    (section(coordinator=3), {}, "coordinator=3 (from --additional-config) is not valid"),
    (section(coordinator=""), {}, "coordinator='' (from --additional-config) is not valid"),
])  # fmt: skip
def test_an_invalid_name_or_value_is_refused_with_its_source(config, environment, message):
    assert message in refusal(config, environment)


@pytest.mark.parametrize(
    ("config", "environment", "meant"),
    [
        ({"hybrid_kvs": {"coordinator": "stock"}}, {}, "hybrid_kv"),
        ({"hybrid-kv": {}}, {}, "hybrid_kv"),
        ({"HybridKV": {}}, {}, "hybrid_kv"),
        ({"hybird_kv": {}}, {}, "hybrid_kv"),
        ({"hybrid_kv": {}, "hybrid_kvs": {}}, {}, "hybrid_kv"),
        (section(unify_page_size="lcm"), {}, "unify_page_sizes"),
        (section(cpu_isa="portabel"), {}, "portable"),
        ({}, {"VLLM_HYBRID_KV_COORDINATR": "stock"}, "VLLM_HYBRID_KV_COORDINATOR"),
        ({}, {"VLLM_HYBRIDKV_DEBUG": "1"}, "VLLM_HYBRID_KV_DEBUG"),
        ({}, {"VLLM_HYBIRD_KV_CPU_ISA": "portable"}, "VLLM_HYBRID_KV_CPU_ISA"),
        (section(colour="red"), {}, None),
    ],
)
def test_a_misspelt_name_is_refused_with_a_suggestion(config, environment, meant):
    _, _, suggestion = refusal(config, environment).partition("did you mean ")
    assert suggestion == ("" if meant is None else f"{meant!r}?")


@pytest.mark.parametrize(
    "name", ["hybrid", "kv", "hybrid_kv_offload", "hybrid_attention", "lmcache"]
)
def test_a_section_of_another_plugin_is_ignored(name):
    assert resolve({name: {"debug": "maybe"}}, {}) == resolve({}, {})


def test_variables_of_vllm_are_ignored(unregistered):
    from vllm import envs

    assert resolve({}, dict.fromkeys(envs.environment_variables, "1")) == resolve({}, {})


def test_all_mistakes_are_in_one_message():
    message = refusal(section(colour="red", cpu_isa="mmx"), {"VLLM_HYBRID_KV_DEBUG": "perhaps"})
    for mistake in ("'colour'", "cpu_isa='mmx'", "debug='perhaps'"):
        assert mistake in message


def test_before_any_engine_the_settings_are_those_of_the_environment(monkeypatch):
    monkeypatch.setenv("VLLM_HYBRID_KV_DEBUG", "1")
    assert current_settings().debug is True


def test_the_kernels_use_the_fastest_instructions_by_default():
    assert resolve({}, {}).kernel_isa() == isa.available()[-1]
    assert resolve(section(cpu_isa="portable"), {}).kernel_isa() == "portable"


@pytest.mark.parametrize(
    ("config", "environment"),
    [
        (section(cpu_isa="avx512_bf16"), {}),
        ({}, {"VLLM_HYBRID_KV_CPU_ISA": "avx512_bf16"}),
    ],
)
def test_the_old_name_of_an_instruction_set_works_with_a_deprecation_warning(config, environment):
    with pytest.deprecated_call(match="avx512_bf16 is now named avx512_vnni"):
        settings = resolve(config, environment)
    assert settings.cpu_isa == "avx512_vnni"
    assert settings.source("cpu_isa") != "default"


def test_instructions_that_the_cpu_lacks_are_refused(monkeypatch):
    monkeypatch.setattr(isa, "available", lambda: ("portable",))
    message = r"cpu_isa='amx' \(from VLLM_HYBRID_KV_CPU_ISA\).* choose auto or one of portable"
    with pytest.raises(HybridKVSettingsError, match=message):
        resolve({}, {"VLLM_HYBRID_KV_CPU_ISA": "amx"}).kernel_isa()


def test_the_interpreter_is_refused_if_triton_would_compile(monkeypatch):
    settings = resolve({}, {"VLLM_HYBRID_KV_CPU_ISA": "interpreter"})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(HybridKVSettingsError, match="needs TRITON_INTERPRET=1"):
        settings.kernel_isa()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert settings.kernel_isa() == "interpreter"
