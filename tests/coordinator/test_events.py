# SPDX-License-Identifier: Apache-2.0
"""Test that routers can use the KV events of our coordinators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import BlockStored
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, maybe_convert_block_hash
from vllm.v1.kv_cache_interface import MambaSpec

from testing.coordinator.contents import full, layout_of, request_of
from testing.coordinator.events import EventReplay, cached_copies
from testing.coordinator.prompts import ANSWER, POLICY, engine_of, hybrid_model, send
from vllm_hybrid_kv.coordinator.events import cache_runs
from vllm_hybrid_kv.tools.plan.engine import Model


def hashes_of(tokens: Sequence[int], unit: int) -> list[BlockHash]:
    return request_of(layout_of(full(unit)), tokens).block_hashes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return hybrid_model(tmp_path_factory.mktemp("hybrid"), 2048)


class Server:
    """A scheduler that publishes KV events, and a router that replays them."""

    def __init__(self, model: Model, coordinator: str, blocks: int = 100) -> None:
        self._engine = engine_of(model, blocks, {**POLICY, "coordinator": coordinator})
        self.unit = self._engine.hash_block_size
        self._engine.vllm_config.kv_events_config = KVEventsConfig(
            enable_kv_cache_events=True, publisher="null"
        )
        self.block_size = self._engine.scheduler_block_size
        self.states = [
            isinstance(group.kv_cache_spec, MambaSpec)
            for group in self._engine.kv_cache_config.kv_cache_groups
        ]
        self.replay = EventReplay(self.unit)
        self.scheduler.kv_event_publisher.publish = self._publish
        self._published: list[Any] = []
        self._sent = 0

    @property
    def scheduler(self) -> Any:
        return self._engine.scheduler

    @property
    def pool(self) -> BlockPool:
        return self.scheduler.kv_cache_manager.block_pool

    def _publish(self, batch: Any) -> None:
        self._published += batch.events

    def send(self, prompt: list[int], answer: int = 1, **more: Any) -> tuple[int, list[Any]]:
        """Run a prompt. Returns its hit in tokens and its events, which were replayed."""
        self.replay.learn(hashes_of([*prompt, *[ANSWER] * answer], self.unit))
        self._published.clear()
        self._sent += 1
        hit = send(self.scheduler, f"{self._sent}", prompt, self.unit, max_tokens=answer, **more)
        events = [*self._published, *self.scheduler.kv_cache_manager.take_events()]
        self.replay.apply(events)
        return hit, events


@pytest.mark.parametrize("coordinator", ["fixed_point", "hybrid_aware"])
def test_each_hash_of_an_event_stands_for_a_block_of_its_tokens(model, coordinator):
    server = Server(model, coordinator, blocks=40)
    prompt = list(range(3 * server.block_size + 100))
    for turn in range(4):
        prompt += [ANSWER] * 100 + [1000 * turn] * (server.block_size // 2)
        hit, events = server.send(prompt, answer=100)
        assert (hit > 0) is (turn > 0)
        assert any(isinstance(event, BlockStored) for event in events)
        assert +server.replay.copies == cached_copies(server.pool)
    # Other prompts evict blocks.
    for number in range(5):
        server.send([number] * 2000, answer=2)
        assert +server.replay.copies == cached_copies(server.pool)
    assert server.scheduler.reset_prefix_cache()
    server.replay.apply(server.scheduler.kv_cache_manager.take_events())
    assert not server.replay.copies


def test_vllms_own_coordinator_publishes_more_tokens_than_hashes(model):
    # If this fails, vllm-project/vllm#44451 is fixed, and `cache_runs` is not needed any more.
    server = Server(model, "stock")
    with pytest.raises(AssertionError, match="BlockStored"):
        server.send(list(range(3 * server.block_size)))


@pytest.mark.parametrize("coordinator", ["fixed_point", "hybrid_aware"])
def test_a_request_that_reports_its_hit_publishes_only_cached_blocks(model, coordinator):
    server = Server(model, coordinator)
    unit, size = server.unit, server.block_size
    prompt = list(range(2 * size + 3 * unit))
    server.send(prompt)
    # The hit ends in the last block of the longer prompt.
    longer = [*prompt, *[5] * unit]
    hit, events = server.send(longer, extra_args={"kv_cache_report_mode": "full"})
    assert hit == 2 * size + 2 * unit
    hashes = list(map(maybe_convert_block_hash, hashes_of(longer, unit)))
    whole = [(None, hashes[size // unit - 1 : 2 * size // unit : size // unit], longer[: 2 * size])]
    end = hit // unit
    tail = [(hashes[end - 2], hashes[end - 1 : end], longer[hit - unit : hit])]
    expected = [tail if is_state else whole + tail for is_state in server.states]
    # The events of the hit come before those of the step.
    published: list[list[Any]] = [[] for _ in expected]
    for event in events[: sum(map(len, expected))]:
        entry = (event.parent_block_hash, event.block_hashes, list(event.token_ids))
        published[event.group_idx].append(entry)
    assert published == expected


@settings(max_examples=200, deadline=None)
@given(
    blocks=st.lists(st.sampled_from(["block", "null", "masked"]), min_size=1, max_size=8),
    cached=st.integers(0, 3),
    scale=st.sampled_from([1, 3]),
)
def test_runs_of_cached_blocks_are_published_as_one_event_each(blocks, cached, scale):
    unit = 4
    size, count = scale * unit, cached + len(blocks)
    pool = BlockPool(20, True, unit, enable_kv_cache_events=True)
    request = request_of(layout_of(full(unit)), range(count * size + 3))
    table = [
        pool.null_block if kind == "null" else pool.blocks[i + 1] for i, kind in enumerate(blocks)
    ]
    cache_runs(
        pool.cache_full_blocks,
        request,
        [pool.null_block] * cached + table,
        cached,
        count,
        size,
        kv_cache_group_id=2,
        block_mask=[kind != "masked" for kind in blocks],
    )
    events = pool.take_events()
    replay = EventReplay(unit)
    replay.learn(request.block_hashes)
    replay.apply(events)
    assert replay.copies == cached_copies(pool)
    assert replay.copies.total() == blocks.count("block")
    starts = [
        i for i, kind in enumerate(blocks) if kind == "block" and "block" not in blocks[i - 1 : i]
    ]
    assert [event.token_ids[0] for event in events] == [(cached + i) * size for i in starts]
