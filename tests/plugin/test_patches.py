# SPDX-License-Identifier: Apache-2.0
"""Patches are applied all or none, hold in every module, and can be taken back."""

import dataclasses
import os
import sys
from types import ModuleType

import pytest
import vllm
import vllm.envs
import vllm.platforms
import vllm.v1.engine.core
import vllm.v1.simple_kv_offload.manager
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.core import kv_cache_coordinator, kv_cache_manager, kv_cache_utils

from vllm_hybrid_kv import patches, plugin
from vllm_hybrid_kv.errors import HybridKVFingerprintError, HybridKVPatchError
from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.patches import base
from vllm_hybrid_kv.state import STATE

pytestmark = pytest.mark.usefixtures("unregistered")

MINOR = tuple(vllm.__version_tuple__[:2])
ADAPTER = __import__(patches.ADAPTERS[MINOR], fromlist=["TARGETS"])
GPU_ONLY = {"verify_gemma4_config"}
TARGETS = [
    field.name
    for field in dataclasses.fields(ADAPTER.TARGETS)
    if isinstance(getattr(ADAPTER.TARGETS, field.name), base.Target) and field.name not in GPU_ONLY
]
BACKEND = "vllm_hybrid_kv.attention.backend.K8V4AttentionBackend"


def bindings():
    """Everything that the patches change, as it is now."""
    targets = {name: getattr(ADAPTER.TARGETS, name).binding() for name in TARGETS}
    return {
        **targets,
        "manager": kv_cache_manager.get_kv_cache_coordinator,
        "offload": vllm.v1.simple_kv_offload.manager.get_kv_cache_coordinator,
        "core": vllm.v1.engine.core.resolve_kv_cache_block_sizes,
        "backend": AttentionBackendEnum.TURBOQUANT.get_path(),
        "variables": dict(vllm.envs.environment_variables),
    }


READ_ONLY = ["validate_environ", "align_chunks", "cache_prompt_end"]
WRAPPED = [name for name in TARGETS if name not in READ_ONLY]


def test_the_adapter_is_that_of_the_vllm_under_test():
    assert plugin.__version__
    assert MINOR in patches.ADAPTERS
    assert ADAPTER.__name__.endswith("v{}_{}".format(*MINOR))


def test_every_name_is_rebound_where_it_is_defined():
    before = bindings()
    plugin.register()
    after = bindings()
    assert [name for name in TARGETS if after[name] is before[name]] == READ_ONLY
    assert after["backend"] == BACKEND


def test_a_function_is_rebound_in_the_modules_that_imported_it_by_name():
    importer = ModuleType("imported_by_name_before")
    exec("from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity as theirs", vars(importer))
    sys.modules[importer.__name__] = importer
    try:
        plugin.register()
        assert importer.theirs is kv_cache_utils.get_kv_cache_capacity
    finally:
        del sys.modules[importer.__name__]
    ours = kv_cache_coordinator.get_kv_cache_coordinator
    assert kv_cache_manager.get_kv_cache_coordinator is ours
    assert vllm.v1.simple_kv_offload.manager.get_kv_cache_coordinator is ours
    core = vllm.v1.engine.core
    assert core.resolve_kv_cache_block_sizes is kv_cache_utils.resolve_kv_cache_block_sizes


def test_a_module_imported_later_gets_the_rebound_function(monkeypatch):
    plugin.register()
    monkeypatch.delitem(sys.modules, "vllm.v1.simple_kv_offload.manager", raising=False)
    import vllm.v1.simple_kv_offload.manager as late

    assert late.get_kv_cache_coordinator is kv_cache_coordinator.get_kv_cache_coordinator
    STATE.active_patches.verify()


def test_undoing_restores_every_binding():
    before = bindings()
    plugin.register()
    STATE.active_patches.undo()
    assert bindings() == before


def test_undoing_restores_modules_that_were_imported_meanwhile():
    stock = [kv_cache_utils.get_kv_cache_capacity]
    plugin.register()
    importer = ModuleType("imported_by_name_meanwhile")
    exec("from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity as ours", vars(importer))
    sys.modules[importer.__name__] = importer
    try:
        STATE.active_patches.undo()
        assert importer.ours is stock[0]
    finally:
        del sys.modules[importer.__name__]


def test_a_rebound_function_keeps_its_name_and_signature():
    import inspect

    stock = inspect.signature(kv_cache_utils.resolve_kv_cache_block_sizes)
    plugin.register()
    ours = kv_cache_utils.resolve_kv_cache_block_sizes
    assert ours.__name__ == "resolve_kv_cache_block_sizes"
    assert inspect.signature(ours) == stock


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("part", ["source", "signature"])
def test_one_wrong_fingerprint_applies_nothing(name, part, monkeypatch):
    before = bindings()
    target = getattr(ADAPTER.TARGETS, name)
    wrong = dataclasses.replace(
        target, fingerprint=dataclasses.replace(target.fingerprint, **{part: "0" * 16})
    )
    monkeypatch.setattr(ADAPTER, "KNOWN", dataclasses.replace(ADAPTER.TARGETS, **{name: wrong}))
    monkeypatch.setenv("VLLM_PLUGINS", "hybrid_kv")
    with pytest.raises(HybridKVFingerprintError) as error:
        plugin.register()
    assert f"{target} has the {part}" in str(error.value)
    assert f"known is {'0' * 16}" in str(error.value)
    monkeypatch.undo()
    assert bindings() == before


def test_a_function_that_another_plugin_wrapped_is_noticed(monkeypatch):
    import functools

    stock = [kv_cache_utils.get_kv_cache_capacity]

    @functools.wraps(stock[0])
    def wrapper(vllm_config, kv_cache_config):
        return stock[0](vllm_config, kv_cache_config)

    monkeypatch.setattr(kv_cache_utils, "get_kv_cache_capacity", wrapper)
    monkeypatch.setenv("VLLM_PLUGINS", "hybrid_kv")
    with pytest.raises(HybridKVFingerprintError, match="get_kv_cache_capacity has the source"):
        plugin.register()
    assert kv_cache_utils.get_kv_cache_capacity is wrapper


def test_a_name_that_is_gone_is_noticed(monkeypatch):
    monkeypatch.delattr(kv_cache_utils, "get_kv_cache_capacity")
    monkeypatch.setenv("VLLM_PLUGINS", "hybrid_kv")
    with pytest.raises(HybridKVFingerprintError, match="get_kv_cache_capacity cannot be read"):
        plugin.register()


def test_a_backend_that_another_plugin_registered_is_left_alone(monkeypatch):
    before = bindings()
    register_backend(AttentionBackendEnum.TURBOQUANT, "theirs.Backend")
    monkeypatch.setenv("VLLM_PLUGINS", "hybrid_kv")
    try:
        with pytest.raises(
            HybridKVFingerprintError, match=r"TURBOQUANT already is theirs\.Backend"
        ):
            plugin.register()
    finally:
        AttentionBackendEnum.TURBOQUANT.clear_override()
    assert bindings() == before


def test_slots_of_another_size_than_vllm_plans_apply_nothing(monkeypatch):
    before = bindings()
    monkeypatch.setattr(k8v4, "slot_bytes", lambda head_size: head_size + head_size // 2 + 6)
    monkeypatch.setenv("VLLM_PLUGINS", "hybrid_kv")
    message = "vLLM plans 388 bytes for a slot of head size 256, k8v4 has 390"
    with pytest.raises(HybridKVFingerprintError, match=message):
        plugin.register()
    assert bindings() == before


def test_a_name_rebound_behind_our_back_stops_the_next_registration(monkeypatch):
    plugin.register()
    monkeypatch.setattr(kv_cache_utils, "get_kv_cache_capacity", lambda *_: (0, 0.0))
    with pytest.raises(HybridKVPatchError, match="get_kv_cache_capacity is not the plugin's"):
        plugin.register()


def test_a_module_that_still_has_the_stock_function_fails_the_check(monkeypatch):
    stock = [kv_cache_coordinator.get_kv_cache_coordinator]
    plugin.register()
    monkeypatch.setattr(kv_cache_manager, "get_kv_cache_coordinator", stock[0])
    message = "kv_cache_manager.get_kv_cache_coordinator still is vLLM's"
    with pytest.raises(HybridKVPatchError, match=message):
        STATE.active_patches.verify()
    (row,) = (row for row in STATE.active_patches.table() if row.failures)
    assert row.edit == "vllm.v1.core.kv_cache_coordinator.get_kv_cache_coordinator"
    assert message in row.failures[0]


def test_a_method_rebound_in_a_platform_subclass_fails_the_check(monkeypatch):
    class TheirPlatform(CpuPlatform):
        @classmethod
        def get_attn_backend_cls(cls, *_):
            return "theirs.Backend"

    plugin.register()
    monkeypatch.setattr(vllm.platforms, "current_platform", TheirPlatform())
    message = "TheirPlatform.get_attn_backend_cls is not the plugin's"
    with pytest.raises(HybridKVPatchError, match=message):
        STATE.active_patches.verify()


class Unfaithful(base.Edit):
    """Applies without effect."""

    undone = False

    def problems(self):
        return []

    def apply(self):
        pass

    def failures(self):
        return ["the edit had no effect"]

    def undo(self):
        self.undone = True

    def __str__(self):
        return "nothing"


@pytest.mark.parametrize("raises", [True, False])
def test_an_edit_that_does_not_take_undoes_all_others(raises, monkeypatch):
    before = bindings()
    unfaithful = Unfaithful()
    if raises:
        monkeypatch.setattr(Unfaithful, "apply", lambda self: 1 / 0)
    notice = base.PatchInfo("nothing", "a test", "none", "never")
    stock_patches = patches.patches_for
    monkeypatch.setattr(
        patches,
        "patches_for",
        lambda *args: [*stock_patches(*args), base.Patch("last", notice, [unfaithful])],
    )
    expected = ZeroDivisionError if raises else HybridKVPatchError
    with pytest.raises(expected):
        plugin.register()
    assert STATE.active_patches is None
    assert unfaithful.undone
    assert bindings() == before


def test_the_table_names_every_edit_and_its_reasons():
    plugin.register()
    rows = STATE.active_patches.table()
    edits = {row.edit for row in rows}
    assert {str(getattr(ADAPTER.TARGETS, name)) for name in WRAPPED} < edits
    assert [row.failures for row in rows] == [[]] * len(rows)
    for row in rows:
        assert all(dataclasses.astuple(row.patch.notice))


def test_a_selection_made_before_is_forgotten():
    selector._cached_get_attn_backend.cache_clear()
    config = selector.AttentionSelectorConfig(64, "bfloat16", "auto", 16)
    selector._cached_get_attn_backend(None, config)
    assert selector._cached_get_attn_backend.cache_info().currsize == 1
    plugin.register()
    assert selector._cached_get_attn_backend.cache_info().currsize == 0


def test_away_from_cpus_vllms_own_backend_stays(monkeypatch):
    from vllm.platforms.interface import UnspecifiedPlatform

    stock = AttentionBackendEnum.TURBOQUANT.get_path()
    monkeypatch.setattr(vllm.platforms, "current_platform", UnspecifiedPlatform())
    plugin.register()
    assert AttentionBackendEnum.TURBOQUANT.get_path() == stock
    assert {row.patch.name for row in STATE.active_patches.table()} == {
        "settings",
        "known_variables",
        "page_sizes",
        "token_capacity",
        "block_copies",
        "coordinator",
        "prefix_match_unit",
        "state_blocks",
        "startup",
    }


def test_vllm_knows_our_variables_while_the_plugin_is_active(monkeypatch):
    monkeypatch.setenv("VLLM_HYBRID_KV_DEBUG", "1")
    known = {*vllm.envs.environment_variables, "VLLM_HYBRID_KV_DEBUG"}
    for name in list(os.environ):
        if name.startswith("VLLM_") and name not in known:
            monkeypatch.delenv(name)
    platform = vllm.platforms.current_platform
    with pytest.raises(ValueError, match="VLLM_HYBRID_KV_DEBUG"):
        platform.validate_environ(hard_fail=True)
    plugin.register()
    platform.validate_environ(hard_fail=True)
    STATE.active_patches.undo()
    with pytest.raises(ValueError, match="VLLM_HYBRID_KV_DEBUG"):
        platform.validate_environ(hard_fail=True)


def test_variables_that_are_not_set_are_not_added():
    before = dict(vllm.envs.environment_variables)
    plugin.register()
    assert vllm.envs.environment_variables == before
