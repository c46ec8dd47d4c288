# SPDX-License-Identifier: Apache-2.0
"""Why a request hit what it hit: `explain`, what is told once per request, and the warning."""

from __future__ import annotations

import logging
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request, RequestStatus

from testing.coordinator.contents import (
    NUM_BLOCKS,
    chunked,
    coordinator_of,
    fill,
    full,
    layout_of,
    mamba,
    random_cases,
    request_of,
    window,
)
from testing.coordinator.oracle import Cached, Layout, longest
from vllm_hybrid_kv import plugin
from vllm_hybrid_kv.coordinator.explanation import Cache, Found, Kind, Reason
from vllm_hybrid_kv.coordinator.fixed_point import FixedPointCoordinator
from vllm_hybrid_kv.coordinator.hit_report import HitReport
from vllm_hybrid_kv.metrics.collector import FolderCollector
from vllm_hybrid_kv.metrics.directory import VARIABLE
from vllm_hybrid_kv.state import STATE

UNIT = 16
HYBRID = layout_of(full(64), mamba(64), unit=UNIT)


@pytest.fixture(autouse=True)
def _settings(monkeypatch):
    plugin.register()
    monkeypatch.setattr(STATE, "engine_settings", None)
    monkeypatch.setenv("VLLM_HYBRID_KV_COORDINATOR", "fixed_point")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "metrics"))
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    return tmp_path / "metrics"


@pytest.fixture
def log():
    """The lines that the plugin logs, by level."""
    lines: dict[int, list[str]] = {logging.DEBUG: [], logging.WARNING: []}

    class Handler(logging.Handler):
        def emit(self, record):
            lines.setdefault(record.levelno, []).append(record.getMessage())

    handler, logger = Handler(), logging.getLogger("vllm.hybrid_kv")
    level = logger.level
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def counts(folder) -> dict[tuple[str, str | None], float]:
    """Return what is not 0 by name, without prefix and suffix, and kind."""
    found = {}
    for metric in FolderCollector(folder).collect():
        for sample in metric.samples:
            name = sample.name.removeprefix("vllm_hybrid_kv:").removesuffix("_total")
            if sample.value:
                found[name, sample.labels.get("kind")] = sample.value
    return found


def every(step: int, end: int) -> range:
    return range(step, end + 1, step)


def put(pool: Any, layout: Layout, request: Request, *boundaries: Any) -> None:
    """Cache what ends at some boundaries of a request, for each group."""
    cached = Cached(len(request.block_hashes) * layout.hash_unit)
    for group, ends in enumerate(boundaries):
        for number, end in enumerate(ends):
            cached.blocks[group, end] = [100 * (group + 1) + number]
    fill(pool, request, cached, request_of(layout, []))


def explained(layout: Layout, num_tokens: int, *boundaries: Any) -> Any:
    """Explain a request that waits, of which groups have cached what ends at boundaries."""
    request = request_of(layout, list(range(num_tokens)))
    coordinator = coordinator_of(layout, FixedPointCoordinator)
    put(coordinator.block_pool, layout, request, *boundaries)
    return coordinator.explain(request)


# What limits a hit


def test_a_state_that_is_missing_limits_what_attention_could_serve():
    why = explained(HYBRID, 300, every(64, 256), (64, 80))
    assert (why.prompt_tokens, why.hit_tokens, why.reach_tokens) == (300, 80, 256)
    assert [(kind.name, kind.alone_tokens, kind.lost_tokens) for kind in why.kinds] == [
        ("full_attention", 256, 0),
        ("mamba", 80, 176),
    ]
    assert (why.reason, why.limited_by, why.lost_tokens) == (Reason.LIMITED, "mamba", 176)
    assert str(why) == (
        "request request would hit 80 of 300 prompt tokens: alone could have served "
        "full_attention 256, mamba 80; mamba lost 176; what may help: the hybrid_kv setting "
        "coordinator=hybrid_aware"
    )
    with pytest.raises(FrozenInstanceError):
        why.hit_tokens = 1


def test_a_state_beyond_what_attention_has_limits_nothing():
    why = explained(HYBRID, 300, (64,), (64, 192))
    assert [kind.alone_tokens for kind in why.kinds] == [64, 192]
    assert (why.hit_tokens, why.reach_tokens, why.lost_tokens) == (64, 64, 0)
    assert (why.reason, why.limited_by, why.setting) == (Reason.NOT_CACHED, None, None)
    assert str(why).endswith("would hit 64 of 300 prompt tokens: nothing longer was cached")


def test_an_empty_cache_limits_nothing():
    why = explained(HYBRID, 300, (), ())
    assert [kind.alone_tokens for kind in why.kinds] == [0, 0]
    assert (why.reason, why.limited_by) == (Reason.NOT_CACHED, None)


def test_a_hit_up_to_the_last_token_is_limited_by_no_kind():
    why = explained(HYBRID, 256, every(64, 256), every(16, 256))
    assert (why.hit_tokens, why.reason, why.limited_by) == (240, Reason.LAST_TOKEN, None)
    assert "multiples of 16 tokens and before the last token" in str(why)


def test_a_prompt_shorter_than_a_block_is_told_what_hits_end_at():
    blocks = layout_of(full(64), mamba(64))
    why = explained(blocks, 64, (64,), (64,))
    assert (why.hit_tokens, why.reason, why.unit_tokens) == (0, Reason.TOO_SHORT, 64)
    assert why.setting == "the hybrid_kv setting prefix_match_unit=auto"
    assert "hits end at multiples of 64 tokens" in str(why)


def test_what_is_lost_is_split_among_the_kinds_that_lost_it():
    layout = layout_of(full(16), window(16, 17), mamba(16))
    why = explained(layout, 200, every(16, 160), (128, 64), (16, 64))
    lost = {kind.name: kind.lost_tokens for kind in why.kinds}
    assert (why.hit_tokens, lost) == (64, {"full_attention": 0, "sliding_window": 32, "mamba": 64})
    assert why.limited_by == "mamba"


def test_two_windows_are_one_kind_that_serves_what_both_can():
    layout = layout_of(full(16), window(16, 17), window(16, 33))
    why = explained(layout, 200, every(16, 160), (48, 96, 128), (16, 32, 48, 64))
    (windows,) = [kind for kind in why.kinds if kind.name == "sliding_window"]
    # The one could go to 128 tokens and the other to 64, both together to 48.
    assert (windows.alone_tokens, why.hit_tokens, windows.lost_tokens) == (48, 48, 112)


def test_draft_layers_are_a_kind_of_their_own():
    layout = layout_of(full(16), full(16, 16), mamba(16), drafts=(1,))
    why = explained(layout, 200, every(16, 160), every(16, 160), every(16, 160))
    assert [(kind.name, kind.draft) for kind in why.kinds] == [
        ("full_attention", False),
        ("full_attention_draft", True),
        ("mamba", False),
    ]
    assert (why.hit_tokens, why.limited_by, why.lost_tokens) == (144, "full_attention_draft", 16)


def test_states_have_no_draft_layers_even_where_all_groups_are_marked():
    why = explained(layout_of(full(16), mamba(16), drafts=()), 200, (16,), ())
    assert [kind.name for kind in why.kinds] == ["full_attention_draft", "mamba"]


def test_without_full_attention_what_any_kind_could_serve_is_what_is_lost():
    layout = layout_of(window(16, 17), mamba(16))
    why = explained(layout, 200, (64, 160), (64, 96))
    assert [kind.alone_tokens for kind in why.kinds] == [160, 96]
    assert (why.hit_tokens, why.reach_tokens) == (64, 160)
    assert why.lost_tokens == 96


def test_other_kinds_bring_other_advice():
    layout = layout_of(full(16), chunked(16, 64))
    # After 144 tokens the chunk is the one from 128 on, of which nothing is there.
    why = explained(layout, 200, every(16, 144), ())
    assert why.limited_by == "chunked_local_attention"
    assert "memory" in (why.setting or "")


@pytest.mark.parametrize("seed", range(3))
def test_the_numbers_are_those_of_brute_force(seed):
    limited = 0
    for cases in random_cases(9000 + seed, 30, 10):
        layout = cases[0].layout
        coordinator = coordinator_of(layout, FixedPointCoordinator)
        alignment = coordinator._cache_hit_alignment_tokens
        for case in cases:
            assert coordinator.reset_prefix_cache()
            fill(coordinator.block_pool, case.request, case.cached, request_of(layout, []))
            why = coordinator.explain(case.request)
            limit = case.request.num_tokens - 1

            def serve(groups, case=case, alignment=alignment, limit=limit):
                return longest(case.layout, case.cached, alignment, limit, groups)

            assert why.hit_tokens == serve(range(len(layout.groups))), case.what
            for kind, hit in zip(coordinator._cache.kinds, why.kinds, strict=True):
                groups = [
                    group
                    for place in kind.groups
                    for group in coordinator.attention_groups[place].group_ids
                ]
                assert hit.alone_tokens == serve(groups), case.what
            assert all(kind.lost_tokens >= 0 for kind in why.kinds)
            assert why.hit_tokens + why.lost_tokens == why.reach_tokens, case.what
            limited += why.limited_by is not None
    assert limited > 20


# What is told of a request that is scheduled


def manager_of(layout: Layout, log_stats: bool = True, blocks: int = NUM_BLOCKS) -> KVCacheManager:
    return KVCacheManager(
        kv_cache_config=KVCacheConfig(blocks, [], list(layout.groups)),
        max_model_len=4096,
        scheduler_block_size=layout.scheduler_block_size,
        hash_block_size=layout.hash_unit,
        log_stats=log_stats,
    )


def named(name: str, num_tokens: int, layout: Layout = HYBRID, first: int = 0, **more: Any) -> Any:
    return Request(
        request_id=name,
        prompt_token_ids=list(range(first, first + num_tokens)),
        sampling_params=SamplingParams(max_tokens=8, **more),
        pooling_params=None,
        block_hasher=get_request_block_hasher(layout.hash_unit, sha256),
    )


def look_up(manager: KVCacheManager, request: Request) -> tuple[Any, int]:
    """Do what the scheduler does with a request that waits, whether or not there is room."""
    blocks, hit, request.shared_prefix_boundary = manager.get_computed_blocks(request)
    return blocks, hit


def schedule(manager: KVCacheManager, request: Request, chunk: int = 4096) -> int:
    """Have a request computed, in chunks, as the scheduler would."""
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


def preempt(manager: KVCacheManager, request: Request) -> None:
    manager.free(request)
    request.status, request.num_computed_tokens = RequestStatus.PREEMPTED, 0
    request.num_preemptions += 1


def test_a_request_is_counted_once_when_it_is_scheduled_however_often_it_was_looked_up(folder):
    manager, request = manager_of(HYBRID), named("a", 300)
    put(manager.block_pool, HYBRID, request, every(64, 256), (64, 80))
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


def test_a_request_that_comes_back_after_a_preemption_is_counted_apart(folder):
    manager, request = manager_of(HYBRID), named("a", 300)
    schedule(manager, request, chunk=64)
    request.append_output_token_ids([7] * 5)
    preempt(manager, request)
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


def test_what_was_found_is_explained_as_it_was_when_the_request_was_scheduled(folder):
    manager, request = manager_of(HYBRID), named("a", 300)
    put(manager.block_pool, HYBRID, request, every(64, 256), (64, 80))
    waiting = manager.coordinator.explain(request)
    assert (waiting.scheduled, waiting.hit_tokens) == (False, 80)
    # In chunks that end where state blocks do, or none of its states would be cached.
    schedule(manager, request, chunk=16)
    # Its own blocks and its state are now cached under the hashes that were looked up.
    assert (
        manager.coordinator.reconcile(
            request.block_hashes, 299, manager.coordinator.attention_groups
        ).length
        > 80
    )
    request.append_output_token_ids([7] * 20)
    running = manager.coordinator.explain(request)
    assert running == replace(waiting, scheduled=True)
    assert str(running).startswith("request a hit 80 of 300 prompt tokens: ")
    manager.free(request)
    assert not manager.coordinator.explain(request).scheduled


def test_a_request_that_reads_no_cache_is_not_mistaken_for_one_that_waits_for_room(folder):
    manager, waits = manager_of(HYBRID), named("waits", 300)
    put(manager.block_pool, HYBRID, waits, every(64, 256), (64, 80))
    look_up(manager, waits)
    reads_nothing = named("reads nothing", 200, prompt_logprobs=1)
    assert schedule(manager, reads_nothing) == 0
    why = manager.coordinator.explain(reads_nothing)
    assert (why.reason, why.scheduled, why.hit_tokens) == (Reason.NOT_READ, True, 0)
    assert not counts(folder)
    assert schedule(manager, waits) == 80
    assert counts(folder)["prefix_cache_requests", None] == 1


def test_a_request_for_which_there_is_no_room_is_not_counted(folder):
    manager = manager_of(HYBRID, blocks=8)
    first, second = named("first", 200), named("second", 300, first=5000)
    schedule(manager, first)
    blocks, hit = look_up(manager, second)
    assert manager.allocate_slots(second, 300 - hit, hit, blocks) is None
    # A step of the one that runs, between two lookups of the one that waits.
    first.append_output_token_ids(7)
    assert manager.allocate_slots(first, 1) is not None
    assert counts(folder) == {("prefix_cache_requests", None): 1}
    assert not manager.coordinator.explain(second).scheduled
    ran = manager.coordinator.explain(first)
    assert (ran.scheduled, ran.prompt_tokens, ran.reason) == (True, 200, Reason.NOT_CACHED)


def test_a_prompt_that_can_hit_nothing_is_counted(folder):
    blocks = layout_of(full(64), mamba(64))
    schedule(manager_of(blocks), named("short", 64, blocks))
    assert counts(folder) == {
        ("prefix_cache_requests", None): 1,
        ("prefix_cache_short_requests", None): 1,
    }


def test_a_hit_that_groups_found_each_for_itself_lost_nothing(folder):
    manager, request = manager_of(HYBRID), named("a", 300)
    put(manager.block_pool, HYBRID, request, every(64, 256), (64, 80))
    coordinator = manager.coordinator
    coordinator.find_longest_cache_hit_per_group(request.block_hashes, 299)
    coordinator.allocate_new_computed_blocks("a", ([], []), 256, 0)
    coordinator.cache_blocks(request, 0)
    assert counts(folder) == {
        ("prefix_cache_requests", None): 1,
        ("prefix_cache_hit_tokens", "full_attention"): 256,
        ("prefix_cache_hit_tokens", "mamba"): 256,
        ("prefix_cache_alone_tokens", "full_attention"): 256,
        ("prefix_cache_alone_tokens", "mamba"): 80,
    }


def test_without_statistics_nothing_is_counted_or_looked_up_for_it(folder, log):
    logging.getLogger("vllm.hybrid_kv").setLevel(logging.INFO)
    manager, request = manager_of(HYBRID, log_stats=False), named("a", 300)
    put(manager.block_pool, HYBRID, request, every(64, 256), (64, 80))
    schedule(manager, request)
    why = manager.coordinator.explain(request)
    # Full attention is asked first in any case, states only for what it has.
    assert [kind.alone_tokens for kind in why.kinds] == [256, None]
    assert (why.hit_tokens, why.limited_by, why.lost_tokens) == (80, "mamba", 176)
    assert "alone could have served full_attention 256; mamba lost 176" in str(why)
    assert not folder.exists()
    assert not log[logging.DEBUG]


def test_debug_says_it_once_per_request_in_one_line(folder, log):
    logging.getLogger("vllm.hybrid_kv").setLevel(logging.DEBUG)
    manager, request = manager_of(HYBRID, log_stats=False), named("a", 300)
    put(manager.block_pool, HYBRID, request, every(64, 256), (64, 80))
    for _ in range(3):
        look_up(manager, request)
    schedule(manager, request)
    assert log[logging.DEBUG] == [str(manager.coordinator.explain(request))]
    assert "full_attention 256, mamba 80; mamba lost 176" in log[logging.DEBUG][0]


# The warning


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


CACHE = Cache(
    (Kind("full_attention", (0,), True), Kind("mamba", (1,), False)), 64, False, True, "fixed_point"
)
WARNING = (
    "Of 100000 prompt tokens that full_attention could have served from the prefix cache to the "
    "last 100 requests, 60000 (60 %) were computed again, 60000 because KV groups of kind mamba "
    "could not serve them; what may help: the hybrid_kv setting coordinator=hybrid_aware and "
    "prefix_match_unit=auto"
)


def tell(report: HitReport, lost: int, requests: int, preemptions: int = 0) -> None:
    for number in range(requests):
        request = named(f"{number}", 20)
        request.num_preemptions = preemptions
        report.tell(request, Found(1023, 1000 - lost, (0, lost), (1000, 1000 - lost)))


def test_a_warning_comes_when_most_of_what_attention_has_is_lost_over_100_requests(log):
    report = HitReport(CACHE, False, Clock())
    tell(report, 600, 99)
    assert not log[logging.WARNING]
    tell(report, 600, 1)
    assert log[logging.WARNING] == [WARNING]


def test_no_warning_comes_when_half_of_it_is_lost(log):
    report = HitReport(CACHE, False, Clock())
    tell(report, 500, 1000)
    assert not log[logging.WARNING]


def test_requests_that_come_back_bring_no_warning(log):
    tell(HitReport(CACHE, False, Clock()), 600, 200, preemptions=1)
    assert not log[logging.WARNING]


def test_the_next_warning_waits_for_ten_minutes(log):
    clock = Clock()
    report = HitReport(CACHE, False, clock)
    tell(report, 600, 300)
    clock.now = 599.0
    tell(report, 600, 100)
    assert len(log[logging.WARNING]) == 1
    clock.now = 600.0
    tell(report, 600, 99)
    assert len(log[logging.WARNING]) == 1
    tell(report, 600, 1)
    assert log[logging.WARNING] == [WARNING, WARNING]


def test_the_advice_is_what_is_not_in_force_already():
    assert CACHE.setting_for("mamba") == (
        "the hybrid_kv setting coordinator=hybrid_aware and prefix_match_unit=auto"
    )
    aware = replace(CACHE, strategy="hybrid_aware")
    assert aware.setting_for("mamba") == "the hybrid_kv setting prefix_match_unit=auto"
    fine = replace(aware, partial=True)
    assert "--gpu-memory-utilization" in (fine.setting_for("mamba") or "")
    assert fine.setting_for("full_attention_draft") is None
    windows = replace(aware, aligned_states=False)
    assert windows.setting_for(None) == "a smaller --block-size"
