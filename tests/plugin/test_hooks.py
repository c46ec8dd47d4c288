# SPDX-License-Identifier: Apache-2.0
"""Strategies are registered by name, chosen by a setting, and named in every error."""

import importlib.metadata

import pytest

from vllm_hybrid_kv.errors import HybridKVSettingsError, HybridKVStrategyError
from vllm_hybrid_kv.hooks import ENTRY_POINT_GROUP, HOOK_OF_SETTING, Strategies, hookimpl
from vllm_hybrid_kv.settings import Settings

STOCK = dict.fromkeys(HOOK_OF_SETTING, "stock")


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
    broken = Answer(RuntimeError("called"))
    strategies = Strategies({"sixteen": Answer(16), "passes": Answer(None), "broken": broken})
    assert call(strategies, "sixteen") == 16
    assert call(strategies, "passes") is None
    assert call(strategies, "stock") is None


def test_an_unknown_strategy_is_refused_with_the_available_ones():
    strategies = Strategies({"sixteen": Answer(16)})
    strategies.add("theirs", Answer(8), "their-package 2.0")
    with pytest.raises(HybridKVSettingsError) as error:
        strategies.check(Settings(**{**STOCK, "prefix_match_unit": "seventeen"}))
    assert str(error.value) == (
        "prefix_match_unit='seventeen' (from default) is not valid: no such strategy; available: "
        "sixteen, stock, theirs (from their-package 2.0); did you mean 'sixteen'?"
    )
    # A strategy that implements only another hook is not available.
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


@pytest.mark.parametrize(
    ("origin", "raised", "error", "message"),
    [
        (
            "odd 1.0",
            KeyError("layer.3"),
            HybridKVStrategyError,
            r"prefix_match_unit strategy 'odd' \(from odd 1\.0\) raised an error in "
            r"hybrid_kv_prefix_match_unit: KeyError: 'layer\.3'\. Fix that package, or set "
            "prefix_match_unit=stock$",
        ),
        ("built in", KeyError("layer.3"), KeyError, r"^'layer\.3'$"),
        ("odd 1.0", NotImplementedError("too odd"), NotImplementedError, "^too odd$"),
    ],
)
def test_an_error_of_another_package_names_the_package(origin, raised, error, message):
    strategies = Strategies({})
    strategies.add("odd", Answer(raised), origin)
    with pytest.raises(error, match=message):
        call(strategies, "odd")


def entry_point():
    (found,) = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    return found


def test_a_package_that_cannot_be_imported_is_named(package):
    package("acme", "import no_such_module_at_all\n")
    message = r"'acme' \(from acme-kv 1\.5\): acme_kv cannot be imported: .*no_such_module_at_all"
    with pytest.raises(HybridKVStrategyError, match=message):
        Strategies({}).add_entry_point(entry_point())
