# SPDX-License-Identifier: Apache-2.0
"""Check the parts of the prefix cache benchmark (traces, comparisons, tables), and run it once."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.prefix_cache.cases import (
    ATTENTION_ONLY,
    FIXED_POINT,
    HYBRID_AWARE,
    MAIN_DTYPE,
    MAIN_MODEL,
    MARCONI,
    PUBLIC,
    SGLANG,
    SHAPES,
    STOCK,
    STOCK_16,
    STOCK_DENSE,
    STOCK_SHARED,
    SYNTHETIC,
    Case,
    requests_of,
)
from benchmarks.prefix_cache.report import comparisons, draw, faults, markdown
from benchmarks.prefix_cache.runs import medians, sweep
from benchmarks.prefix_cache.traces import SYSTEM_BLOCKS, agents, short_prompts
from testing.processes import run as run_command
from vllm_hybrid_kv.tools.replay.trace import shareable_tokens, write_trace

ROOT = Path(__file__).parents[2]
CASE = Case("memory", MAIN_MODEL, MAIN_DTYPE, PUBLIC, 3000, 20.0, STOCK)


def row(strategy: str, hits: int | None, memory: float = 20.0, **changed: Any) -> dict[str, Any]:
    """Make a result row with `hits` hits among 10,000 tokens; with None, the model did not fit."""
    case = asdict(replace(CASE, strategy=strategy, memory=memory, **changed))
    if hits is None:
        return {**case, "fits": False, "hit_tokens": 0, "reason": "too small"}
    measured = {"hit_tokens": hits, "hit_rate": hits / 10_000, "hits_digest": f"{hits:x}"}
    return {**case, "fits": True, "block_tokens": 2768, **measured}


def report(rows: list[dict[str, Any]], overhead: list[dict[str, Any]] | None = None) -> str:
    return markdown(
        {
            "machine": {"cpu": "a processor", "cpus": 2, "python": "3.11", "vllm": "0.32.0"},
            "rows": rows,
            "shareable": {f"{one['trace']} {one['requests']}": 0.335 for one in rows},
            "overhead": overhead or [],
            "load": 0.5,
        }
    )


@pytest.mark.parametrize("name", SYNTHETIC)
def test_a_synthetic_trace_is_reproducible_and_does_not_depend_on_its_length(name: str) -> None:
    assert SYNTHETIC[name](300) == SYNTHETIC[name](400)[:300]


def test_agents_share_their_system_prompt_and_grow_call_by_call() -> None:
    sent = agents(1500)
    systems = {one.hash_ids[:SYSTEM_BLOCKS] for one in sent}
    assert len(systems) == 1
    sessions: dict[int, list[Any]] = {}
    for one in sent:
        sessions.setdefault(one.full_ids[SYSTEM_BLOCKS], []).append(one)
    assert len(sessions) > 50
    assert max(map(len, sessions.values())) > 20
    for calls in sessions.values():
        for earlier, later in itertools.pairwise(calls):
            assert later.input_length >= earlier.input_length + earlier.output_length + 200
            assert later.full_ids[: len(earlier.full_ids)] == earlier.full_ids
    # Sessions are concurrent, so most requests come after a request of another session.
    order = [one.full_ids[SYSTEM_BLOCKS] for one in sent]
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert changes > 0.8 * len(order)


def test_short_prompts_are_shorter_than_a_block_and_three_quarters_occur_once() -> None:
    sent = short_prompts(2000)
    assert max(one.input_length + one.output_length for one in sent) < 2768
    assert min(one.input_length for one in sent) < 100
    assert max(one.timestamp for one in sent) == sent[-1].timestamp
    first_seen: dict[int, int] = {}
    new = 0
    for index, one in enumerate(sent):
        new += not one.full_ids or one.full_ids[0] not in first_seen
        for block in one.full_ids:
            first_seen.setdefault(block, index)
    assert 0.7 < new / len(sent) < 0.8
    tokens = sum(one.input_length for one in sent)
    assert 0.2 < shareable_tokens(sent) / tokens < 0.4


def test_a_row_below_stock_is_listed_with_both_rates() -> None:
    rows = [row(STOCK, 200), row(STOCK_16, 100), row(FIXED_POINT, 150), row(HYBRID_AWARE, 199)]
    where = "qwen3.6-35b-a3b, turboquant_k8v4, 3,000 requests of public, 20 GiB"
    assert faults(rows) == [f"{where}, hybrid_aware: 1.99%, stock 2.00%"]
    text = report(rows)
    assert "Compared with stock: 2 of 2 runs hit fewer tokens." in text
    assert f"- {where}, hybrid_aware: 1.99%, stock 2.00%\n" in text
    assert "Compared with stock, unit 16: 0 of 2 runs hit fewer tokens." in text


def test_runs_are_compared_with_stock_of_the_same_setting_only() -> None:
    rows = [row(STOCK, 200, 20.0), row(HYBRID_AWARE, 100, 8.0), row(HYBRID_AWARE, 300, 20.0)]
    assert [ours["memory"] for ours, _ in comparisons(rows)] == [20.0]
    assert comparisons([row(STOCK, 2), row(HYBRID_AWARE, 1, dtype="fp8")]) == []


@pytest.mark.parametrize(
    ("stock", "ours", "worse"), [(5, None, [True]), (None, 5, [False]), (None, None, [])]
)
def test_a_cache_that_does_not_fit_hits_nothing(
    stock: int | None, ours: int | None, worse: list[bool]
) -> None:
    rows = [row(STOCK, stock), row(HYBRID_AWARE, ours)]
    assert [ours["hit_tokens"] < stock["hit_tokens"] for ours, stock in comparisons(rows)] == worse
    assert len(faults(rows)) == sum(worse)


def test_attention_only_models_must_hit_the_same_in_every_request() -> None:
    rows = [row(name, 500, model=ATTENTION_ONLY, part="control") for name in (STOCK, FIXED_POINT)]
    assert faults(rows) == []
    rows[1]["hits_digest"] = "other requests, as many tokens"
    assert len(faults(rows)) == 1
    assert f"{ATTENTION_ONLY}: 0 of 1 runs have the hits of stock in every request." in report(rows)


def test_a_step_counts_as_slow_only_if_it_is_slow_in_most_rounds() -> None:
    rounds = [[1.0, 9.0, 1.0, 1.0], [8.0, 9.0, 1.0, 1.0], [1.0, 9.0, 1.0, 7.0]]
    assert medians(rounds) == [1.0, 9.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="different numbers of steps: 4, 3"):
        medians([[1.0] * 4, [1.0] * 3])


def test_every_part_has_a_table_and_panels(tmp_path: Path) -> None:
    from matplotlib import image

    rows = [row(name, 300, memory) for memory in (4.0, 20.0) for name in (STOCK, HYBRID_AWARE)]
    for dtype in ("auto", "fp8"):
        settings = {"part": "models", "model": "jamba-1.5-mini", "dtype": dtype}
        rows += [row(STOCK, None, 4.0, **settings), row(HYBRID_AWARE, 200, 20.0, **settings)]
    for trace in SYNTHETIC:
        rows += [row(STOCK_16, 100, size, part="synthetic", trace=trace) for size in (4.0, 20.0)]
    overhead = [
        {
            **row(name, 0, part="overhead"),
            "step_ms": ms / 10,
            "request_ms": ms,
            "steps": 7,
            "rounds_ms": [ms, 2 * ms],
        }
        for name, ms in ((STOCK, 10.0), (STOCK_16, 11.0), (HYBRID_AWARE, 10.5))
    ]
    text = report(rows, overhead)
    assert "## Models and KV cache dtypes" in text
    assert "| public | jamba-1.5-mini | fp8 | 2768 | stock | does not fit |  |" in text
    assert "| public | jamba-1.5-mini | fp8 | 2768 | hybrid_aware |  | 2.00% |" in text
    assert "whole blocks of 512 that an earlier request had: 33.5%." in text
    assert "| hybrid_aware | 1.050 | 10.50 | 7 | 1.050 | 1.050 | 1.050 to 1.050 |" in text
    assert "relative to stock with the same match unit: 0.955." in text
    file = tmp_path / "picture.png"
    draw(file, rows)
    assert file.stat().st_size < 300_000
    picture = image.imread(file)
    # The picture has two rows of three places. Check that the four panels are not empty.
    height, width = picture.shape[0] // 2, picture.shape[1] // 3
    for line, column in ((0, 0), (0, 1), (0, 2), (1, 0)):
        panel = picture[line * height :, column * width :][:height, :width, :3]
        assert (panel.min(axis=2) < 0.5).mean() > 0.005


def test_the_error_of_a_process_stops_the_sweep() -> None:
    with pytest.raises(ValueError, match="pass --trace"):
        list(sweep([CASE], None, 1))


def test_a_public_trace_that_is_too_short_is_rejected(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(json.dumps({"input_length": 10, "output_length": 1, "hash_ids": [0]}) + "\n")
    assert len(requests_of(PUBLIC, 1, file)) == 1
    with pytest.raises(ValueError, match="has 1 requests, not 2"):
        requests_of(PUBLIC, 2, file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small trace to use instead of the public one."""
    folder = tmp_path_factory.mktemp("prefix_cache")
    write_trace(folder / "trace.jsonl", agents(12, seed=7))
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> dict[str, Any]:
    """Run the benchmark with two models; return its JSON."""
    command = [
        *(sys.executable, "-W", "ignore", "-m", "benchmarks.prefix_cache"),
        *("--trace", folder / "trace.jsonl", "--out", folder, "--jobs", "2"),
        *("--parts", "memory", "peers", "control", "overhead"),
        *("--models", MAIN_MODEL, ATTENTION_ONLY),
        *("--requests", "12", "--gib", "4", "20", "--rounds", "2"),
    ]
    # The benchmark must ignore the settings of the user's shell.
    done = run_command(command, cwd=ROOT, timeout_s=500, VLLM_HYBRID_KV_COORDINATOR="stock")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[26/26] " in done.stdout
    return json.loads((folder / "prefix_cache.json").read_text())


def rows_of(result: dict[str, Any], part: str) -> dict[tuple[float, str], dict[str, Any]]:
    rows = [row for row in result["rows"] if row["part"] == part]
    return {(row["memory"], row["strategy"]): row for row in rows}


def test_every_strategy_runs_at_every_size(run: dict[str, Any]) -> None:
    names = (STOCK, STOCK_16, FIXED_POINT, HYBRID_AWARE)
    rows = rows_of(run, "memory")
    assert list(rows) == [(memory, name) for memory in (4, 20) for name in names]
    assert rows[4, HYBRID_AWARE]["hit_tokens"] >= rows[4, STOCK]["hit_tokens"] > 0
    units = {name: rows[4, name]["match_tokens"] for name in names}
    assert units == {STOCK: 2768, STOCK_16: 16, FIXED_POINT: 16, HYBRID_AWARE: 16}


def test_other_systems_run_at_every_size(run: dict[str, Any], folder: Path) -> None:
    rows = rows_of(run, "peers")
    names = (STOCK, STOCK_SHARED, STOCK_DENSE, SGLANG, MARCONI, HYBRID_AWARE)
    assert set(rows) == {(memory, name) for memory in (4, 20) for name in names}
    assert {rows[4, name]["match_tokens"] for name in (STOCK_SHARED, STOCK_DENSE)} == {16}
    assert len({row["prompt_tokens"] for row in rows.values()}) == 1
    assert {rows[4, name]["match_tokens"] for name in (SGLANG, MARCONI)} == {64, 16}
    assert "## Other systems" in (folder / "prefix_cache.md").read_text()


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


def test_the_replay_command_has_the_same_results(run: dict[str, Any], folder: Path) -> None:
    strategies = ("--compare", STOCK, "--compare", FIXED_POINT, "--coordinator", HYBRID_AWARE)
    command = Path(sys.executable).with_name("vllm-hybrid-kv"), "replay", folder / "trace.jsonl"
    more = ("--model", SHAPES / MAIN_MODEL, "--memory", "4GiB", "--json", "-", *strategies)
    done = run_command([*command, *more])
    # Different scheduler settings would change the number of steps even if hits were equal.
    compared = ("hit_tokens", "recomputed_tokens", "preemptions", "steps", "blocks", "match_tokens")
    replayed = {
        row["coordinator"]: [row[name] for name in compared] for row in json.loads(done.stdout)
    }
    rows = rows_of(run, "memory")
    assert len(replayed) == 3
    assert replayed == {name: [rows[4, name][field] for field in compared] for name in replayed}
