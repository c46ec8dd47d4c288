# SPDX-License-Identifier: Apache-2.0
"""Patches are applied all or none, are active in every module, and can be undone."""

import dataclasses
import functools
import inspect
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
from vllm_hybrid_kv.patches import mechanism, targets
from vllm_hybrid_kv.state import STATE

pytestmark = pytest.mark.usefixtures("unregistered")

MINOR = ".".join(map(str, vllm.__version_tuple__[:2]))
PATCHED = targets.targets_of(MINOR)
# Patched on GPUs only, and these tests run on a CPU.
del PATCHED["Gemma4Config.verify_and_update_config"]
RELIED_ON = targets.targets_of(MINOR, targets.RELIED_ON)
BACKEND = "vllm_hybrid_kv.attention.backend.K8V4AttentionBackend"


def bindings():
    """Return the current value of everything that the patches change."""
    return {
        **{name: target.binding() for name, target in {**PATCHED, **RELIED_ON}.items()},
        "manager": kv_cache_manager.get_kv_cache_coordinator,
        "offload": vllm.v1.simple_kv_offload.manager.get_kv_cache_coordinator,
        "core": vllm.v1.engine.core.resolve_kv_cache_block_sizes,
        "backend": AttentionBackendEnum.TURBOQUANT.get_path(),
        "variables": dict(vllm.envs.environment_variables),
    }


@pytest.fixture
def named(monkeypatch):
    """Name the plugin in `VLLM_PLUGINS`, so that an error stops start-up."""
    monkeypatch.setenv("VLLM_PLUGINS", "hybrid_kv")


def test_every_function_has_a_hash_for_each_minor():
    tables = [targets.targets_of(minor) for minor in targets.MINORS]
    assert {frozenset(table) for table in tables} == {frozenset(tables[0])}
    for table in (targets.PATCHED, targets.RELIED_ON):
        for functions in table.values():
            assert all(len(hashes) == len(targets.MINORS) for hashes in functions.values())


def test_every_function_is_patched_in_its_own_module():
    before = bindings()
    plugin.register()
    after = bindings()
    unchanged = {name for name in {**PATCHED, **RELIED_ON} if after[name] is before[name]}
    assert unchanged == {"Platform.validate_environ", *RELIED_ON}
    assert after["backend"] == BACKEND


def test_a_function_is_patched_in_the_modules_that_imported_it_by_name():
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


def test_a_module_imported_later_gets_the_patched_function(monkeypatch):
    plugin.register()
    monkeypatch.delitem(sys.modules, "vllm.v1.simple_kv_offload.manager", raising=False)
    import vllm.v1.simple_kv_offload.manager as late

    assert late.get_kv_cache_coordinator is kv_cache_coordinator.get_kv_cache_coordinator
    STATE.active_patches.verify()


def test_undo_restores_every_binding_also_in_modules_imported_later():
    before = bindings()
    plugin.register()
    importer = ModuleType("imported_by_name_later")
    exec("from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity as ours", vars(importer))
    sys.modules[importer.__name__] = importer
    try:
        STATE.active_patches.undo()
        assert importer.ours is before["get_kv_cache_capacity"]
    finally:
        del sys.modules[importer.__name__]
    assert bindings() == before


def test_a_patched_function_keeps_its_name_and_signature():
    stock = inspect.signature(kv_cache_utils.resolve_kv_cache_block_sizes)
    plugin.register()
    ours = kv_cache_utils.resolve_kv_cache_block_sizes
    assert ours.__name__ == "resolve_kv_cache_block_sizes"
    assert inspect.signature(ours) == stock


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize(
    ("table", "name"),
    [("PATCHED", name) for name in PATCHED] + [("RELIED_ON", name) for name in RELIED_ON],
)
def test_no_patch_is_applied_if_one_hash_is_wrong(table, name, monkeypatch):
    before = bindings()
    target = {**PATCHED, **RELIED_ON}[name]
    functions = getattr(targets, table)[target.module]
    wrong = ("0" * 16,) * len(targets.MINORS)
    monkeypatch.setitem(functions, name, wrong)
    with pytest.raises(HybridKVFingerprintError) as error:
        plugin.register()
    signature = inspect.signature(mechanism.underlying(target.binding()), follow_wrapped=False)
    assert f"{target} has the source hash {target.source} instead of {wrong[0]}" in str(error.value)
    assert str(signature) in str(error.value)
    assert bindings() == before


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ("def f(a):\n    # why\n\n    return a\n", True),
        ("@staticmethod\ndef f(a):\n    return a\n", False),
        ("def f(a, b=0):\n    return a\n", False),
        ('def f(a):\n    """\nUnindented.\n"""\n    return -a\n', False),
        ("def f(a):\n    return a\n\n\ndef g():\n    return 0\n", True),
    ],
)
def test_the_source_hash_covers_the_whole_function_and_nothing_else(changed, same, tmp_path):
    def hash_of(text, name):
        file = tmp_path / f"{name}.py"
        file.write_text(text)
        namespace = {}
        exec(compile(text, str(file), "exec"), namespace)
        return mechanism.source_hash(mechanism.underlying(namespace["f"]))

    assert (hash_of("def f(a):\n    return a\n", "known") == hash_of(changed, "changed")) is same


@pytest.mark.usefixtures("named")
def test_a_function_that_another_plugin_wrapped_is_detected(monkeypatch):
    stock = [kv_cache_utils.get_kv_cache_capacity]

    @functools.wraps(stock[0])
    def wrapper(vllm_config, kv_cache_config):
        return stock[0](vllm_config, kv_cache_config)

    monkeypatch.setattr(kv_cache_utils, "get_kv_cache_capacity", wrapper)
    with pytest.raises(HybridKVFingerprintError, match="get_kv_cache_capacity has the source hash"):
        plugin.register()
    assert kv_cache_utils.get_kv_cache_capacity is wrapper


@pytest.mark.usefixtures("named")
def test_a_missing_name_is_detected(monkeypatch):
    monkeypatch.delattr(kv_cache_utils, "get_kv_cache_capacity")
    with pytest.raises(HybridKVFingerprintError, match="get_kv_cache_capacity cannot be read"):
        plugin.register()


@pytest.mark.usefixtures("named")
def test_a_backend_that_another_plugin_registered_stays():
    before = bindings()
    register_backend(AttentionBackendEnum.TURBOQUANT, "theirs.Backend")
    try:
        with pytest.raises(
            HybridKVFingerprintError, match=r"TURBOQUANT already is theirs\.Backend"
        ):
            plugin.register()
    finally:
        AttentionBackendEnum.TURBOQUANT.clear_override()
    assert bindings() == before


@pytest.mark.usefixtures("named")
def test_no_patch_is_applied_if_the_slot_size_is_not_vllms(monkeypatch):
    before = bindings()
    monkeypatch.setattr(k8v4, "slot_bytes", lambda head_size: head_size + head_size // 2 + 6)
    message = "vLLM plans 388 bytes for a slot of head size 256, k8v4 has 390"
    with pytest.raises(HybridKVFingerprintError, match=message):
        plugin.register()
    assert bindings() == before


def test_a_name_replaced_after_registration_stops_the_next_registration(monkeypatch):
    plugin.register()
    monkeypatch.setattr(kv_cache_utils, "get_kv_cache_capacity", lambda *_: (0, 0.0))
    with pytest.raises(HybridKVPatchError, match="get_kv_cache_capacity is not the plugin's"):
        plugin.register()


def test_a_replaced_method_that_the_plugin_relies_on_fails_the_check(monkeypatch):
    from vllm.v1.core.block_pool import BlockPool

    plugin.register()
    monkeypatch.setattr(BlockPool, "evict_blocks", lambda *_: None)
    with pytest.raises(HybridKVPatchError, match=r"BlockPool\.evict_blocks is no longer vLLM's"):
        STATE.active_patches.verify()


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


def test_a_method_overridden_in_a_platform_subclass_fails_the_check(monkeypatch):
    class TheirPlatform(CpuPlatform):
        @classmethod
        def get_attn_backend_cls(cls, *_):
            return "theirs.Backend"

    plugin.register()
    monkeypatch.setattr(vllm.platforms, "current_platform", TheirPlatform())
    message = "TheirPlatform.get_attn_backend_cls is not the plugin's"
    with pytest.raises(HybridKVPatchError, match=message):
        STATE.active_patches.verify()


class WithoutEffect(mechanism.Edit):
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
def test_an_edit_without_effect_undoes_all_others(raises, monkeypatch):
    before = bindings()
    edit = WithoutEffect()
    if raises:
        monkeypatch.setattr(WithoutEffect, "apply", lambda self: 1 / 0)
    info = mechanism.PatchInfo("nothing", "a test", "none", "never")
    stock_patches = patches.patches_for
    monkeypatch.setattr(
        patches,
        "patches_for",
        lambda context: [*stock_patches(context), mechanism.Patch("last", info, [edit])],
    )
    with pytest.raises(ZeroDivisionError if raises else HybridKVPatchError):
        plugin.register()
    assert STATE.active_patches is None
    assert edit.undone
    assert bindings() == before


def test_the_table_lists_every_edit_and_its_reasons():
    plugin.register()
    rows = STATE.active_patches.table()
    edits = {row.edit for row in rows}
    assert {str(PATCHED[name]) for name in PATCHED.keys() - {"Platform.validate_environ"}} < edits
    assert {f"{target} (checked, not patched)" for target in RELIED_ON.values()} < edits
    assert [row.failures for row in rows] == [[]] * len(rows)
    for row in rows:
        assert all(dataclasses.astuple(row.patch.info))


def test_backends_that_vllm_selected_before_are_forgotten():
    selector._cached_get_attn_backend.cache_clear()
    config = selector.AttentionSelectorConfig(64, "bfloat16", "auto", 16)
    selector._cached_get_attn_backend(None, config)
    assert selector._cached_get_attn_backend.cache_info().currsize == 1
    plugin.register()
    assert selector._cached_get_attn_backend.cache_info().currsize == 0


def test_on_other_devices_vllms_own_backend_stays(monkeypatch):
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


def test_unset_variables_are_not_added():
    before = dict(vllm.envs.environment_variables)
    plugin.register()
    assert vllm.envs.environment_variables == before
