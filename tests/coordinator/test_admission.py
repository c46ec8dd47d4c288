# SPDX-License-Identifier: Apache-2.0
"""When `hybrid_aware` lets a prompt begin: prompts that are computed do not preempt each other."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.described_model import hybrid_config
from vllm_hybrid_kv.dry_run.engine import Engine, Model
from vllm_hybrid_kv.replay.replay import Replay
from vllm_hybrid_kv.replay.trace import BLOCK_TOKENS, TracedRequest

POLICY = {"coordinator": "hybrid_aware", "prefix_match_unit": "auto"}
STOCK = {"coordinator": "stock", "prefix_match_unit": "stock"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("hybrid")
    hybrid_config().save_pretrained(folder)
    arguments: dict[str, Any] = {
        "model": str(folder),
        "block_size": 16,
        "kv_cache_dtype": "turboquant_k8v4",
        "gpu_memory_utilization": 0.1,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 8192,
    }
    return Model(arguments)


def engine_of(model: Model, blocks: int, settings: dict[str, str]) -> Engine:
    (page,) = {spec.page_size_bytes for spec in model.specs.values()}
    attention = sum("self_attn" in name for name in model.specs)
    return model.engine(blocks * page * attention, settings)


def prompts(lengths: list[int], answer: int = 30) -> list[TracedRequest]:
    """Return prompts of so many blocks of 512 tokens that have nothing in common."""
    sent, first = [], 0
    for blocks in lengths:
        ids = tuple(range(first, first + blocks))
        sent.append(TracedRequest(0, BLOCK_TOKENS * blocks, answer, ids))
        first += blocks
    return sent


def lengths(seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randint(3, 31) for _ in range(40)]


@pytest.mark.parametrize("seed", [0, 2])
@pytest.mark.parametrize("blocks", [50, 80])
def test_prompts_wait_until_those_before_them_have_all_that_they_need(model, blocks, seed):
    sent = prompts(lengths(seed))
    ours = Replay(engine_of(model, blocks, POLICY), sent, 16).run()
    assert (ours.requests, ours.preemptions) == (len(sent), 0)
    # vLLM lets more begin than it can finish.
    assert Replay(engine_of(model, blocks, STOCK), sent, 16).run().preemptions > 0


def test_prompts_run_at_once_where_all_have_room(model):
    engine = engine_of(model, 400, POLICY)
    scheduler, most = engine.scheduler, 0
    schedule = scheduler.schedule

    def counted(*arguments: Any) -> Any:
        nonlocal most
        output = schedule(*arguments)
        most = max(most, len(scheduler.running))
        return output

    scheduler.schedule = counted
    Replay(engine, prompts(lengths(0)), 16).run()
    assert most == 16


def smallest(model: Model) -> int:
    """Return the least blocks with which vLLM starts."""
    for blocks in range(10, 100):
        try:
            engine_of(model, blocks, POLICY)
        except ValueError:
            continue
        return blocks
    raise AssertionError("it does not start")


def test_a_prompt_that_takes_all_there_is_begins_when_nothing_else_runs(model):
    blocks = smallest(model)
    ours = Replay(engine_of(model, blocks, POLICY), prompts([31, 5, 31, 7]), 4).run()
    assert ours.requests == 4
