# SPDX-License-Identifier: Apache-2.0
"""The prefix cache benchmark: its synthetic traces, goals, tables and processes."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.prefix_cache.cases import (
    ATTENTION_ONLY,
    DTYPES,
    FIXED_POINT,
    HYBRID_AWARE,
    MADE,
    MAIN_DTYPE,
    MAIN_MODEL,
    MODELS,
    PUBLIC,
    STOCK,
    STOCK_16,
    Case,
    requests_of,
)
from benchmarks.prefix_cache.findings import comparisons, goals, overhead
from benchmarks.prefix_cache.overhead import medians, summarise
from benchmarks.prefix_cache.plot import draw
from benchmarks.prefix_cache.report import markdown
from benchmarks.prefix_cache.runs import batches, in_process, sweep
from benchmarks.prefix_cache.traces import SYSTEM_BLOCKS, agents, short_prompts
from vllm_hybrid_kv.tools.replay.trace import BLOCK_TOKENS, Conversations, shareable_tokens

CASE = Case("memory", MAIN_MODEL, MAIN_DTYPE, PUBLIC, 3000, 20.0, STOCK)


def row(strategy: str, hits: int | None, memory: float = 20.0, **changed: Any) -> dict[str, Any]:
    """Return a row with the given hits among 10,000 tokens, or one that does not fit."""
    case = replace(CASE, strategy=strategy, memory=memory, **changed)
    if hits is None:
        return {**asdict(case), "fits": False, "reason": "too small"}
    return {
        **asdict(case),
        "fits": True,
        "block_tokens": 2768,
        "hit_tokens": hits,
        "hit_rate": hits / 10_000,
        "hits_digest": f"{hits:x}",
        "cpu_seconds": 1.0,
    }


def result(rows: list[dict[str, Any]], turns: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Return a result in the form of the JSON file."""
    parts: dict[str, Any] = {}
    for one in rows:
        parts.setdefault(one["part"], {"rows": []})["rows"].append(one)
    if turns:
        parts["overhead"] = {
            "model": MAIN_MODEL,
            "kv_cache_dtype": MAIN_DTYPE,
            "trace": PUBLIC,
            "load": 0.5,
            "requests": 300,
            "memory": 20.0,
            "rounds": 3,
            "rows": turns,
            "medians": medians_of(turns),
        }
    return {
        "machine": {"cpu": "a processor", "cpus": 2, "python": "3.11", "vllm": "0.32.0"},
        "parts": parts,
        "traces": {f"{one['trace']} {one['requests']}": {"shareable": 0.335} for one in rows},
    }


def medians_of(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the medians if all steps take the same time."""
    return [
        summarise(
            name,
            medians([[one["request_ms"] / 7] * 7 for one in turns if one["strategy"] == name]),
            1,
        )
        for name in (STOCK, STOCK_16, HYBRID_AWARE)
    ]


def turns(*request_ms: tuple[float, float, float]) -> list[dict[str, Any]]:
    """Return rounds of stock, stock with unit 16 and hybrid_aware."""
    return [
        {"strategy": name, "round": number, "step_ms": ms / 10, "request_ms": ms, "steps": 7}
        for number, one in enumerate(request_ms, 1)
        for name, ms in zip((STOCK, STOCK_16, HYBRID_AWARE), one, strict=True)
    ]


# Traces


@pytest.mark.parametrize("name", MADE)
def test_a_synthetic_trace_is_reproducible_and_does_not_depend_on_its_length(name: str) -> None:
    assert MADE[name](300) == MADE[name](400)[:300]


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
    # Sessions are concurrent.
    order = [one.full_ids[SYSTEM_BLOCKS] for one in sent]
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert changes > 0.8 * len(order)


def test_an_agents_call_repeats_the_previous_prompt_and_answer_token_by_token() -> None:
    sent = agents(300)
    conversations = Conversations(sent)
    first, *rest = [
        index
        for index, one in enumerate(sent)
        if one.full_ids[SYSTEM_BLOCKS] == sent[0].full_ids[SYSTEM_BLOCKS]
    ]
    prompt, answer = conversations.tokens(first)
    history = prompt + answer
    for index in rest:
        prompt, answer = conversations.tokens(index)
        # The trace does not determine what follows the later prompt's last whole block.
        known = min(len(history), len(prompt) // BLOCK_TOKENS * BLOCK_TOKENS)
        assert prompt[:known] == history[:known]
        history = prompt + answer


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
    repeats = len(sent) - len({(one.full_ids, one.input_length) if one.full_ids else i
                               for i, one in enumerate(sent)})  # fmt: skip
    assert 0.07 < repeats / len(sent) < 0.13
    tokens = sum(one.input_length for one in sent)
    assert 0.2 < shareable_tokens(sent) / tokens < 0.4


# Goals and tables


def test_a_row_below_stock_is_listed_with_both_rates() -> None:
    rows = [row(STOCK, 200), row(STOCK_16, 100), row(FIXED_POINT, 200), row(HYBRID_AWARE, 199)]
    found = result(rows)
    (goal,) = [one for one in goals(found) if "never below" in one.what]
    assert (goal.met, goal.measured) == (False, "1 of 1 comparisons below stock")
    text = markdown(found)
    assert "Compared with stock: 1 of 2 runs hit fewer tokens." in text
    assert (
        "- qwen3.6-35b-a3b, turboquant_k8v4, 3,000 requests of public, 20 GiB: "
        "hybrid_aware 1.99%, stock 2.00%\n"
    ) in text
    assert "Compared with stock, unit 16: 0 of 2 runs hit fewer tokens." in text


def test_runs_are_compared_with_stock_of_the_same_setting_only() -> None:
    rows = [row(STOCK, 200, 20.0), row(HYBRID_AWARE, 100, 8.0), row(HYBRID_AWARE, 300, 20.0)]
    assert [pair.ours["memory"] for pair in comparisons(rows)] == [20.0]
    assert comparisons([row(STOCK, 2), row(HYBRID_AWARE, 1, kv_cache_dtype="fp8")]) == []


@pytest.mark.parametrize(("stock", "ours", "below"), [(5, None, [True]), (None, 5, [False])])
def test_a_cache_that_does_not_fit_hits_nothing(
    stock: int | None, ours: int | None, below: list[bool]
) -> None:
    pairs = comparisons([row(STOCK, stock), row(HYBRID_AWARE, ours)])
    assert [pair.below for pair in pairs] == below


def test_runs_of_which_neither_fits_are_not_compared() -> None:
    rows = [row(STOCK, None, 4.0), row(HYBRID_AWARE, None, 4.0)]
    assert comparisons(rows) == []
    assert "| 4 | does not fit | does not fit |" in markdown(result(rows))


def test_goals_without_a_measurement_are_neither_met_nor_missed() -> None:
    assert [goal.met for goal in goals(result([]))] == [None] * 5


@pytest.mark.parametrize(
    ("memory", "hits", "met"),
    [(20.0, 600, True), (20.0, 599, False), (200.0, 2900, True), (200.0, 2899, False)],
)
def test_the_hit_goals_refer_to_the_main_series(memory: float, hits: int, met: bool) -> None:
    rows = [row(STOCK, 0, memory), row(HYBRID_AWARE, hits, memory)]
    (goal,) = [one for one in goals(result(rows)) if one.what.startswith(f"{memory:g} GiB")]
    assert (goal.met, goal.measured) == (met, f"{hits / 10_000:.2%}")
    (shorter,) = [
        one
        for one in goals(result([row(HYBRID_AWARE, 9999, memory, requests=1000)]))
        if one.what.startswith(f"{memory:g} GiB")
    ]
    assert shorter.met is None


def test_attention_only_models_must_hit_the_same_in_every_request() -> None:
    rows = [row(name, 500, model=ATTENTION_ONLY, part="control") for name in (STOCK, HYBRID_AWARE)]
    what = "models of attention only exactly as stock, request by request"
    assert {goal.what: goal.met for goal in goals(result(rows))}[what] is True
    rows[1]["hits_digest"] = "other requests, as many tokens"
    assert {goal.what: goal.met for goal in goals(result(rows))}[what] is False


def test_overhead_uses_the_median_of_each_step_over_the_rounds() -> None:
    # The machine is half as fast in round 2, and round 3 is interrupted.
    usual = (10.0, 11.0, 10.5)
    found = turns(usual, (20.0, 22.0, 21.0), (10.0, 11.0, 30.0), usual, usual)
    goal = goals(result([], found))[-1]
    assert (goal.met, goal.measured) == (True, "+5.0%")
    assert goals(result([], turns((10.0, 10.0, 11.1))))[-1].met is False
    rows = [summarise(STOCK, [1.0, 2.0, 6.0], 2), summarise(HYBRID_AWARE, [1.0, 3.0, 6.5], 2)]
    assert overhead(rows, "request_ms", HYBRID_AWARE, STOCK) == pytest.approx(10.5 / 9)
    assert overhead(rows, "step_ms", HYBRID_AWARE, STOCK) == pytest.approx(1.5)


def test_a_step_counts_as_slow_only_if_it_is_slow_in_most_rounds() -> None:
    rounds = [[1.0, 9.0, 1.0, 1.0], [8.0, 9.0, 1.0, 1.0], [1.0, 9.0, 1.0, 7.0]]
    assert medians(rounds) == [1.0, 9.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="different numbers of steps: 4, 3"):
        medians([[1.0] * 4, [1.0] * 3])


def test_every_part_has_a_table_and_panels(tmp_path: Path) -> None:
    from matplotlib import image

    rows = [row(name, 300, memory) for memory in (4.0, 20.0) for name in (STOCK, HYBRID_AWARE)]
    for model in MODELS:
        for dtype in DTYPES:
            settings = {"part": "models", "model": model, "kv_cache_dtype": dtype}
            rows += [row(STOCK, None, 4.0, **settings), row(HYBRID_AWARE, 200, 20.0, **settings)]
    for trace in MADE:
        rows += [row(STOCK_16, 100, memory, part="made", trace=trace) for memory in (4.0, 20.0)]
    found = result(rows, turns((1.0, 1.0, 1.0)))
    text = markdown(found)
    for title in ("by memory", "Models and KV cache dtypes", "Synthetic", "Time in the sched"):
        assert title in text
    assert "| nemotron-nano-9b-v2 | fp8 | 2768 | hybrid_aware |  | 2.00% |" in text
    assert "whole blocks of 512 that an earlier request had: 33.5%." in text
    file = tmp_path / "picture.png"
    draw(file, found)
    assert file.stat().st_size < 300_000
    picture = image.imread(file)
    # Six panels: two lines of three, each with something in it.
    height, width = picture.shape[0] // 2, picture.shape[1] // 3
    for line in range(2):
        for column in range(3):
            panel = picture[line * height :, column * width :][:height, :width, :3]
            assert (panel.min(axis=2) < 0.5).mean() > 0.005


def test_parts_of_other_sources_are_named() -> None:
    found = {**result([row(STOCK, 1)]), "sources": "new"}
    found["parts"]["memory"]["sources"] = "new"
    assert "earlier version" not in markdown(found)
    found["parts"]["memory"]["sources"] = "old"
    assert "The part `memory` was measured with an earlier version" in markdown(found)


# Processes


def test_a_process_has_one_model_one_dtype_and_one_trace() -> None:
    cases = [
        replace(CASE, kv_cache_dtype=dtype, memory=float(size), requests=requests)
        for size in range(5)
        for dtype in DTYPES
        for requests in (10, 20, 20)
    ]
    found = batches(cases)
    for some in found:
        assert len({(case.model, case.kv_cache_dtype, case.trace_key) for case in some}) == 1
        assert len(some) <= 8
    assert sorted(map(str, itertools.chain(*found))) == sorted(map(str, cases))
    # Ten cases of 20 requests take two processes.
    assert len(found) == len(DTYPES) * (1 + 2)


def test_the_error_of_a_process_stops_the_sweep() -> None:
    with pytest.raises(ValueError, match="pass --trace"):
        sweep([CASE], None, 1, print)


def test_the_settings_of_the_users_shell_do_not_reach_a_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_HYBRID_KV_COORDINATOR", "stock")
    assert in_process(os.getenv, "VLLM_HYBRID_KV_COORDINATOR") is None
    assert in_process(os.getenv, "VLLM_PLUGINS") == "hybrid_kv"


def test_a_public_trace_that_is_too_short_is_rejected(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(json.dumps({"input_length": 10, "output_length": 1, "hash_ids": [0]}) + "\n")
    assert len(requests_of(PUBLIC, 1, file)) == 1
    with pytest.raises(ValueError, match="has 1 requests, not 2"):
        requests_of(PUBLIC, 2, file)
