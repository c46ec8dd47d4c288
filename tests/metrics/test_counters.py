# SPDX-License-Identifier: Apache-2.0
"""Counters that one process leaves in a file and another shows."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from vllm_hybrid_kv.coordinator.explanation import Cache, Kind
from vllm_hybrid_kv.coordinator.hit_report import HitReport
from vllm_hybrid_kv.metrics.collector import FolderCollector
from vllm_hybrid_kv.metrics.counters import (
    FILE_BYTES,
    HIT_TOKENS,
    REQUESTS,
    CounterFile,
    counter_file,
)
from vllm_hybrid_kv.metrics.directory import MULTIPROC, VARIABLE

LABELS = {"model_name": "a model", "engine": "0"}
CACHE = Cache((Kind("full_attention", (0,), True),), 16, True, True, "hybrid_aware")


def shown(folder: Path) -> str:
    registry = CollectorRegistry()
    registry.register(FolderCollector(folder))
    return generate_latest(registry).decode()


def test_a_counter_is_shown_with_help_type_and_labels(tmp_path):
    counter = CounterFile(tmp_path / "new").counter(HIT_TOKENS, {**LABELS, "kind": "mamba"})
    counter.add(3)
    counter.add(4)
    name = "vllm_hybrid_kv:prefix_cache_hit_tokens_total"
    assert shown(tmp_path / "new").splitlines() == [
        f"# HELP {name} {HIT_TOKENS.help}",
        f"# TYPE {name} counter",
        f'{name}{{engine="0",kind="mamba",model_name="a model"}} 7.0',
    ]


def test_counters_of_two_engines_of_a_process_are_one_and_go_on(tmp_path):
    first = counter_file(tmp_path).counter(REQUESTS, LABELS)
    second = counter_file(tmp_path).counter(REQUESTS, dict(LABELS))
    first.add(2)
    second.add(3)
    assert shown(tmp_path).endswith(" 5.0\n")


def test_counters_of_engines_that_run_side_by_side_have_labels_of_their_own(tmp_path):
    file = CounterFile(tmp_path)
    for engine in ("0", "1"):
        file.counter(REQUESTS, {**LABELS, "engine": engine}).add(1)
    assert shown(tmp_path).count("} 1.0\n") == 2


def test_the_room_for_the_counters_is_taken_at_once(tmp_path):
    CounterFile(tmp_path)
    (path,) = tmp_path.iterdir()
    # A file with a hole would end the process when it is written to where there is no room.
    assert path.stat().st_blocks * 512 >= FILE_BYTES


def test_vllms_own_counters_of_the_process_lie_in_a_file_of_their_own(tmp_path):
    CounterFile(tmp_path)
    assert f"counter_{os.getpid()}.db" not in os.listdir(tmp_path)
    assert all(name.split("_")[0] == "counter" for name in os.listdir(tmp_path))


def test_where_nothing_was_counted_nothing_is_shown(tmp_path):
    assert not shown(tmp_path / "not there").strip()


@pytest.fixture
def report(tmp_path, monkeypatch):
    monkeypatch.delenv(MULTIPROC, raising=False)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return HitReport(CACHE, log_stats=True)


def checkpoints(folder: Path) -> dict[str, float]:
    return {
        sample.name.removeprefix("vllm_hybrid_kv:checkpoints_")
        + f" {sample.labels.get('kind', '')}": sample.value
        for metric in FolderCollector(folder).collect()
        for sample in metric.samples
        if "checkpoints" in sample.name
    }


def test_counts_of_checkpoints_are_followed_by_event_and_kind(report, tmp_path):
    report.tell_checkpoints({"kept": 1, "evicted prompt": 1, "now": 1})
    report.tell_checkpoints(
        {"kept": 4, "evicted prompt": 1, "evicted branch point": 2, "evicted unused": 1, "now": 1}
    )
    report.tell_checkpoints({"kept": 4, "used branch point": 5, "evicted unused prompt": 7})
    assert checkpoints(tmp_path) == {
        "kept_total ": 4,
        "evicted_total prompt": 1,
        "evicted_total branch point": 2,
        "evicted_unused_total ": 1,
        "evicted_unused_total prompt": 7,
        "used_total branch point": 5,
    }


def test_counts_that_begin_again_are_added(report, tmp_path):
    for count in (5, 2, 3):
        report.tell_checkpoints({"kept": count})
    assert checkpoints(tmp_path) == {"kept_total ": 8}


def test_a_folder_that_cannot_be_written_to_costs_the_metrics_and_a_warning(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.delenv(MULTIPROC, raising=False)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file" / "folder"))
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("vllm.hybrid_kv").addHandler(handler)
    try:
        report = HitReport(CACHE, log_stats=True)
    finally:
        logging.getLogger("vllm.hybrid_kv").removeHandler(handler)
    assert len(lines) == 1
    assert str(tmp_path / "file" / "folder") in lines[0]
    report.tell_checkpoints({"kept": 1})
