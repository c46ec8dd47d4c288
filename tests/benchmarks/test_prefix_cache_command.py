# SPDX-License-Identifier: Apache-2.0
"""A run of `python -m benchmarks.prefix_cache` with few requests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.prefix_cache.cases import (
    ATTENTION_ONLY,
    FIXED_POINT,
    HYBRID_AWARE,
    MAIN_MODEL,
    SHAPES,
    STOCK,
    STOCK_16,
    STRATEGIES,
)
from benchmarks.prefix_cache.traces import agents
from vllm_hybrid_kv.tools.replay.trace import write_trace

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a trace that replaces the public one."""
    folder = tmp_path_factory.mktemp("prefix_cache")
    write_trace(folder / "trace.jsonl", agents(12, seed=7))
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> dict[str, Any]:
    """Return the result of a run with two models."""
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "benchmarks.prefix_cache"),
            *("--trace", folder / "trace.jsonl", "--out", folder, "--jobs", "2"),
            *("--parts", "memory", "control", "overhead", "--models", MAIN_MODEL, ATTENTION_ONLY),
            *("--requests", "12", "--gib", "4", "20", "--rounds", "2"),
        ],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=500,
        # The benchmark must ignore the settings of the user's shell.
        env={**os.environ, "VLLM_HYBRID_KV_COORDINATOR": "stock"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[14/14] " in done.stdout
    return json.loads((folder / "prefix_cache.json").read_text())


def rows_of(result: dict[str, Any], part: str) -> dict[tuple[float, str], dict[str, Any]]:
    rows = [row for row in result["rows"] if row["part"] == part]
    return {(row["memory"], row["strategy"]): row for row in rows}


def test_every_strategy_runs_at_every_size(run: dict[str, Any]) -> None:
    rows = rows_of(run, "memory")
    assert list(rows) == [(memory, name) for memory in (4, 20) for name in STRATEGIES]
    assert rows[4, HYBRID_AWARE]["hit_tokens"] >= rows[4, STOCK]["hit_tokens"] > 0
    units = {name: rows[4, name]["match_tokens"] for name in STRATEGIES}
    assert units == {STOCK: 2768, STOCK_16: 16, FIXED_POINT: 16, HYBRID_AWARE: 16}


def test_attention_only_models_hit_like_stock_or_do_not_fit(
    run: dict[str, Any], folder: Path
) -> None:
    rows = rows_of(run, "control")
    names = (STOCK, FIXED_POINT, HYBRID_AWARE)
    assert not any(rows[4, name]["fits"] for name in names)
    assert "model's max seq len (131072)" in rows[4, STOCK]["reason"]
    assert rows[20, STOCK]["hit_tokens"] > 0
    assert len({rows[20, name]["hits_digest"] for name in names}) == 1
    line = "| public | llama-3.1-8b | auto | 16 | stock | does not fit |"
    assert line in (folder / "prefix_cache.md").read_text()


def test_the_scheduler_time_of_each_strategy_is_measured(run: dict[str, Any]) -> None:
    assert [row["strategy"] for row in run["overhead"]] == [STOCK, STOCK_16, HYBRID_AWARE]
    for row in run["overhead"]:
        assert 0 < row["step_ms"] < row["request_ms"] <= max(row["rounds_ms"])
        assert len(row["rounds_ms"]) == 2
        assert row["steps"] > 4


def test_a_picture_is_written(run: dict[str, Any], folder: Path) -> None:
    assert (folder / "prefix_cache.png").read_bytes().startswith(b"\x89PNG")


def test_the_replay_command_has_the_same_results(run: dict[str, Any], folder: Path) -> None:
    strategies = ("--compare", STOCK, "--compare", FIXED_POINT, "--coordinator", HYBRID_AWARE)
    done = subprocess.run(
        [
            Path(sys.executable).with_name("vllm-hybrid-kv"),
            *("replay", folder / "trace.jsonl", "--model", SHAPES / MAIN_MODEL),
            *("--memory", "4GiB", "--json", "-", *strategies),
        ],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    # Different settings of the scheduler would change the steps, even with equal hits.
    compared = ("hit_tokens", "recomputed_tokens", "preemptions", "steps", "blocks", "match_tokens")
    replayed = {
        row["coordinator"]: [row[name] for name in compared] for row in json.loads(done.stdout)
    }
    rows = rows_of(run, "memory")
    assert len(replayed) == 3
    assert replayed == {name: [rows[4, name][field] for field in compared] for name in replayed}
