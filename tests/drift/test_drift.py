# SPDX-License-Identifier: Apache-2.0
"""The comparison from vLLM 0.32 to 0.33 lists every known change and writes the known column."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.conformance.releases import unpacked_wheel
from tests.drift import __main__ as command
from tests.drift import comparison, release
from tests.drift.comparison import Comparison
from tests.drift.release import Release
from vllm_hybrid_kv.patches import targets

CORE = "vllm.v1.core"
UMBP = "vllm.distributed.kv_transfer.kv_connector.v1.umbp.scheduler"


@pytest.fixture(scope="module")
def next_release() -> Release:
    return release.get(str(unpacked_wheel("0.33")))


@pytest.fixture(scope="module")
def found(next_release: Release) -> Comparison:
    return comparison.compare("0.32", release.of_minor("0.32"), next_release)


@pytest.fixture(scope="module")
def changes(found: Comparison) -> dict[str, comparison.Change]:
    return {change.target.name: change for change in found.changes}


def test_exactly_the_functions_with_other_hashes_or_places_have_changed(found):
    before, after = targets.targets_of("0.32"), targets.targets_of("0.33")
    relied = [targets.targets_of(minor, targets.RELIED_ON) for minor in ("0.32", "0.33")]
    expected = {name for name in before if before[name] != after[name]}
    expected |= {name for name in relied[0] if relied[0][name] != relied[1][name]}
    assert {change.target.name for change in found.changed} == expected
    assert not found.fits


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("get_kv_cache_groups", ("moved", "source")),
        ("unify_kv_cache_spec_page_size", ("moved",)),
        ("get_kv_cache_coordinator", ("source", "signature")),
        ("CpuPlatform.get_attn_backend_cls", ("source",)),
        ("get_kv_cache_capacity", ()),
    ],
)
def test_each_change_has_its_kind(name, kinds, changes):
    assert changes[name].kinds == kinds
    assert bool(changes[name].diff) is ("source" in kinds)


def test_new_parameters_are_named(changes):
    details = changes["KVCacheManager.__init__"].details
    assert "new parameter num_hash_lookahead_tokens=0" in details
    assert "is gone" not in details


def test_a_new_module_that_imports_a_patched_function_is_listed(found):
    assert f"new: {UMBP} imports get_kv_cache_coordinator, at the top" in found.importers


def test_an_import_of_the_plugin_that_no_longer_works_is_listed(found):
    (line,) = found.broken_imports
    assert line.startswith("vllm.entrypoints.launchers.cli_args.make_arg_parser, imported by")


def test_the_written_column_is_the_one_in_the_package(found):
    written = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--stdin-filename", "targets.py", "-"],
        input=comparison.source_with(found, "0.33"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert written.stdout == Path(targets.__file__).read_text()


def test_the_written_file_has_the_new_minor_and_keeps_the_others(found):
    namespace = {"__name__": "written"}
    exec(comparison.source_with(found, "0.34"), namespace)
    assert namespace["MINORS"] == (*targets.MINORS, "0.34")
    for table in ("PATCHED", "RELIED_ON"):
        for minor in targets.MINORS:
            old = targets.targets_of(minor, getattr(targets, table))
            assert namespace["targets_of"](minor, namespace[table]) == old
        new = namespace["targets_of"]("0.34", namespace[table])
        assert new == targets.targets_of("0.33", getattr(targets, table))


def test_the_report_has_the_diffs_and_the_json_everything(found, next_release):
    text = command.report(found, next_release)
    for line in (
        f"moved to {CORE}.kv_cache_planning:get_kv_cache_groups",
        "raise ValueError(\n",
        f"* new: {UMBP} imports get_kv_cache_coordinator",
        "`--write` adds the hashes",
    ):
        assert line in text, text
    assert json.loads(json.dumps(asdict(found)))["release"] == "0.33.0"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("tomorrow", "tomorrow is neither a version such as 0.34.0, nor a wheel, nor a folder"),
        ("0.99.0", "pip found no vllm==0.99.0: "),
        ("missing.whl", "there is no wheel missing.whl"),
    ],
)
def test_a_missing_release_ends_with_2_and_one_line(wanted, message, capsys):
    assert command.main([wanted, "--pip-args=--no-index"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
