# SPDX-License-Identifier: Apache-2.0
"""Replay host memory with vLLM's OffloadingConnector: hits by tier, bytes, times and errors."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testing.models import large_state_config
from vllm_hybrid_kv.tools.output import ToolError
from vllm_hybrid_kv.tools.plan.engine import Model
from vllm_hybrid_kv.tools.replay.host_memory import HostMemory, Link, VirtualWorker
from vllm_hybrid_kv.tools.replay.scheduler import Replay
from vllm_hybrid_kv.tools.replay.trace import TracedRequest

GIB = 1 << 30
BANDWIDTH = 25e9
PREFILL_RATE = 20_000.0


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same hybrid model without host memory and with 256 MiB."""
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(large_state_config().to_json_string())
    arguments = {
        "model": str(path.parent),
        "kv_cache_dtype": "turboquant_k8v4",
        "enable_prefix_caching": True,
        "max_num_seqs": 4,
    }
    return {
        host: Model(arguments | ({"kv_offloading_size": host / GIB} if host else {}))
        for host in (0, 256 << 20)
    }


@pytest.fixture(scope="module")
def requests():
    """Conversations that take turns, so that the device evicts each before its next turn."""
    return [
        TracedRequest(0, 512 * (turn + 3), 5, (0, *range(100 * chat, 100 * chat + turn + 2)))
        for turn in range(3)
        for chat in range(1, 13)
    ]


def engine_of(models, host, coordinator="hybrid_aware"):
    unit = "stock" if coordinator == "stock" else "auto"
    settings = {"coordinator": coordinator, "prefix_match_unit": unit}
    return models[host].engine(64 << 20, settings)


def replay(models, requests, host=256 << 20, coordinator="hybrid_aware", bandwidth=BANDWIDTH):
    engine = engine_of(models, host, coordinator)
    memory = HostMemory(engine, bandwidth, PREFILL_RATE) if host else None
    replayed = Replay(engine, requests, 2, memory)
    return engine, replayed, replayed.run()


def test_host_memory_raises_the_hit_rate(models, requests):
    *_, without = replay(models, requests, host=0)
    engine, _, tally = replay(models, requests)
    assert without.host_hit_tokens == without.loaded_bytes == without.stored_bytes == 0
    assert 0 < tally.host_hit_tokens < tally.hit_tokens
    assert tally.hit_tokens > 2 * without.hit_tokens
    # A turn repeats the whole prompt of the turn before, and host memory has room for all.
    repeated = sum(request.input_length for request in requests[:24])
    assert tally.hit_tokens > 0.8 * repeated
    assert engine.scheduler.connector.connector_scheduler.manager._num_chunks > 200


@pytest.mark.parametrize("coordinator", ["hybrid_aware", "fixed_point", "stock"])
def test_copied_bytes_are_whole_blocks(models, requests, coordinator):
    engine = engine_of(models, 256 << 20, coordinator)
    manager = engine.scheduler.connector.connector_scheduler.manager
    copied = {"complete_load": 0, "complete_store": 0}

    def count(name):
        complete = getattr(manager, name)

        def counted(keys, *args):
            copied[name] += len(keys)
            complete(keys, *args)

        setattr(manager, name, counted)

    count("complete_load")
    count("complete_store")
    tally = Replay(engine, requests, 2, HostMemory(engine, BANDWIDTH, PREFILL_RATE)).run()
    plan = engine.worker_kv_cache_config
    block_bytes = plan.kv_cache_tensors[0].size // plan.num_blocks
    assert tally.stored_bytes > 0
    assert tally.stored_bytes >= copied["complete_store"] * block_bytes
    assert tally.loaded_bytes == copied["complete_load"] * block_bytes
    assert tally.load_seconds == pytest.approx(tally.loaded_bytes / BANDWIDTH)


def test_no_block_is_stored_twice_while_host_memory_has_room(models, requests):
    engine, _, tally = replay(models, requests)
    plan = engine.worker_kv_cache_config
    block_bytes = plan.kv_cache_tensors[0].size // plan.num_blocks
    manager = engine.scheduler.connector.connector_scheduler.manager
    assert tally.stored_bytes == manager._num_allocated_chunks * block_bytes


def test_slow_copies_change_the_time_but_not_the_answers(models, requests):
    *_, fast = replay(models, requests)
    *_, slow = replay(models, requests, bandwidth=BANDWIDTH / 1000)
    assert slow.requests == fast.requests == len(requests)
    assert slow.load_seconds / slow.loaded_bytes == pytest.approx(
        1000 * fast.load_seconds / fast.loaded_bytes
    )
    assert slow.wait_seconds > fast.wait_seconds


def test_a_copy_that_never_ends_is_an_error(models, requests, monkeypatch):
    def never_loaded(self, job_id, *args, **kwargs):
        return True

    monkeypatch.setattr(VirtualWorker, "submit_load", never_loaded)
    with pytest.raises(ToolError, match=r"requests, .* wait for blocks from host memory"):
        replay(models, requests)


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 9)), max_size=20))
def test_copies_of_one_direction_follow_each_other(copies):
    link, now, end = Link(), 0.0, 0.0
    for wait, blocks in copies:
        now += wait
        started = max(now, end)
        end = link.submit(now, blocks, blocks / 4)
        assert end == pytest.approx(started + blocks / 4)
    assert link.blocks == sum(blocks for _, blocks in copies)
    assert link.seconds == pytest.approx(link.blocks / 4)
