# SPDX-License-Identifier: Apache-2.0
"""On an unsupported vLLM the plugin is inactive, or stops start-up if the user named it."""

import logging
import sys

import pytest
import vllm.plugins
import vllm.version
from vllm.v1.core import kv_cache_coordinator

from vllm_hybrid_kv import plugin
from vllm_hybrid_kv.errors import HybridKVSettingsError, HybridKVVersionError
from vllm_hybrid_kv.state import STATE

pytestmark = pytest.mark.usefixtures("unregistered")


@pytest.fixture
def unsupported(monkeypatch):
    monkeypatch.setattr(vllm.version, "__version__", "0.99.1")
    monkeypatch.setattr(vllm.version, "__version_tuple__", (0, 99, 1))


@pytest.mark.usefixtures("unsupported")
def test_an_unsupported_version_warns_once_and_leaves_vllm_unchanged(log):
    stock = [kv_cache_coordinator.get_kv_cache_coordinator]
    plugin.register()
    plugin.register()
    assert STATE.active_patches is None
    assert kv_cache_coordinator.get_kv_cache_coordinator is stock[0]
    (warning,) = log(logging.WARNING)
    assert "supports vLLM 0.32 and 0.33, this is vLLM 0.99.1" in warning
    assert "The plugin is inactive and vLLM is unchanged" in warning
    assert isinstance(STATE.why_inactive, HybridKVVersionError)


@pytest.mark.usefixtures("unsupported")
@pytest.mark.parametrize("plugins", ["hybrid_kv", "other,hybrid_kv"])
def test_an_unsupported_version_stops_if_the_user_named_the_plugin(plugins, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", plugins)
    monkeypatch.setattr(vllm.plugins, "plugins_loaded", False)
    # vLLM's loader lets the error through.
    with pytest.raises(HybridKVVersionError, match=r"supports vLLM 0\.32 and 0\.33, this is"):
        vllm.plugins.load_general_plugins()


def test_a_changed_vllm_warns_and_stays_unchanged(log, monkeypatch):
    def changed(*args, **kwargs):
        """Stand in for another plugin's replacement of vLLM's function."""

    monkeypatch.setattr(kv_cache_coordinator, "get_kv_cache_coordinator", changed)
    plugin.register()
    assert STATE.active_patches is None
    assert kv_cache_coordinator.get_kv_cache_coordinator is changed
    (warning,) = log(logging.WARNING)
    assert "get_kv_cache_coordinator has the source hash" in warning
    assert "(*args, **kwargs)" in warning


def test_a_supported_version_becomes_active_once_through_vllms_own_loader(log, monkeypatch):
    monkeypatch.setattr(vllm.plugins, "plugins_loaded", False)
    vllm.plugins.load_general_plugins()
    first, ours = STATE.active_patches, [kv_cache_coordinator.get_kv_cache_coordinator]
    plugin.register()
    assert STATE.active_patches is first
    assert log() == []
    assert kv_cache_coordinator.get_kv_cache_coordinator is ours[0]


def test_an_invalid_variable_stops_registration_and_changes_nothing(monkeypatch):
    stock = [kv_cache_coordinator.get_kv_cache_coordinator]
    monkeypatch.setenv("VLLM_HYBRID_KV_COORDINATOR", "nonsense")
    with pytest.raises(HybridKVSettingsError, match=r"'nonsense' \(from VLLM_HYBRID_KV"):
        plugin.register()
    assert kv_cache_coordinator.get_kv_cache_coordinator is stock[0]


def test_a_vllm_command_ends_with_the_message_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm.entrypoints.cli.main", vllm)
    monkeypatch.setenv("VLLM_HYBRID_KV_DEBUG", "perhaps")
    with pytest.raises(SystemExit) as stop:
        plugin.register()
    assert stop.value.code.startswith("hybrid_kv: debug='perhaps' (from VLLM_HYBRID_KV_DEBUG)")
