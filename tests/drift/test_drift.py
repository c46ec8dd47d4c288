# SPDX-License-Identifier: Apache-2.0
"""From vLLM 0.32 to 0.33 the comparison lists every difference that is known."""

from __future__ import annotations

import importlib
import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from tests.conformance.releases import unpacked_wheel
from tests.drift import __main__ as command
from tests.drift import comparison, release, report, surroundings
from tests.drift.adapter_tests import Outcome
from tests.drift.adapters import adapters, read_known
from tests.drift.comparison import Comparison
from tests.drift.release import Release
from tests.drift.targets import Finding
from tests.drift.uses import uses

LOOKAHEAD = "num_hash_lookahead_tokens=0"
CORE = "vllm.v1.core"
UMBP = "vllm.distributed.kv_transfer.kv_connector.v1.umbp.scheduler"

PASSED = Outcome(3, 0, {})


@pytest.fixture(scope="module")
def next_release() -> Release:
    return release.get(str(unpacked_wheel("0.33")))


@pytest.fixture(scope="module")
def both(next_release: Release) -> list[Comparison]:
    """The adapter for 0.32 in full, and that for 0.33, beside 0.33."""
    _, found = comparison.compare(adapters(), next_release, uses(), against=(0, 32))
    return found


@pytest.fixture(scope="module")
def v0_32(both: list[Comparison]) -> Comparison:
    return both[0]


@pytest.fixture(scope="module")
def findings(v0_32: Comparison) -> dict[str, Finding]:
    return {finding.field: finding for finding in v0_32.findings}


@pytest.mark.parametrize("field", ["get_groups", "unify"])
def test_planning_has_moved(field, findings):
    finding = findings[field]
    assert "moved" in finding.kinds
    assert finding.target.module == f"{CORE}.kv_cache_utils"
    assert finding.now.module == f"{CORE}.kv_cache_planning"
    assert not finding.still_importable


@pytest.mark.parametrize("field", ["make_coordinator", "init_kv_cache_manager"])
def test_the_coordinator_is_told_of_tokens_that_drafts_look_ahead_to(field, findings):
    assert findings[field].kinds == ("signature", "body")
    assert (findings[field].came, findings[field].went) == ((LOOKAHEAD,), ())


def test_the_cpu_platform_refuses_cache_dtypes(findings):
    finding = findings["get_attn_backend_cls"]
    assert finding.kinds == ("body",)
    assert any(line[0] == "+" and "raise ValueError" in line for line in finding.diff)


def test_what_has_not_changed_is_not_listed(findings):
    same = {field for field, finding in findings.items() if not finding.kinds}
    assert same == {
        *("get_capacity", "resolve_block_sizes", "copy_blocks", "init_worker"),
        *("validate_environ", "get_boundary_layers", "nixl_compatibility_hash"),
        *("none_hash_seed", "init_example_connector", "add_to_batch", "initialize_from_config"),
        *("resolve_cudagraph_mode", "select_backend", "initialize_model"),
    }
    # Alike, in another module.
    assert findings["unify"].kinds == ("moved",)


def test_a_new_connector_imports_the_factory_by_name(v0_32):
    line = f"new: get_kv_cache_coordinator imported by {UMBP}, at the top"
    assert line in v0_32.surroundings.holders


def test_the_new_ways_in_are_listed(v0_32):
    ways_in = v0_32.surroundings.ways_in
    assert "new: register_kv_cache_dtype in vllm.config.cache" in ways_in
    assert f"new: KVCacheConfigBuilder in {CORE}.kv_cache_config_builder" in ways_in
    assert "new: get_kv_cache_config_builder_cls in vllm.platforms.interface" in ways_in


def test_the_base_of_our_coordinators_takes_the_new_parameter_too(v0_32):
    changes = {change.name: change for change in v0_32.names if change.kind == "signature"}
    change = changes[f"{CORE}.kv_cache_coordinator.HybridKVCacheCoordinator.__init__"]
    assert LOOKAHEAD in change.detail
    # Ours hands on whatever it is given.
    assert not change.breaks


def test_both_releases_check_for_the_class_of_the_coordinator(v0_32, next_release):
    for one in (v0_32.adapter.known, next_release):
        checks = surroundings.class_checks(one.sources, ["HybridKVCacheCoordinator"])
        modules = {module for _, module, how in checks if how == "isinstance"}
        assert f"{CORE}.kv_cache_manager" in modules
        assert any(module.endswith("offloading_connector") for module in modules)


def test_another_torch_is_asked_for(v0_32):
    assert any(line.startswith("torch: ==2.13") for line in v0_32.surroundings.requirements)


def test_the_adapter_of_the_next_minor_fits(both):
    full = comparison.in_full(both[1], uses())
    assert full.broken == []
    assert full.moved == []
    assert full.fits
    assert list(full.steps()) == []


def test_the_proposed_adapter_is_the_one_that_was_written_by_hand(v0_32, both):
    assert not v0_32.fits
    proposed = read_known(v0_32.proposed())
    written = both[1].adapter
    assert {field: proposed[field] for field in written.targets} == written.targets
    # Not seen from fingerprints; the steps say what it follows from.
    assert proposed["cpu_refuses_dtypes"] is False
    assert any("cpu_refuses_dtypes follows from it" in step for step in v0_32.steps())


def test_the_adapters_are_read_as_they_are_imported():
    for adapter in adapters():
        known = importlib.import_module(adapter.module).TARGETS
        for field, value in {**adapter.targets, **adapter.facts}.items():
            assert getattr(known, field) == value
        assert len(adapter.targets) + len(adapter.facts) == len(vars(known))


def test_the_report_names_what_moved_and_what_to_write(v0_32, both):
    output = io.StringIO()
    failed = Outcome(9, 1, {"plugin.test_gate::test_it": "assert 1 == 2"})
    report.print_report(Console(file=output, width=100), v0_32, both, failed)
    text = output.getvalue()
    for line in (
        "* get_groups: moved to vllm.v1.core.kv_cache_planning get_kv_cache_groups, is gone from",
        f"* make_coordinator: signature: came {LOOKAHEAD}; source",
        "* vLLM 0.33.0 has an adapter of its own, v0_33",
        "raise ValueError(\n",
        '        "vllm.v1.core.kv_cache_planning",\n        "unify_kv_cache_spec_page_size",\n',
        f"* new: get_kv_cache_coordinator imported by {UMBP}",
        "9 passed, 1 failed, 1 skipped",
        "* plugin.test_gate::test_it: assert 1 == 2",
    ):
        assert line in text, text


def test_the_json_has_it_all(v0_32, both):
    found = json.loads(json.dumps(report.as_json(v0_32, both, PASSED)))
    assert found["fits"] is False
    (groups,) = [
        one for one in found["adapters"]["v0_32"]["findings"] if one["field"] == "get_groups"
    ]
    assert groups["kinds"] == ["moved", "body"]
    assert found["adapters"]["v0_33"]["fits"] is True
    assert found["tests"]["passed"] == 3


def test_the_closest_adapter_is_the_one_with_the_fewest_differences(both, monkeypatch):
    findings = [list(one.findings) for one in both]
    monkeypatch.setattr(comparison.targets, "compare", lambda *_: findings)
    monkeypatch.setattr(comparison, "in_full", lambda one, _: one)
    adapters_of = [one.adapter for one in both]
    chosen, _ = comparison.compare(adapters_of, both[0].release, uses())
    assert chosen.adapter.name == "v0_33"


def test_it_fits_only_with_tests_that_pass(both):
    fitting = replace(both[1], names=())
    assert report.fits(fitting, None)
    assert report.fits(fitting, PASSED)
    assert not report.fits(fitting, Outcome(3, 0, {"a": "b"}))
    assert not report.fits(both[0], PASSED)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("tomorrow", "tomorrow is neither a version such as 0.34.0, nor a wheel, nor a folder"),
        ("0.99.0", "pip found no vllm==0.99.0: "),
        ("missing.whl", "there is no wheel missing.whl"),
    ],
)
def test_what_cannot_be_had_ends_with_2_and_one_line(wanted, said, capsys):
    assert command.main([wanted, "--no-tests", "--pip-args=--no-index"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(said)
    assert error.count("\n") == 1
