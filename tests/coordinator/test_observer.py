# SPDX-License-Identifier: Apache-2.0
"""Test what the observer reports about scheduled requests: counters, DEBUG lines, a warning."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.multiprocess import MultiProcessCollector
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request, RequestStatus

from testing.coordinator.contents import (
    NUM_BLOCKS,
    every,
    fill_at,
    full,
    layout_of,
    mamba,
    request_of,
)
from testing.coordinator.oracle import Layout
from vllm_hybrid_kv.coordinator import observer
from vllm_hybrid_kv.coordinator.explanation import Reason
from vllm_hybrid_kv.metrics import VARIABLE

HYBRID = layout_of(full(64), mamba(64), unit=16)
LOGGER = logging.getLogger("vllm.hybrid_kv")


@pytest.fixture(autouse=True)
def _settings(coordinator_setting):
    coordinator_setting("fixed_point")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    return tmp_path


def counts(folder: Path) -> dict[tuple[str, str | None], float]:
    """Read the counters that are not 0, by name (without prefix and suffix) and kind."""
    return {
        (sample.name[len("vllm_hybrid_kv:") : -len("_total")], sample.labels.get("kind")): (
            sample.value
        )
        for metric in MultiProcessCollector(None, folder).collect()
        for sample in metric.samples
        if sample.value
    }


def manager_of(layout: Layout, log_stats: bool = True, blocks: int = NUM_BLOCKS) -> KVCacheManager:
    return KVCacheManager(
        kv_cache_config=KVCacheConfig(blocks, [], list(layout.groups)),
        max_model_len=4096,
        scheduler_block_size=layout.scheduler_block_size,
        hash_block_size=layout.hash_unit,
        log_stats=log_stats,
    )


def cached_request(log_stats: bool = True) -> tuple[KVCacheManager, Request]:
    """Make a request. Cache attention for 256 tokens, and states after 64 and 80 tokens."""
    manager, request = manager_of(HYBRID, log_stats), request_of(HYBRID, range(300), "a")
    fill_at(manager.block_pool, request, every(64, 256), (64, 80))
    return manager, request


def look_up(manager: KVCacheManager, request: Request) -> tuple[Any, int]:
    """Look up a waiting request as the scheduler does before it allocates blocks."""
    blocks, hit, request.shared_prefix_boundary = manager.get_computed_blocks(request)
    return blocks, hit


def schedule(manager: KVCacheManager, request: Request, chunk: int = 4096) -> int:
    """Compute a request in chunks as the scheduler does, and return its hit."""
    manager.new_step_starts()
    blocks, hit = look_up(manager, request)
    new = min(chunk, request.num_tokens - hit)
    assert manager.allocate_slots(request, new, hit, blocks) is not None
    manager.record_prefix_cache_stats(request, hit)
    request.status, request.num_computed_tokens = RequestStatus.RUNNING, hit + new
    while request.num_computed_tokens < request.num_tokens:
        new = min(chunk, request.num_tokens - request.num_computed_tokens)
        assert manager.allocate_slots(request, new) is not None
        request.num_computed_tokens += new
    return hit


def test_a_request_is_counted_once_when_it_is_scheduled(folder):
    manager, request = cached_request()
    for _ in range(5):
        look_up(manager, request)
    assert not counts(folder)
    schedule(manager, request)
    for more in (1, 2):
        request.append_output_token_ids(7)
        manager.allocate_slots(request, more)
    expected = {
        ("prefix_cache_requests", None): 1,
        ("prefix_cache_hit_tokens", "full_attention"): 80,
        ("prefix_cache_hit_tokens", "mamba"): 80,
        ("prefix_cache_alone_tokens", "full_attention"): 256,
        ("prefix_cache_alone_tokens", "mamba"): 80,
        ("prefix_cache_lost_tokens", "mamba"): 176,
        ("prefix_cache_limited_requests", "mamba"): 1,
    }
    assert counts(folder) == expected
    assert manager.make_prefix_cache_stats().hits == 80
    manager.free(request)
    assert counts(folder) == expected


def test_a_preempted_request_has_counters_of_its_own(folder):
    manager, request = manager_of(HYBRID), request_of(HYBRID, range(300), "a")
    schedule(manager, request, chunk=64)
    request.append_output_token_ids([7] * 5)
    manager.free(request)
    request.status, request.num_computed_tokens = RequestStatus.PREEMPTED, 0
    request.num_preemptions += 1
    before = counts(folder)
    hit = schedule(manager, request)
    stats = manager.make_prefix_cache_stats()
    assert (stats.preempted_queries, stats.preempted_hits) == (305, hit)
    assert hit > 0
    assert counts(folder) == {
        **before,
        ("prefix_cache_preempted_requests", None): 1,
        ("prefix_cache_preempted_query_tokens", None): 305,
        ("prefix_cache_preempted_hit_tokens", None): hit,
    }
    assert manager.coordinator.explain(request).preempted


def test_a_running_request_is_explained_by_the_lookup_that_it_was_scheduled_with(folder):
    manager, request = cached_request()
    coordinator = manager.coordinator
    waiting = coordinator.explain(request)
    assert (waiting.scheduled, waiting.hit_tokens) == (False, 80)
    # States are cached only if the chunks end where state blocks end.
    schedule(manager, request, chunk=16)
    # The request's own blocks are cached by now, so the same lookup would hit more than 80 tokens.
    hashes, groups = request.block_hashes, coordinator.attention_groups
    assert coordinator.reconcile(hashes, 299, groups).length > 80
    request.append_output_token_ids([7] * 20)
    running = coordinator.explain(request)
    assert running == replace(waiting, scheduled=True)
    assert str(running).startswith("request a hit 80 of 300 prompt tokens: ")
    manager.free(request)
    assert not coordinator.explain(request).scheduled


def test_a_request_that_reads_no_cache_does_not_get_the_lookup_of_a_waiting_one(folder):
    manager, waits = cached_request()
    look_up(manager, waits)
    no_reader = request_of(HYBRID, range(200), "no reader", prompt_logprobs=1)
    assert schedule(manager, no_reader) == 0
    why = manager.coordinator.explain(no_reader)
    assert (why.reason, why.scheduled, why.hit_tokens) == (Reason.NOT_READ, True, 0)
    assert not counts(folder)
    assert schedule(manager, waits) == 80
    assert counts(folder)["prefix_cache_requests", None] == 1


def test_a_request_without_room_is_not_counted(folder):
    manager = manager_of(HYBRID, blocks=8)
    first = request_of(HYBRID, range(200), "first", max_tokens=8)
    second = request_of(HYBRID, range(5000, 5300), "second")
    schedule(manager, first)
    blocks, hit = look_up(manager, second)
    assert manager.allocate_slots(second, 300 - hit, hit, blocks) is None
    # Take a step of the running request between two lookups of the waiting request.
    first.append_output_token_ids(7)
    assert manager.allocate_slots(first, 1) is not None
    assert counts(folder) == {("prefix_cache_requests", None): 1}
    assert not manager.coordinator.explain(second).scheduled
    ran = manager.coordinator.explain(first)
    assert (ran.scheduled, ran.prompt_tokens, ran.reason) == (True, 200, Reason.NOT_CACHED)


def test_a_prompt_shorter_than_the_match_unit_is_counted(folder):
    blocks = layout_of(full(64), mamba(64))
    schedule(manager_of(blocks), request_of(blocks, range(64)))
    assert counts(folder) == {
        ("prefix_cache_requests", None): 1,
        ("prefix_cache_short_requests", None): 1,
    }


def test_a_lookup_of_each_group_alone_loses_nothing(folder):
    manager, request = cached_request()
    coordinator = manager.coordinator
    coordinator.find_longest_cache_hit_per_group(request.block_hashes, 299)
    coordinator.allocate_new_computed_blocks(
        "a", ([], []), num_local_computed_tokens=256, num_external_computed_tokens=0
    )
    coordinator.cache_blocks(request, 0)
    assert counts(folder) == {
        ("prefix_cache_requests", None): 1,
        ("prefix_cache_hit_tokens", "full_attention"): 256,
        ("prefix_cache_hit_tokens", "mamba"): 256,
        ("prefix_cache_alone_tokens", "full_attention"): 256,
        ("prefix_cache_alone_tokens", "mamba"): 80,
    }


def test_without_statistics_nothing_is_counted_and_no_kind_is_looked_up_alone(folder, log):
    LOGGER.setLevel(logging.INFO)
    manager, request = cached_request(log_stats=False)
    schedule(manager, request)
    why = manager.coordinator.explain(request)
    # Attention is looked up first, so its own hit is known. States are looked up only in that hit.
    assert [kind.alone_tokens for kind in why.kinds] == [256, None]
    assert (why.hit_tokens, why.limited_by, why.lost_tokens) == (80, "mamba", 176)
    assert "each kind alone: full_attention 256; mamba lost 176" in str(why)
    assert not list(folder.iterdir())
    assert not log(logging.DEBUG)


def test_each_request_gets_one_debug_line(folder, log):
    LOGGER.setLevel(logging.DEBUG)
    manager, request = cached_request(log_stats=False)
    for _ in range(3):
        look_up(manager, request)
    schedule(manager, request)
    assert log(logging.DEBUG) == [str(manager.coordinator.explain(request))]
    assert "full_attention 256, mamba 80; mamba lost 176" in log(logging.DEBUG)[0]


def send(manager: KVCacheManager, request: Request, times: int, hit: int = 80) -> None:
    """Look up a request several times, and report it as scheduled with `hit` cached tokens."""
    for _ in range(times):
        look_up(manager, request)
        manager.coordinator.observer.scheduled("a", hit)
        manager.coordinator.observer.cached(request)
        manager.coordinator.observer.freed("a")


@pytest.fixture
def clock(monkeypatch):
    """Return a function that sets the observer's clock, in seconds."""
    now = [0.0]
    monkeypatch.setattr(observer.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


def test_a_warning_comes_if_most_cached_tokens_are_lost_over_100_requests(log, folder, clock):
    layout = layout_of(full(64), mamba(64))
    manager, request = manager_of(layout), request_of(layout, range(300), "a")
    fill_at(manager.block_pool, request, every(64, 256), (64,))
    send(manager, request, 99, hit=64)
    assert not log(logging.WARNING)
    send(manager, request, 1, hit=64)
    assert log(logging.WARNING) == [
        "In the last 100 requests, full_attention had 25600 prompt tokens in the prefix cache, but "
        "19200 (75 %) were recomputed, 19200 of these because KV groups of kind mamba had not "
        "cached them; try the hybrid_kv setting coordinator=hybrid_aware and prefix_match_unit=auto"
    ]
    send(manager, request, 200, hit=64)
    clock(599.0)
    send(manager, request, 100, hit=64)
    assert len(log(logging.WARNING)) == 1
    clock(600.0)
    send(manager, request, 100, hit=64)
    assert len(log(logging.WARNING)) == 2


def test_no_warning_comes_if_half_of_the_cached_tokens_are_lost(log, folder):
    manager, request = manager_of(HYBRID), request_of(HYBRID, range(300), "a")
    fill_at(manager.block_pool, request, every(64, 256), (128,))
    send(manager, request, 1000, hit=128)
    assert not log(logging.WARNING)


def test_preempted_requests_cause_no_warning(log, folder):
    manager, request = cached_request()
    request.num_preemptions = 1
    send(manager, request, 100)
    assert not log(logging.WARNING)


def test_statistics_of_checkpoints_are_counted_by_event_and_kind(folder, monkeypatch):
    manager, request = cached_request()
    stats = Counter({("kept", "prompt"): 1, ("evicted", "prompt"): 1})
    monkeypatch.setattr(manager.coordinator, "stats", lambda: stats)
    send(manager, request, 1)
    stats.update({("kept", "prompt"): 3, ("used", "branch point"): 5, ("evicted_unused", None): 1})
    send(manager, request, 2)
    counted = {key: n for key, n in counts(folder).items() if key[0].startswith("checkpoints")}
    assert counted == {
        ("checkpoints_kept", "prompt"): 4,
        ("checkpoints_evicted", "prompt"): 1,
        ("checkpoints_used", "branch point"): 5,
        ("checkpoints_evicted_unused", None): 1,
    }


def test_counters_are_exported_as_0_before_the_first_request(folder):
    manager_of(HYBRID)
    values = {
        (sample.name, sample.labels.get("kind")): sample.value
        for metric in MultiProcessCollector(None, folder).collect()
        for sample in metric.samples
    }
    assert values["vllm_hybrid_kv:prefix_cache_requests_total", None] == 0
    assert values["vllm_hybrid_kv:prefix_cache_lost_tokens_total", "mamba"] == 0
    assert len(values) == 5 + 4 * 2


def test_a_folder_that_cannot_be_written_costs_the_metrics_and_one_warning(
    tmp_path, monkeypatch, folder, log
):
    (tmp_path / "file").touch()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file" / "folder"))
    manager, request = cached_request()
    assert len(log(logging.WARNING)) == 1
    assert str(tmp_path / "file" / "folder") in log(logging.WARNING)[0]
    assert schedule(manager, request) == 80
