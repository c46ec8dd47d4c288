# SPDX-License-Identifier: Apache-2.0
"""Test the policy `hybrid_aware` in vLLM's real scheduler, without a model."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from vllm.v1.core.kv_cache_utils import get_group_id
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, MambaSpec

from testing.coordinator.contents import full, mamba, window
from testing.coordinator.prompts import POLICY, STOCK, engine_of, hybrid_model
from testing.shapes import SHAPES
from tests.coordinator.soak import checks
from vllm_hybrid_kv.coordinator.checkpoints import CheckpointKind
from vllm_hybrid_kv.coordinator.hybrid_policy import PROMPT_ENDS
from vllm_hybrid_kv.coordinator.traffic import Turn
from vllm_hybrid_kv.tools.plan.engine import Engine, Model
from vllm_hybrid_kv.tools.replay.scheduler import Replay, Tally
from vllm_hybrid_kv.tools.replay.trace import BLOCK_TOKENS, TracedRequest


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return hybrid_model(tmp_path_factory.mktemp("hybrid"), 2048)


class Script:
    """Builds a trace of chats. Requests that begin with the same block ids share a prefix."""

    def __init__(self) -> None:
        self.requests: list[TracedRequest] = []
        self._next = 0

    def new(self, blocks: int) -> list[int]:
        ids = list(range(self._next, self._next + blocks))
        self._next += blocks
        return ids

    def send(self, ids: list[int], tail: int = 0, answer: int = 4) -> None:
        own = self.new(1) if tail else []
        length = BLOCK_TOKENS * len(ids) + tail
        self.requests.append(TracedRequest(0, length, answer, (*ids, *own)))


def chats(count: int, turns: int, seed: int, shared: int = 0) -> list[TracedRequest]:
    """Make chats that start with `shared` common blocks. Their turns come in random order."""
    draw, script = random.Random(seed), Script()
    system = script.new(shared)
    waiting = dict.fromkeys(range(count), turns)
    ids = {chat: list(system) for chat in range(count)}
    while waiting:
        chat = draw.choice(list(waiting))
        ids[chat] += script.new(draw.randrange(1, 4))
        script.send(ids[chat], tail=draw.randrange(1, BLOCK_TOKENS), answer=draw.randrange(1, 30))
        waiting[chat] -= 1
        if not waiting[chat]:
            del waiting[chat]
    return script.requests


def coordinator_of(engine: Engine) -> Any:
    return engine.scheduler.kv_cache_manager.coordinator


def replay(
    model: Model, requests: list[TracedRequest], blocks: int, settings: dict[str, str], at_once=1
) -> Tally:
    return Replay(engine_of(model, blocks, settings), requests, at_once).run()


def check(engine: Engine) -> None:
    """Check that tables, reference counts, the free queue and the hash map are consistent."""
    checks.check_references(engine.scheduler)
    checks.check_hash_map(coordinator_of(engine).block_pool)
    checks.check_queue(coordinator_of(engine))


def test_a_turn_resumes_at_the_end_of_the_previous_prompt(model):
    script = Script()
    ids = script.new(2)
    script.send(ids, tail=100)
    script.send([*ids, *script.new(1)], tail=40)
    assert replay(model, script.requests, 200, POLICY).hits == [0, (1024 + 100 - 1) // 16 * 16]


def test_the_second_request_reveals_a_branch_point_and_the_third_resumes_there(model):
    script = Script()
    system = script.new(1)
    for _ in range(4):
        script.send([*system, *script.new(2)])
    assert replay(model, script.requests, 200, POLICY).hits == [0, 0, 512, 512]
    assert sum(replay(model, script.requests, 200, STOCK).hits) < 1024


def test_the_second_request_after_a_prompt_with_an_evicted_state_reveals_a_branch_point(model):
    script = Script()
    system = script.new(1)
    script.send(system)
    for _ in range(4):
        script.send([*system, *script.new(2)])
    engine = engine_of(model, 200, POLICY)
    coordinator = coordinator_of(engine)
    first = Replay(engine, script.requests[:1], 1)
    first.run()
    pool = coordinator.block_pool
    while coordinator.checkpoints.pinned:
        pool.free_block_queue.drop(coordinator.checkpoints.pinned[0])
    pool.evict_blocks({block.block_id for block in pool.blocks if block.block_hash is not None})
    assert Replay(engine, script.requests[1:], 1).run().hits == [0, 0, 512, 512]


def test_a_continued_conversation_has_no_branch_point(model):
    engine = engine_of(model, 200, POLICY)
    Replay(engine, chats(3, 4, seed=0), 1).run()
    assert not any(
        checkpoint.place is CheckpointKind.BRANCH
        for checkpoint in coordinator_of(engine).checkpoints.pinned
    )


def pinned_states(coordinator: Any) -> Counter[int]:
    """Count the free blocks with pinned states, by the length of their prefix in tokens."""
    return Counter(
        block.block_hash_num_tokens
        for block in coordinator.block_pool.free_block_queue.get_all_free_blocks()
        if block.block_hash
        and get_group_id(block.block_hash) in coordinator._state_groups
        and coordinator.block_pool.free_block_queue.is_pinned(block)
    )


def test_states_are_pinned_at_ends_of_prompts_and_at_whole_blocks_only_if_that_pays(model):
    script = Script()
    script.send(script.new(5), tail=33)
    script.send(script.new(5), tail=49)
    engine = engine_of(model, 200, POLICY)
    coordinator = coordinator_of(engine)
    groups = len(coordinator._state_groups)
    Replay(engine, script.requests[:1], 1).run()
    block, end = coordinator._block_tokens, 5 * 512 + 32
    assert pinned_states(coordinator) == {block: groups, end: groups}
    # Evict all, so that a new state at a whole block is worth less than evicted ones.
    while (evicted := coordinator.checkpoints.evict()) is not None:
        coordinator.block_pool.free_block_queue.release(evicted.key, evicted.blocks)
    Replay(engine, script.requests[1:], 1).run()
    assert pinned_states(coordinator) == {end + 16: groups}


def test_a_state_is_pinned_in_the_block_that_lookups_return(model):
    script = Script()
    script.send(script.new(2), tail=33)
    engine = engine_of(model, 200, POLICY)
    coordinator = coordinator_of(engine)
    Replay(engine, script.requests, 1).run()
    pool, queue = coordinator.block_pool, coordinator.block_pool.free_block_queue
    (checkpoint,) = [c for c in coordinator.checkpoints.pinned if c.place is CheckpointKind.SHORT]
    first = pool.get_cached_block(checkpoint.key, coordinator._state_groups)
    # Pretend that another request computed the same states and ended while the first one ran.
    pool.touch(first)
    keys = [block.block_hash for block in first]
    others, copies = pool.get_new_blocks(len(first)), pool.get_new_blocks(len(first))
    for key, block in zip(keys, others, strict=True):
        pool._insert_block_hash(key, block, num_tokens=checkpoint.tokens)
    pool.free_blocks(others)
    assert queue.unpinned.issuperset(block.block_id for block in others)
    for block, copy in zip(first, copies, strict=True):
        pool.move_block_hashes(block, copy)
    pool.free_blocks(copies)
    pool.free_blocks(first)
    assert pool.get_cached_block(checkpoint.key, coordinator._state_groups) == others
    assert queue.unpinned.isdisjoint(block.block_id for block in others)
    check(engine)


@pytest.mark.parametrize("coordinator", ["fixed_point", "hybrid_aware"])
def test_a_request_starts_while_another_with_the_same_prefix_is_decoding(model, coordinator):
    script = Script()
    ids = script.new(1)
    script.send(ids, tail=50, answer=200)
    script.send(ids, tail=50, answer=200)
    engine = engine_of(model, 200, {**POLICY, "coordinator": coordinator})
    # The second request's prefix ends in the block that also holds the first answer.
    assert engine.scheduler_block_size > BLOCK_TOKENS + 50 + 200
    tally = Replay(engine, script.requests, 2).run()
    assert tally.hits[1] > 0
    assert tally.steps < 220


def contents_by_step(engine: Engine, requests: list[TracedRequest], skip: bool) -> list[Any]:
    """Record all block hashes after each step. If `skip` is False, every step tries to cache."""
    coordinator = coordinator_of(engine)
    update = engine.scheduler.update_from_output
    steps: list[Any] = []

    def recorded(*arguments: Any) -> Any:
        result = update(*arguments)
        blocks = coordinator.block_pool.blocks
        steps.append([(block.block_hash, block.block_hash_num_tokens) for block in blocks])
        if not skip:
            coordinator._offered.clear()
        return result

    engine.scheduler.update_from_output = recorded
    Replay(engine, requests, 6).run()
    return steps


@pytest.mark.parametrize("coordinator", ["fixed_point", "hybrid_aware"])
def test_skipped_steps_would_cache_nothing(model, coordinator):
    script = Script()
    for tail in (310, 326):
        # Make the answer long enough to fill a block.
        script.send(script.new(2), tail=tail, answer=120)
    requests = [*script.requests, *chats(12, 3, seed=5, shared=1)]
    settings = {**POLICY, "coordinator": coordinator}
    skipped, all_steps = (
        contents_by_step(engine_of(model, 60, settings), requests, skip) for skip in (True, False)
    )
    assert skipped == all_steps


@pytest.mark.parametrize("blocks", [45, 70, 120, 400])
def test_hits_are_never_fewer_than_vllms(model, blocks):
    requests = chats(30, 5, seed=7, shared=1)
    ours = replay(model, requests, blocks, POLICY, at_once=2)
    stock = replay(model, requests, blocks, STOCK, at_once=2)
    assert ours.prompt_tokens == stock.prompt_tokens
    assert ours.hit_tokens > stock.hit_tokens
    assert ours.preemptions <= stock.preemptions


def test_a_turn_resumes_in_the_previous_answer_if_there_is_room_for_its_state(model):
    script = Script()
    ids = script.new(2)
    script.send(ids, tail=100, answer=300)
    script.send([*ids, *script.new(1)], tail=40)
    # The hit ends at the last copied state. States are copied every 64 tokens, and the last token
    # of an answer is never computed.
    assert replay(model, script.requests, 200, POLICY).hits == [0, (1124 + 299) // 64 * 64]


def test_states_are_not_copied_if_answers_do_not_return(model):
    script = Script()
    ids = script.new(2)
    script.send(ids, tail=100, answer=300)
    script.send([*ids, *script.new(1)], tail=40)
    engine = engine_of(model, 200, POLICY)
    for _ in range(40):
        coordinator_of(engine)._returns.record(False)
    assert Replay(engine, script.requests, 1).run().hits == [0, 1124 // 16 * 16]


def engine_with_windows(model: Model, retention: int | None) -> Engine:
    """Make an engine of a model with full attention, sliding windows and states."""
    engine = engine_of(model, 200, POLICY)
    engine.vllm_config.cache_config.block_size = 16
    groups = [
        KVCacheGroupSpec([f"layer {i}"], spec)
        for i, spec in enumerate((full(512), window(16, 100), mamba(512)))
    ]
    config = KVCacheConfig(2000, [], groups, prefix_cache_retention_interval=retention)
    return replace(engine, kv_cache_config=config, scheduler_block_size=512, hash_block_size=16)


@pytest.mark.parametrize("retention", [0, None])
def test_turns_resume_in_previous_answers_of_a_model_with_windows_and_states(model, retention):
    # States are copied every 64 tokens. 63 more tokens are computed after the last copy, and the
    # windows move past the blocks that a request needs to resume there.
    copied, script = 1408, Script()
    first = [script.new(2) for _ in range(8)]
    for ids in first:
        script.send(ids, tail=100, answer=copied + 64 - 1124)
    for ids in first:
        script.send([*ids, *script.new(1)], tail=40)
    engine = engine_with_windows(model, retention)
    assert Replay(engine, script.requests, 4).run().hits == [0] * 8 + [copied] * 8
    assert coordinator_of(engine).block_pool.get_num_free_blocks() == 1999
    check(engine)


def test_windows_that_a_connector_failed_to_load_are_not_cached_again(model):
    script = Script()
    ids = script.new(2)
    script.send(ids, tail=100, answer=300)
    script.send([*ids, *script.new(1)], tail=40)
    engine = engine_with_windows(model, retention=0)
    coordinator, update = coordinator_of(engine), engine.scheduler.update_from_output
    lost: set[int] = set()

    def updated(*arguments: Any) -> Any:
        for running in coordinator._running.values():
            if running.copied == 1408 and not lost:
                lost.update(block.block_id for block in running.windows[1])
                engine.scheduler.kv_cache_manager.evict_blocks(lost)
        return update(*arguments)

    engine.scheduler.update_from_output = updated
    assert Replay(engine, script.requests, 1).run().hits == [0, 1124 // 16 * 16]
    assert len(lost) == 7


@pytest.mark.parametrize(
    ("repeated", "kind"), [(0, CheckpointKind.PROMPT), (40, CheckpointKind.SUPERSEDED)]
)
def test_an_answer_supersedes_its_prompt_only_if_that_is_expected_to_save_more(
    model, repeated, kind
):
    script = Script()
    script.send(script.new(6), tail=100, answer=300)
    engine = engine_of(model, 200, POLICY)
    coordinator = coordinator_of(engine)
    for _ in range(repeated):
        coordinator._returns.record(True)
    Replay(engine, script.requests, 1).run()
    end, answer = sorted(coordinator.checkpoints.pinned, key=lambda one: one.tokens)[-2:]
    assert answer.place is CheckpointKind.ANSWER
    assert end.kind is kind


def test_a_checkpoint_knows_how_its_prompt_continued_the_conversation(model):
    script = Script()
    ids = script.new(4)
    script.send(ids, tail=100, answer=200)
    ids += script.new(1)
    script.send(ids, tail=40)
    ids += script.new(5)
    script.send(ids, tail=40, answer=600)
    # The next prompt ends inside the previous answer.
    script.send([*ids, *script.new(1)], tail=50)
    engine = engine_of(model, 200, POLICY)
    Replay(engine, script.requests, 1).run()
    ends = [one for one in coordinator_of(engine).checkpoints.pinned if one.place in PROMPT_ENDS]
    turns = [one.turn for one in sorted(ends, key=lambda one: one.tokens)]
    assert turns == [Turn.FIRST, Turn.MESSAGE, Turn.DOCUMENT, Turn.EDITED]


def long_answers(seed: int) -> list[TracedRequest]:
    draw = random.Random(seed)
    return [
        TracedRequest(0, request.input_length, draw.randrange(100, 300), request.hash_ids)
        for request in chats(20, 4, seed)
    ]


def test_repeated_copies_leak_no_block(model):
    engine = engine_of(model, 2000, POLICY)
    coordinator = coordinator_of(engine)
    Replay(engine, long_answers(3), 6).run()
    assert coordinator.stats()["kept", "answer"] > 40
    assert coordinator.stats()["used", "answer"] > 20
    assert coordinator._returns.rate > 0.8
    assert coordinator.block_pool.get_num_free_blocks() == 1999
    check(engine)


def test_no_block_is_held_for_copies_if_memory_is_scarce(model):
    engine = engine_of(model, 90, POLICY)
    Replay(engine, long_answers(3), 6).run()
    assert coordinator_of(engine).stats()["kept", "answer"] == 0


@pytest.mark.parametrize("blocks", [46, 50])
def test_states_are_evicted_before_a_request_is_preempted(model, blocks):
    draw, script = random.Random(0), Script()
    for _ in range(60):
        tail, answer = draw.randrange(1, BLOCK_TOKENS), draw.randrange(20, 60)
        script.send(script.new(1), tail=tail, answer=answer)
    ours, stock = (
        replay(model, script.requests, blocks, settings, at_once=16) for settings in (POLICY, STOCK)
    )
    assert ours.preemptions == stock.preemptions == 0


@pytest.mark.parametrize(("coordinator", "fine"), [("stock", False), ("hybrid_aware", True)])
def test_hits_end_inside_blocks_only_with_a_coordinator_that_caches_no_passed_block(
    coordinator, fine
):
    model = Model(
        {
            "model": str(SHAPES["nemotron-h-8b"]),
            "kv_cache_dtype": "turboquant_k8v4",
            "enable_prefix_caching": True,
            "max_model_len": 8192,
            "gpu_memory_utilization": 0.1,
        }
    )
    states = [spec for spec in model.specs.values() if isinstance(spec, MambaSpec)]
    assert all(spec.num_prefill_checkpoint_blocks for spec in states)
    engine = model.engine(4 << 30, {"coordinator": coordinator, "prefix_match_unit": "auto"})
    assert (engine.hash_block_size < engine.scheduler_block_size) is fine
