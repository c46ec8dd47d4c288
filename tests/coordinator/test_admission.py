# SPDX-License-Identifier: Apache-2.0
"""`hybrid_aware` starts a prompt only if running prompts will not preempt each other."""

from __future__ import annotations

import random
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request, RequestStatus

from testing.coordinator.prompts import POLICY, STOCK, engine_of, hybrid_model
from vllm_hybrid_kv.tools.plan.engine import Engine, Model
from vllm_hybrid_kv.tools.replay.scheduler import Replay
from vllm_hybrid_kv.tools.replay.trace import BLOCK_TOKENS, TracedRequest


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return hybrid_model(tmp_path_factory.mktemp("hybrid"), 8192)


def prompts(lengths: list[int], answer: int = 30) -> list[TracedRequest]:
    """Make prompts that share no prefixes. `lengths` are in blocks of 512 tokens."""
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
def test_prompts_wait_until_running_prompts_have_all_blocks_that_they_need(model, blocks, seed):
    sent = prompts(lengths(seed))
    ours = Replay(engine_of(model, blocks, POLICY), sent, 16).run()
    assert (ours.requests, ours.preemptions) == (len(sent), 0)
    # vLLM starts more prompts than the pool can hold once they are long, so it preempts some.
    assert Replay(engine_of(model, blocks, STOCK), sent, 16).run().preemptions > 0


def test_prompts_run_concurrently_if_there_is_room_for_all(model):
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


def request_of(engine: Engine, name: str, prompt: TracedRequest) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=list(range(prompt.input_length)),
        sampling_params=SamplingParams(max_tokens=prompt.output_length),
        pooling_params=None,
        block_hasher=get_request_block_hasher(engine.hash_block_size, sha256),
        cache_salt=name,
    )


def load_all_but_the_end(engine: Engine, request: Request) -> None:
    """Allocate blocks for a connector's asynchronous load, as vLLM's scheduler does."""
    manager = engine.scheduler.kv_cache_manager
    loaded = request.num_tokens // engine.scheduler_block_size * engine.scheduler_block_size
    blocks = manager.allocate_slots(
        request, 0, num_external_computed_tokens=loaded, delay_cache_blocks=True
    )
    assert blocks is not None
    request.num_computed_tokens = loaded
    manager.cache_blocks(request, loaded)
    request.status = RequestStatus.WAITING


def start(engine: Engine, request: Request) -> bool:
    """Start a request, and return whether there is room."""
    blocks = engine.scheduler.kv_cache_manager.allocate_slots(
        request, request.num_tokens - request.num_computed_tokens, full_sequence_must_fit=True
    )
    if blocks is not None:
        request.status = RequestStatus.RUNNING
    return blocks is not None


def test_loaded_requests_do_not_wait_for_each_other(model):
    init_none_hash(sha256)
    engine = engine_of(model, 24, POLICY)
    pool = engine.scheduler.kv_cache_manager.block_pool
    first, second = (request_of(engine, name, *prompts([12])) for name in ("first", "second"))
    for request in (first, second):
        load_all_but_the_end(engine, request)
    # Each request holds 4 attention blocks and 3 state blocks. The free blocks let the first
    # one start, but are too few for all blocks that the two requests may need later.
    assert pool.get_num_free_blocks() == 9
    assert start(engine, first)
    assert not start(engine, second)
