# SPDX-License-Identifier: Apache-2.0
"""Either all patches are applied or none. They reach every module, and they can be undone."""

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
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.core import kv_cache_manager, kv_cache_utils
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.kv_offload.factory import OffloadingSpecFactory

from vllm_hybrid_kv import patches, plugin
from vllm_hybrid_kv.errors import HybridKVFingerprintError, HybridKVPatchError
from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.patches import mechanism, targets
from vllm_hybrid_kv.state import STATE

pytestmark = pytest.mark.usefixtures("unregistered")

MINOR = ".".join(map(str, vllm.__version_tuple__[:2]))
PATCHED = targets.targets_of(MINOR)
RELIED_ON = targets.targets_of(MINOR, targets.RELIED_ON)
ALL = {**PATCHED, **RELIED_ON}
BACKEND = "vllm_hybrid_kv.attention.backend.K8V4AttentionBackend"


def bindings():
    """Return the current value of everything that the patches change."""
    return {
        **{name: target.binding() for name, target in ALL.items()},
        "manager": kv_cache_manager.get_kv_cache_coordinator,
        "offload": vllm.v1.simple_kv_offload.manager.get_kv_cache_coordinator,
        "core": vllm.v1.engine.core.resolve_kv_cache_block_sizes,
        "backend": AttentionBackendEnum.TURBOQUANT.get_path(),
        "variables": dict(vllm.envs.environment_variables),
    }


def importer(monkeypatch, name):
    """Make a module that imports a patched function by name."""
    module = ModuleType(name)
    exec("from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity as by_name", vars(module))
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_every_function_has_a_hash_for_each_minor():
    tables = [targets.targets_of(minor) for minor in targets.MINORS]
    assert {frozenset(table) for table in tables} == {frozenset(tables[0])}
    for table in (targets.PATCHED, targets.RELIED_ON, targets.OFFLOADING):
        for functions in table.values():
            assert all(len(hashes) == len(targets.MINORS) for hashes in functions.values())


def test_every_function_is_patched_in_its_own_module():
    before = bindings()
    plugin.register()
    after = bindings()
    unchanged = {name for name in ALL if after[name] is before[name]}
    assert unchanged == {"Platform.validate_environ", *RELIED_ON}
    assert after["backend"] == BACKEND


def test_functions_are_patched_and_restored_in_modules_that_import_them_by_name(monkeypatch):
    before = bindings()
    early = importer(monkeypatch, "imported_by_name_before")
    plugin.register()
    late = importer(monkeypatch, "imported_by_name_later")
    assert early.by_name is late.by_name is kv_cache_utils.get_kv_cache_capacity
    assert early.by_name is not before["get_kv_cache_capacity"]
    after = bindings()
    assert after["manager"] is after["offload"] is after["get_kv_cache_coordinator"]
    assert after["core"] is after["resolve_kv_cache_block_sizes"]
    STATE.active_patches.verify()
    STATE.active_patches.undo()
    assert early.by_name is late.by_name is before["get_kv_cache_capacity"]
    assert bindings() == before


def test_a_patched_function_keeps_its_name_and_signature():
    stock = inspect.signature(kv_cache_utils.resolve_kv_cache_block_sizes)
    plugin.register()
    ours = kv_cache_utils.resolve_kv_cache_block_sizes
    assert ours.__name__ == "resolve_kv_cache_block_sizes"
    assert inspect.signature(ours) == stock


def test_replacements_have_the_parameters_of_vllms_functions(monkeypatch):
    # vLLM passes many arguments by name, so names must match. Include the patches for GPUs.
    monkeypatch.setattr(type(vllm.platforms.current_platform), "is_cuda_alike", lambda _: True)
    plugin.register()
    edits = [edit for patch in STATE.active_patches.patches for edit in patch.edits]
    for edit in edits:
        if isinstance(edit, mechanism.Rebinding):
            stock = inspect.signature(mechanism.underlying(edit.original)).parameters
            _, *ours = inspect.signature(edit.around).parameters.values()
            names = [one.name for one in ours if one.kind is one.POSITIONAL_OR_KEYWORD]
            assert names == list(stock)[: len(names)], edit


@pytest.mark.parametrize(
    ("table", "name"),
    [("PATCHED", name) for name in PATCHED] + [("RELIED_ON", name) for name in RELIED_ON],
)
def test_no_patch_is_applied_if_one_hash_is_wrong(table, name, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "hybrid_kv")
    before, target = bindings(), ALL[name]
    wrong = ("0" * 16,) * len(targets.MINORS)
    monkeypatch.setitem(getattr(targets, table)[target.module], name, wrong)
    signature = inspect.signature(mechanism.underlying(target.binding()), follow_wrapped=False)
    with pytest.raises(HybridKVFingerprintError) as error:
        plugin.register()
    message = f"{target} has the source hash {target.source} instead of {wrong[0]} ({signature})"
    assert message in str(error.value)
    assert bindings() == before


@pytest.mark.parametrize("name", targets.targets_of(MINOR, targets.OFFLOADING))
def test_an_engine_with_a_host_tier_does_not_start_if_one_hash_is_wrong(name, monkeypatch):
    target = targets.targets_of(MINOR, targets.OFFLOADING)[name]
    wrong = ("0" * 16,) * len(targets.MINORS)
    monkeypatch.setitem(targets.OFFLOADING[target.module], name, wrong)
    plugin.register()
    with pytest.raises(HybridKVFingerprintError, match=name):
        OffloadingSpecFactory.get_spec_cls({})


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
        return mechanism.source_hash(mechanism.underlying(namespace["f"]).__code__)

    assert (hash_of("def f(a):\n    return a\n", "known") == hash_of(changed, "changed")) is same


def wrap_a_function(monkeypatch):
    @functools.wraps(kv_cache_utils.get_kv_cache_capacity)
    def wrapper(vllm_config, kv_cache_config): ...

    monkeypatch.setattr(kv_cache_utils, "get_kv_cache_capacity", wrapper)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wrap_a_function, "get_kv_cache_capacity has the source hash"),
        (
            lambda patch: patch.delattr(kv_cache_utils, "get_kv_cache_capacity"),
            "get_kv_cache_capacity cannot be read",
        ),
        (
            lambda patch: patch.setattr(k8v4, "slot_bytes", lambda size: size + size // 2 + 6),
            "vLLM plans 388 bytes for a slot of head size 256, k8v4 has 390",
        ),
    ],
)
def test_no_patch_is_applied_to_a_changed_vllm(change, message, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "hybrid_kv")
    change(monkeypatch)
    before = {**vars(kv_cache_utils)}
    with pytest.raises(HybridKVFingerprintError, match=message):
        plugin.register()
    assert vars(kv_cache_utils) == before
    assert AttentionBackendEnum.TURBOQUANT.get_path() != BACKEND


def test_a_backend_that_another_plugin_registered_stays(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "hybrid_kv")
    before = bindings()
    register_backend(AttentionBackendEnum.TURBOQUANT, "theirs.Backend")
    try:
        with pytest.raises(HybridKVFingerprintError, match=r"already is theirs\.Backend"):
            plugin.register()
    finally:
        AttentionBackendEnum.TURBOQUANT.clear_override()
    assert bindings() == before


@pytest.mark.parametrize(
    ("owner", "name", "message"),
    [
        (kv_cache_utils, "get_kv_cache_capacity", "get_kv_cache_capacity is not the plugin's, but"),
        (BlockPool, "evict_blocks", "BlockPool.evict_blocks is not vLLM's, but that of "),
        (
            kv_cache_manager,
            "get_kv_cache_coordinator",
            "kv_cache_manager.get_kv_cache_coordinator still is vLLM's",
        ),
    ],
)
def test_a_name_replaced_after_registration_stops_the_next_registration(
    owner, name, message, monkeypatch
):
    stock = getattr(owner, name)
    plugin.register()
    is_stock = message.endswith("vLLM's")
    monkeypatch.setattr(owner, name, stock if is_stock else lambda *_: None)
    with pytest.raises(HybridKVPatchError) as error:
        plugin.register()
    assert message in str(error.value)
    assert is_stock or f"{__file__}:" in str(error.value)
    ((_, edit, failures),) = (row for row in STATE.active_patches.table() if row[2])
    assert name in edit
    assert message in failures[0]


class WithoutEffect(mechanism.Edit):
    undone = False

    def failures(self):
        return ["the edit had no effect"]

    def undo(self):
        self.undone = True


class Raises(WithoutEffect):
    def apply(self):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("edit", "error"), [(WithoutEffect(), HybridKVPatchError), (Raises(), ZeroDivisionError)]
)
def test_an_edit_without_effect_undoes_all_others(edit, error, monkeypatch):
    before, stock_patches = bindings(), patches.patches_for
    last = mechanism.Patch("last", "nothing", "a test", "never", [edit])
    monkeypatch.setattr(patches, "patches_for", lambda context: [*stock_patches(context), last])
    with pytest.raises(error):
        plugin.register()
    assert STATE.active_patches is None
    assert edit.undone
    assert bindings() == before


def test_the_table_lists_every_edit_and_its_reasons():
    plugin.register()
    rows = STATE.active_patches.table()
    edits = {edit for _, edit, _ in rows}
    assert {str(PATCHED[name]) for name in PATCHED.keys() - {"Platform.validate_environ"}} < edits
    assert {f"{target} (checked, not patched)" for target in RELIED_ON.values()} < edits
    for patch, _, failures in rows:
        assert not failures
        assert all(vars(patch).values())


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
    assert {patch.name for patch in STATE.active_patches.patches} == {
        "settings",
        "known_variables",
        "page_sizes",
        "token_capacity",
        "block_copies",
        "coordinator",
        "prefix_match_unit",
        "state_blocks",
        "startup",
        "host_memory",
    }


def test_vllm_knows_our_variables_while_the_plugin_is_active(monkeypatch):
    before = dict(vllm.envs.environment_variables)
    monkeypatch.setenv("VLLM_HYBRID_KV_DEBUG", "1")
    for name in list(os.environ):
        if name.startswith("VLLM_") and name not in {*before, "VLLM_HYBRID_KV_DEBUG"}:
            monkeypatch.delenv(name)
    platform = vllm.platforms.current_platform
    with pytest.raises(ValueError, match="VLLM_HYBRID_KV_DEBUG"):
        platform.validate_environ(hard_fail=True)
    plugin.register()
    platform.validate_environ(hard_fail=True)
    # The plugin adds only those of its variables that are set.
    assert vllm.envs.environment_variables.keys() == {*before, "VLLM_HYBRID_KV_DEBUG"}
    STATE.active_patches.undo()
    with pytest.raises(ValueError, match="VLLM_HYBRID_KV_DEBUG"):
        platform.validate_environ(hard_fail=True)
