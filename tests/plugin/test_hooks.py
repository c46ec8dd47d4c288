# SPDX-License-Identifier: Apache-2.0
"""Strategies are registered by name, chosen by a setting, and named in every error."""

import pytest

from vllm_hybrid_kv.errors import HybridKVSettingsError, HybridKVStrategyError
from vllm_hybrid_kv.hooks import Strategies, hookimpl
from vllm_hybrid_kv.settings import Settings

STOCK = {
    "unify_page_sizes": "stock",
    "token_capacity_groups": "stock",
    "coordinator": "stock",
    "prefix_match_unit": "stock",
}


class Answer:
    def __init__(self, answer):
        self.answer = answer

    @hookimpl
    def hybrid_kv_prefix_match_unit(self):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def call(strategies, name):
    settings = Settings(prefix_match_unit=name)
    return strategies.call("prefix_match_unit", settings, vllm_config=None, kv_cache_config=None)


def test_only_the_chosen_strategy_is_called():
    strategies = Strategies({"sixteen": Answer(16), "broken": Answer(RuntimeError("called"))})
    assert call(strategies, "sixteen") == 16


def test_a_strategy_may_return_none():
    strategies = Strategies({"passes": Answer(None), "sixteen": Answer(16)})
    assert call(strategies, "passes") is None


def test_stock_calls_vllms_own_functions():
    strategies, settings = Strategies({}), Settings(**STOCK)
    specs = {"layer": object()}
    assert strategies.call(
        "unify_page_sizes", settings, vllm_config=None, kv_cache_spec=specs, stock=lambda s: [s]
    ) == [specs]
    assert strategies.call(
        "coordinator",
        settings,
        kv_cache_config=None,
        factory_args={"a": 1, "b": 2},
        stock=lambda a, b: (a, b),
    ) == (1, 2)


def test_an_unknown_strategy_is_refused_with_the_available_ones():
    strategies = Strategies({"sixteen": Answer(16)})
    strategies.add("theirs", Answer(8), "their-package 2.0")
    with pytest.raises(HybridKVSettingsError) as error:
        strategies.check(Settings(**{**STOCK, "prefix_match_unit": "seventeen"}))
    assert str(error.value) == (
        "prefix_match_unit='seventeen' (from default) is not valid: no such strategy; available: "
        "sixteen, stock, theirs (from their-package 2.0); did you mean 'sixteen'?"
    )


def test_a_strategy_of_another_hook_is_not_available():
    strategies = Strategies({"sixteen": Answer(16)})
    with pytest.raises(HybridKVSettingsError, match=r"coordinator='sixteen'.*available: stock"):
        strategies.check(Settings(**{**STOCK, "coordinator": "sixteen"}))


class UnknownHook:
    @hookimpl
    def hybrid_kv_prefix_match_units(self): ...


class UnknownArgument:
    @hookimpl
    def hybrid_kv_prefix_match_unit(self, everything): ...


class Unmarked:
    def hybrid_kv_prefix_match_unit(self): ...


@pytest.mark.parametrize(
    ("name", "plugin", "message"),
    [
        ("stock", Answer(1), "there already is one of that name"),
        ("odd", UnknownHook(), "match_units"),
        ("odd", UnknownArgument(), "everything"),
        ("odd", Unmarked(), "implements no hook"),
        ("odd", Answer, "is the class Answer; register an instance"),
    ],
)
def test_an_invalid_strategy_is_refused_at_registration(name, plugin, message):
    with pytest.raises(HybridKVStrategyError, match=rf"'{name}' \(from odd 1\.0\).*{message}"):
        Strategies({}).add(name, plugin, "odd 1.0")


def test_an_error_inside_a_strategy_names_its_package():
    strategies = Strategies({})
    strategies.add("odd", Answer(KeyError("layer.3")), "odd 1.0")
    with pytest.raises(HybridKVStrategyError) as error:
        call(strategies, "odd")
    assert str(error.value) == (
        "prefix_match_unit strategy 'odd' (from odd 1.0) failed in hybrid_kv_prefix_match_unit: "
        "KeyError: 'layer.3'"
    )


def test_an_error_of_vllms_own_rule_is_not_wrapped():
    def stock(kv_cache_spec):
        raise KeyError("layer 3")

    with pytest.raises(KeyError, match="'layer 3'"):
        Strategies({}).call(
            "unify_page_sizes", Settings(**STOCK), vllm_config=None, kv_cache_spec={}, stock=stock
        )


def test_a_not_implemented_error_of_a_strategy_reaches_vllm():
    strategies = Strategies({})
    strategies.add("odd", Answer(NotImplementedError("too odd")), "odd 1.0")
    with pytest.raises(NotImplementedError, match="too odd"):
        call(strategies, "odd")


def test_an_installed_package_is_found_by_its_entry_point(package):
    package(
        "acme",
        "from vllm_hybrid_kv import hookimpl\n"
        "@hookimpl\n"
        "def hybrid_kv_prefix_match_unit(): return 48\n",
    )
    strategies = Strategies({})
    strategies.discover()
    assert call(strategies, "acme") == 48
    assert strategies.available("prefix_match_unit") == ["acme", "stock"]


def test_a_package_that_cannot_be_imported_is_named(package):
    package("acme", "import no_such_module_at_all\n")
    with pytest.raises(HybridKVStrategyError) as error:
        Strategies({}).discover()
    assert "strategy 'acme' (from acme-kv 1.5): acme_kv cannot be imported" in str(error.value)
    assert "no_such_module_at_all" in str(error.value)
